"""Commands as the papers' repositories and our pages give them, on COCO's and VOC's own layout, but for the
sizes: one or two steps from random weights."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from runs import ROOT, checkpoint, last_losses, metrics, run_commands
from small_datasets import write_voc

from distill_d2 import model_zoo
from distill_d2.testing import write_dataset

SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001", "MODEL.DISTILLER.BYPASS_DISTILL", "0"]
ONE_STEP, TWO_STEPS = ([*SMALL, "SOLVER.MAX_ITER", str(steps)] for steps in (1, 2))
OUTPUT = ["OUTPUT_DIR", "output/run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder to start commands in, with two images per split of COCO and VOC."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    coco = tmp_path / "datasets" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        entry = write_dataset(tmp_path / split, count=2)
        content = json.loads(Path(entry["JSON"]).read_text())
        content["categories"] = categories
        (coco / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        Path(entry["IMAGES"]).rename(coco / split)
    images = {"1": [("cat", 5, 5, 40, 30)], "2": [("dog", 10, 8, 50, 35), ("cat", 2, 2, 20, 20)]}
    for year, split in ((2007, "trainval"), (2007, "test"), (2012, "trainval")):
        write_voc(tmp_path / "datasets" / "VOCdevkit" / f"VOC{year}", images, split)
    return tmp_path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file of random weights of a packaged config, by its name; residual branches are damped, as trained
    ones are."""
    cache, files = tmp_path_factory.mktemp("weights"), {}

    def write(config):
        if config not in files:
            cfg = get_cfg()
            cfg.merge_from_file(model_zoo.get_config_file(config))
            cfg.MODEL.DEVICE = "cpu"
            model = build_model(cfg)
            for name, norm in model.backbone.named_modules():
                if name.endswith("conv3.norm"):
                    norm.weight.fill_(0.2)
            files[config] = str(cache / f"{len(files)}.pth")
            torch.save({"model": model.state_dict()}, files[config])
        return files[config]

    return write


def line(script, config, *arguments):
    start = [sys.executable, str(ROOT / script), "--num-gpus", "0"]
    return [*start, "--config-file", str(ROOT / "configs" / config), *arguments]


def evaluates_without_a_teacher(output):
    return "copypaste: AP," in output and "Teacher: " not in output


RETINANET = "COCO-Detection/retinanet_R_{}_FPN_{}.yaml"
R50, R101 = RETINANET.format(50, "3x"), RETINANET.format(101, "3x")
FASTER = [f"COCO-Detection/faster_rcnn_R_{name}.yaml" for name in ("50_FPN_1x", "101_FPN_3x")]
GID = "Distillation-GID/Distill_RetinaNet_T_Res101_S_Res50_2x_{}.yaml"


def test_commands_of_pkds_repository(folder, weights):
    """As its README gives them."""
    config = RETINANET.format(50, "1x")
    start = ["MODEL.WEIGHTS", weights(config), *OUTPUT]
    run_commands(line("train_baseline.py", config, *start, *TWO_STEPS))
    trained = ["MODEL.WEIGHTS", "output/run/model_final.pth", *OUTPUT, *SMALL]
    config = "Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml"
    (output,) = run_commands(line("train_distill.py", config, "--resume", "--eval-only", *trained))
    assert evaluates_without_a_teacher(output)


@pytest.mark.slow
def test_distils_from_where_gids_page_puts_the_teacher(folder, weights):
    teacher = folder / "output" / "RetinaNet_Res101_1x"
    teacher.mkdir(parents=True)
    (teacher / "model_final.pth").symlink_to(weights(R101))
    start = ["MODEL.WEIGHTS", weights(R50), "DATASETS.TEST", "()", *OUTPUT, *ONE_STEP]
    run_commands(line("train_distill.py", GID.format("L1_T_L1"), *start))
    assert len({name for name in last_losses("output/run") if "gid" in name}) == 4


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "config, student, teacher",
    [
        ("Distillation-ICD/retinanet_R_50_R101_icd_FPN_1x.yaml", "", R101),
        pytest.param("Distillation-ICD/RCNN_R_50_R101_icd_FPN_1x.yaml", "", FASTER[1], marks=slow),
        pytest.param(
            "Distillation-ICD/MaskRCNN_R_50_R101_icd_FPN_1x.yaml",
            "",
            "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
            marks=slow,
        ),
        *(
            pytest.param(GID.format(name), R50, R101, marks=slow)
            for name in ("L1Smo", "L1Smo_T_L1", "L1Smo_T_L1_aug", "L1_T_L1_aug", "L1_aug_T_L1_aug")
        ),
        pytest.param("Distillation-GID/RCNN_R_50_R101_gid_FPN_1x.yaml", *FASTER, marks=slow),
        pytest.param(
            "Distillation-GID/voc_retinanet_R_50_R101_gid_FPN.yaml",
            *(f"PascalVOC-Detection/retinanet_R_{depth}_FPN.yaml" for depth in (50, 101)),
            marks=slow,
        ),
    ],
)
def test_distillation_and_evaluation(folder, weights, config, student, teacher):
    """As ICD's README gives them: --resume where there is nothing to resume."""
    files = ["MODEL.WEIGHTS", weights(student) if student else ""]
    files += ["MODEL.DISTILLER.TEACHER_WEIGHTS", weights(teacher), *OUTPUT]
    (output,) = run_commands(line("train_distill.py", config, "--resume", *files, *ONE_STEP))
    method = re.search("Distillation-(.*)/", config)[1].lower()
    logged = last_losses("output/run")
    assert any(name.startswith(f"loss_{method}_") for name in logged) and "copypaste: AP," in output
    assert all(0 <= value < math.inf for value in logged.values())
    (output,) = run_commands(line("train_distill.py", config, "--resume", "--eval-only", *files, *SMALL))
    assert evaluates_without_a_teacher(output)


@pytest.mark.slow
def test_commands_of_gids_page(folder, weights):
    """Teacher, student alone, distillation, resume, evaluation."""
    config = GID.format("L1_T_L1")
    start = ["MODEL.WEIGHTS", weights(R50), "OUTPUT_DIR"]
    for script, name, model in (
        ("train_baseline.py", "teacher/RetinaNet_Res101_1x", R101),
        ("train_baseline.py", "student/RetinaNet_Res50_2x", R50),
    ):
        files = ["MODEL.WEIGHTS", weights(model), "OUTPUT_DIR", f"output/{Path(name).name}"]
        run_commands(line(script, f"Distillation-GID/{name}.yaml", *files, *ONE_STEP))
    run_commands(line("train_distill.py", config, *start, "output/gid", *ONE_STEP))
    run_commands(line("train_distill.py", config, "--resume", *start, "output/gid", *TWO_STEPS))
    assert checkpoint("output/gid")["trainer"]["iteration"] == 1
    trained = ["MODEL.WEIGHTS", "output/gid/model_final.pth", *SMALL]
    (output,) = run_commands(line("train_distill.py", config, "--eval-only", *trained))
    assert evaluates_without_a_teacher(output)


@pytest.mark.slow
def test_fcos_of_gids_page(folder):
    small = []
    for data in ("dataloader.train", "dataloader.test"):
        small += [f"{data}.num_workers=0", f"{data}.mapper.augmentations.0.short_edge_length=64"]
    small += ["dataloader.train.total_batch_size=2", "train.max_iter=1", "train.init_checkpoint="]
    for script, config, name in (
        ("train_baseline.py", "teacher/fcos_R_101_FPN_2x.py", "fcos_R_101_FPN_2x"),
        ("train_distill.py", "fcos_R_50_R101_gid_FPN_1x.py", "gid_fcos"),
    ):
        output = f"train.output_dir=output/{name}"
        run_commands(line(script, f"Distillation-GID/{config}", output, *small))
    assert len({name for name in last_losses("output/gid_fcos") if "gid" in name}) == 4


# The VOC workflow of DeFeat's page: teacher, student, distilled student, test.

PAGE = ROOT / "docs" / "methods" / "defeat.md"
VOC = "PascalVOC-Detection/faster_rcnn_R_{}_FPN_voc.yaml"
RULES = ("bbox/AP50", "bbox/AP50_11point", "bbox/AP50_area")


def page_commands():
    """The four commands of the page's first block, for this machine: the checkout's scripts and configs, no
    GPU."""
    block = PAGE.read_text().partition("## VOC, step by step")[2].partition("Each also prints")[0]
    block = block.replace("\\\n", " ")
    lines = [words.split() for words in block.splitlines() if words.startswith("python train_")]
    scripts = ["train_baseline.py", "train_baseline.py", "train_distill.py", lines[0][1]]
    assert [words[1] for words in lines] == scripts
    for words in lines:
        words[words.index("--num-gpus") + 1] = "0"
    here = re.compile("train_|configs/")
    return [
        [sys.executable, *(str(ROOT / w) if here.match(w) else w for w in words[1:])] for words in lines
    ]


def values(folder):
    """All that was logged, by name."""
    return {key: value for logged in metrics(folder) for key, value in logged.items()}


@pytest.mark.slow
def test_commands_of_defeats_page(folder, weights):
    steps = [*TWO_STEPS, "SOLVER.STEPS", "(1,)", "SOLVER.WARMUP_ITERS", "0", "MODEL.WEIGHTS"]
    teacher, student, distill, test = page_commands()
    run_commands([*teacher, *steps, weights(VOC.format(101))])
    for command in (student, distill):
        run_commands([*command, *steps, weights(VOC.format(50))])
    for output in ("work/voc/r101", "work/voc/r50", "work/kd/r101-50-DeFeat"):
        assert all(0 <= values(output)[rule] <= 100 for rule in RULES)
    logged = values("work/kd/r101-50-DeFeat")
    assert all(0 < logged[f"loss_defeat_{name}"] < math.inf for name in ("neck", "neck_back"))
    saved = checkpoint("work/kd/r101-50-DeFeat")
    assert len(saved["distiller"]) == 2 * 5  # adapters of p2 to p6, weight and bias
    assert set(saved["model"]) == set(checkpoint("work/voc/r50")["model"])
    (output,) = run_commands([*test, *SMALL])
    assert "copypaste: AP,AP50,AP75,AP50_11point,AP50_area" in output and "Teacher: " not in output


@pytest.mark.slow
def test_demo_on_cells(shared, tmp_path):
    """tools/demo.py on real photos: all runs leave checkpoint and metrics, and are compared."""
    terms = {
        "fgfi": {"loss_fgfi"},
        "defeat-neck": {"loss_defeat_neck", "loss_defeat_neck_back"},
        "defeat": {"loss_defeat_neck", "loss_defeat_neck_back", "loss_defeat_hcls"},
        "headkd": {"loss_head_kd_cls", "loss_head_kd_reg"},
    }
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--dataset", "bccd_rcnn"]
    command += ["--methods", *terms, "--output", str(tmp_path), "SOLVER.MAX_ITER", "10"]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(shared / "data"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("teacher", "student", *terms):
        assert (tmp_path / name / "model_final.pth").is_file()
        assert all(0 <= values(tmp_path / name)[rule] <= 100 for rule in RULES)
        assert re.search(rf"^\| {name} +\|", done.stdout, re.MULTILINE)
    assert all(expected < set(values(tmp_path / name)) for name, expected in terms.items())
    assert "loss_defeat_hcls" not in values(tmp_path / "defeat-neck")
    assert all(f"{name} - student: " in done.stdout for name in terms)
