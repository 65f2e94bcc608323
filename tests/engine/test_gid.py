"""GID as a user trains with it: LazyConfigs of FCOS, and the commands of its authors' repository."""

import math
import sys
from pathlib import Path

import pytest
import torch
from coco_case import SMALL, write_coco, write_weights
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import ROOT, Job, checkpoint, last_losses, run_commands
from small_datasets import write_voc

from distill_d2.testing import tiny_batch, tiny_config, tiny_detector

TERMS = {f"loss_gid_{name}" for name in ("feature", "relation", "response_cls", "response_reg")}


def gid_job(folder, family="retinanet", **keys):
    """A job that distils by GID, with these keys of its node, and does not evaluate."""
    job = Job(folder, family, types=["GID"], evaluate=False)
    # Random detectors, the two-stage ones above all, disagree on small boxes that lie close together.
    job.node.GID.GI_MIN_SIDE, job.node.GID.GI_NMS_THRESH = 1.0, 0.7
    for key, value in keys.items():
        job.node.GID[key] = value
    return job


def test_teacher_of_another_kind_for_ground_truth_alone(tmp_path):
    """If no head is compared, the teacher may be of any kind, with other classes."""
    job = gid_job(tmp_path, GI_MODE="gt", RESPONSE_CLS_WEIGHT=0.0, RESPONSE_REG_WEIGHT=0.0)
    teacher = tiny_config("mask", width=16)
    teacher.MODEL.ROI_HEADS.NUM_CLASSES = 7
    job.use_teacher(teacher)
    job.run(opts=["SOLVER.MAX_ITER", 2])
    assert set(last_losses(job.output)) & TERMS == {"loss_gid_feature", "loss_gid_relation"}


def test_no_proposals_at_all(tmp_path):
    """Where the student's RPN proposes nothing, detectron2's own losses are finite, too."""
    job = gid_job(tmp_path, "faster")
    job.config.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = False
    model = build_model(job.config).train()
    model.student.proposal_generator.register_forward_hook(
        lambda _, __, output: ([proposals[:0] for proposals in output[0]], output[1])
    )
    with EventStorage(0):
        losses = model(tiny_batch())
    sum(losses.values()).backward()
    assert all(losses[name] == 0 for name in TERMS)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.losses.parameters())


# LazyConfigs.

FCOS_CONFIG = """
from distill_d2.testing.tiny import tiny_detector
model = L(tiny_detector)(family="fcos", width={width}, channels={channels})
"""
FCOS_TEACHER = f"""
from detectron2.config import LazyCall as L
{FCOS_CONFIG}
train = dict(init_checkpoint="{{weights}}")
"""
FCOS_KEYS = "TYPES=['GID'], GID=dict(RESPONSE_MASK='inside', RESPONSE_REG_MODE='GIoU')"


def test_fcos_of_lazy_configs(lazy_job):
    """A student, and a teacher of more channels, which is itself a LazyConfig beside the student's."""
    model = tiny_detector("fcos", 16)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)  # strides: untrained boxes are too small
    weights = lazy_job.folder / "fcos.pth"
    torch.save({"model": model.state_dict()}, weights)
    teacher = FCOS_TEACHER.format(width=16, channels=16, weights=weights)
    (lazy_job.folder / "fcos_teacher.py").write_text(teacher)
    lazy_job.replace('TYPES=["PKD"]', FCOS_KEYS)
    lazy_job.replace(lazy_job.teacher, "fcos_teacher.py")
    lazy_job.text += FCOS_CONFIG.format(width=8, channels=8)

    assert "AP" in lazy_job.run("train.max_iter=2")["bbox"]
    logged = last_losses(lazy_job.output)
    assert TERMS | {"loss_fcos_ctr"} < set(logged) and all(0 < logged[name] < 1e3 for name in TERMS)
    saved = checkpoint(lazy_job.output)
    assert saved["distiller"].keys() == {f"GID.pairs.adapters.shared.{k}" for k in ("weight", "bias")}
    plain = instantiate(LazyConfig.load(str(lazy_job.folder / "config.py")).model)
    plain.load_state_dict(saved["model"], strict=True)
    lazy_job.run("--resume", "train.max_iter=3")
    assert checkpoint(lazy_job.output)["trainer"]["iteration"] == 2

    nowhere = "distiller.MODEL_DISTILLER_CONFIG=nowhere.py"
    weights = f"train.init_checkpoint={lazy_job.output}/model_final.pth"
    assert "AP" in lazy_job.run("--eval-only", weights, nowhere)["bbox"]


# The commands of the authors' repository, as the page of configs/Distillation-GID translates them.

CONFIGS = ROOT / "configs" / "Distillation-GID"
SIX = "Distill_RetinaNet_T_Res101_S_Res50_2x_"
ONE_STEP = [*SMALL, "SOLVER.MAX_ITER", "1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of random weights of R-50 and R-101 RetinaNets."""
    folder = tmp_path_factory.mktemp("weights")
    names = {depth: f"COCO-Detection/retinanet_R_{depth}_FPN_3x.yaml" for depth in (50, 101)}
    return {depth: write_weights(name, folder / f"{depth}.pth") for depth, name in names.items()}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with COCO in it to start commands in: outputs and their weights lie below it."""
    write_coco(tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(script, config, *arguments, options=ONE_STEP):
    start = [sys.executable, str(ROOT / script), "--num-gpus", "0"]
    return [*start, "--config-file", str(CONFIGS / config), *arguments, *options]


def test_distils_from_where_the_page_puts_the_teacher(checkout, weights):
    teacher = checkout / "output" / "RetinaNet_Res101_1x"
    teacher.mkdir(parents=True)
    (teacher / "model_final.pth").symlink_to(weights[101])
    start = ["OUTPUT_DIR", "output/gid", "MODEL.WEIGHTS", weights[50], "DATASETS.TEST", "()"]
    run_commands(line("train_distill.py", f"{SIX}L1_T_L1.yaml", *start))
    logged = last_losses("output/gid")
    assert TERMS < set(logged) and all(0 <= logged[name] < math.inf for name in TERMS)
    assert not checkpoint("output/gid")["distiller"]


@pytest.mark.slow
def test_commands_of_the_authors(checkout, weights):
    """Teacher, student alone, distillation, resume, evaluation."""
    train, distil, config = "train_baseline.py", "train_distill.py", f"{SIX}L1_T_L1.yaml"
    r50, r101 = (["MODEL.WEIGHTS", weights[depth], "OUTPUT_DIR"] for depth in (50, 101))
    run_commands(line(train, "teacher/RetinaNet_Res101_1x.yaml", *r101, "output/RetinaNet_Res101_1x"))
    run_commands(line(train, "student/RetinaNet_Res50_2x.yaml", *r50, "output/RetinaNet_Res50_2x"))
    run_commands(line(distil, config, *r50, "output/gid"))
    run_commands(line(distil, config, "--resume", *r50, "output/gid", options=SMALL))
    assert checkpoint("output/gid")["trainer"]["iteration"] == 1
    trained = ["MODEL.WEIGHTS", "output/gid/model_final.pth"]
    (lines,) = run_commands(line(distil, config, "--eval-only", *trained))
    assert "copypaste: AP," in lines and "Teacher: " not in lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["L1Smo", "L1Smo_T_L1", "L1Smo_T_L1_aug", "L1_T_L1_aug", "L1_aug_T_L1_aug"]
)
def test_configs_of_the_authors(checkout, weights, name):
    _distils(f"{SIX}{name}.yaml", weights[50], weights[101])


@pytest.mark.slow
def test_faster_rcnn(checkout):
    names = [f"COCO-Detection/faster_rcnn_R_{name}.yaml" for name in ("50_FPN_1x", "101_FPN_3x")]
    files = [write_weights(name, checkout / Path(name).stem) for name in names]
    _distils("RCNN_R_50_R101_gid_FPN_1x.yaml", *files)


@pytest.mark.slow
def test_voc(checkout):
    images = {"1": [("cat", 5, 5, 40, 30)], "2": [("dog", 10, 8, 50, 35)]}
    for year, split in ((2007, "trainval"), (2007, "test"), (2012, "trainval")):
        write_voc(checkout / "datasets" / f"VOC{year}", images, split)
    names = [f"PascalVOC-Detection/retinanet_R_{depth}_FPN.yaml" for depth in (50, 101)]
    files = [write_weights(name, checkout / Path(name).stem) for name in names]
    _distils("voc_retinanet_R_50_R101_gid_FPN.yaml", *files)


def _distils(config, student, teacher):
    """The command of a yaml config trains a step and evaluates."""
    files = ["MODEL.WEIGHTS", student, "MODEL.DISTILLER.TEACHER_WEIGHTS", teacher]
    (lines,) = run_commands(line("train_distill.py", config, "OUTPUT_DIR", "output/gid", *files))
    assert "copypaste: AP," in lines and TERMS < set(last_losses("output/gid"))


@pytest.mark.slow
def test_fcos(checkout):
    small = []
    for data in ("dataloader.train", "dataloader.test"):
        small += [f"{data}.num_workers=0", f"{data}.mapper.augmentations.0.short_edge_length=64"]
    small += ["dataloader.train.total_batch_size=2", "train.max_iter=1", "train.init_checkpoint="]
    for script, config, folder in (
        ("train_baseline.py", "teacher/fcos_R_101_FPN_2x.py", "fcos_R_101_FPN_2x"),
        ("train_distill.py", "fcos_R_50_R101_gid_FPN_1x.py", "gid_fcos"),
    ):
        run_commands(line(script, config, f"train.output_dir=output/{folder}", options=small))
    assert TERMS < set(last_losses("output/gid_fcos"))
