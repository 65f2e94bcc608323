"""GID end to end, as a user trains with it: the laws, resume, processes, LazyConfigs, the commands of
its authors' repository, wrong input."""

import json
import math
import sys
from pathlib import Path

import gid_run
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from job import Job
from promises import (
    equals_the_baseline,
    last_losses,
    processes_share_their_gradients,
    resumes_exactly,
    trains_and_saves,
)
from small_datasets import write_voc
from test_distiller import count_calls
from test_icd import trainer_of
from test_lazy import checkpoint as lazy_checkpoint
from test_lazy import config_file  # noqa: F401  a fixture
from test_lazy import run as run_lazy
from test_processes import ROOT, SMALL, command, run, write_coco, write_weights
from test_training import checkpoint
from test_wrong_input import fails

from distill_d2.testing.tiny import save_teacher, tiny_batch, tiny_config, tiny_detector

NODE = "MODEL.DISTILLER.GID."
TERMS = {f"loss_gid_{name}" for name in ("feature", "relation", "response_cls", "response_reg")}
ADAPTER = {f"GID.pairs.adapters.shared.{kind}" for kind in ("weight", "bias")}
NOTHING_OF_HEADS = {"GI_MODE": "gt", "RESPONSE_CLS_WEIGHT": 0.0, "RESPONSE_REG_WEIGHT": 0.0}


def gid_job(folder, family="retinanet", channels=8, **keys):
    """A job that distils by GID, with these keys of its node, and does not evaluate.

    Args:
        channels: of the student's neck; the teacher has 16.
    """
    job = Job(folder, family, channels=channels)
    job.config.DATASETS.TEST = ()
    node = job.config.MODEL.DISTILLER
    node.TYPES = ["GID"]
    # Random detectors, the two-stage ones above all, disagree on small boxes that lie close together.
    node.GID.GI_MIN_SIDE, node.GID.GI_NMS_THRESH = 1.0, 0.7
    for key, value in keys.items():
        node.GID[key] = value
    return job


@pytest.fixture
def job(tmp_path):
    return gid_job(tmp_path)


def use_teacher(job, cfg):
    """Another teacher, with random weights."""
    config = save_teacher(cfg, job.folder / "other")
    job.config.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = config


# A run.


@pytest.mark.parametrize(
    "family, channels, keys",
    [
        ("retinanet", 8, {}),
        ("retinanet", 16, {"ADAPTER": True, "ADAPTER_SHARE_WEIGHTS": False}),
        ("faster", 16, {"PREDICTIONS": "box_head"}),
        ("faster", 8, {"PREDICTIONS": "rpn"}),
        ("mask", 16, {}),
    ],
)
def test_trains_logs_and_saves(tmp_path, monkeypatch, family, channels, keys):
    logged, trained = trains_and_saves(gid_job(tmp_path, family, channels, **keys), monkeypatch)
    assert TERMS < set(logged) and all(0 < logged[name] < math.inf for name in TERMS)
    assert trained == adapters(channels, keys)


def adapters(channels, keys):
    """Names of the adapter's parameters in a checkpoint."""
    if channels == 16 and not keys.get("ADAPTER"):
        return set()
    if keys.get("ADAPTER_SHARE_WEIGHTS", True):
        return ADAPTER
    return {name.replace("shared", level) for name in ADAPTER for level in ("p2", "p3", "p4")}


@pytest.mark.parametrize(
    "family, keys",
    [
        ("retinanet", {"WEIGHT": 0.0}),
        ("faster", {"WEIGHT": 0.0}),
        ("faster", {"PREDICTIONS": "rpn", "START_ITER": 100}),
        ("mask", {"START_ITER": 100}),
    ],
)
def test_student_alone_equals_the_baseline(tmp_path, family, keys):
    assert equals_the_baseline(gid_job(tmp_path, family, **keys)) == ADAPTER


HEADS = {
    "retinanet": ("head.bbox_pred.weight", "head.cls_score.weight"),
    "faster": ("roi_heads.box_predictor.bbox_pred.weight", "roi_heads.box_predictor.cls_score.weight"),
}


@pytest.mark.parametrize("family", list(HEADS))
def test_distillation_reaches_the_student(tmp_path, family):
    """The counterpart of law 1."""
    job = gid_job(tmp_path, family)
    job.run(distill=False, opts=["OUTPUT_DIR", tmp_path / "baseline", "SOLVER.MAX_ITER", 1])
    job.run(opts=["SOLVER.MAX_ITER", 1])
    alone, distilled = (
        checkpoint(folder)["model"] for folder in (tmp_path / "baseline", job.config.OUTPUT_DIR)
    )
    for name in (*HEADS[family], "backbone.fpn_output2.weight", "backbone.bottom_up.stem.conv1.weight"):
        assert not torch.equal(alone[name], distilled[name])


@pytest.mark.parametrize("family, keys", [("retinanet", {"WARMUP_ITERS": 1}), ("faster", {})])
def test_resumed_run_equals_uninterrupted(tmp_path, family, keys):
    resumes_exactly(gid_job(tmp_path, family, **keys))


def test_teacher_of_another_kind_for_ground_truth_alone(tmp_path):
    """Where no head is asked, any teacher will do."""
    job = gid_job(tmp_path, **NOTHING_OF_HEADS)
    teacher = tiny_config("mask", width=16)
    teacher.MODEL.ROI_HEADS.NUM_CLASSES = 7
    use_teacher(job, teacher)
    job.run(opts=["SOLVER.MAX_ITER", 2])
    logged = set(last_losses(job.config.OUTPUT_DIR))
    assert logged & TERMS == {"loss_gid_feature", "loss_gid_relation"}


# What the teacher computes.


PARTS = ["backbone", "head", "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"]


@pytest.mark.parametrize(
    "family, keys, steps, expected",
    [
        ("retinanet", {}, 2, {"backbone": 2, "head": 2}),
        ("retinanet", {"GI_MODE": "gt"}, 2, {"backbone": 2, "head": 2}),
        ("retinanet", NOTHING_OF_HEADS, 2, {"backbone": 2}),
        ("retinanet", {"START_ITER": 2}, 2, {}),
        ("retinanet", {"START_ITER": 2}, 3, {"backbone": 1, "head": 1}),
        ("retinanet", {"STOP_ITER": 1}, 3, {"backbone": 1, "head": 1}),
        ("retinanet", {"WEIGHT": 0.0}, 2, {}),
        ("faster", {"PREDICTIONS": "rpn"}, 2, {"backbone": 2, "proposal_generator.rpn_head": 2}),
        ("mask", {"GI_MODE": "neg"}, 2, {"backbone": 2, "roi_heads.box_head": 2}),
    ],
)
def test_teachers_head_runs_once_where_it_is_asked(tmp_path, family, keys, steps, expected):
    """Law 4; and the student's runs once, as without distillation."""
    job = gid_job(tmp_path, family, **keys)
    model = build_model(job.config).train()
    detectors = (model.teacher.model, model.student)
    theirs, ours = (
        {part: count_calls(module) for part, module in detector.named_modules() if part in PARTS}
        for detector in detectors
    )
    assert theirs.keys() == ours.keys()
    for iteration in range(steps):
        with EventStorage(iteration):
            sum(model(tiny_batch(masks=family == "mask")).values()).backward()
    assert {part: len(calls) for part, calls in theirs.items() if calls} == expected
    assert {len(calls) for calls in ours.values()} == {steps}


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


# Several processes, with find_unused_parameters=False.


def test_two_processes(tmp_path):
    """Law 8: each process has its own instances, or none; gradients are the mean."""
    job = gid_job(tmp_path, GI_MIN_SIDE=40.0, START_ITER=1)
    torch.save(trainer_of(job).plain_model.state_dict(), f"{job.config.OUTPUT_DIR}/start.pth")
    (lines,) = run(command(job, "tests/engine/gid_run.py", "--num-procs", 2))
    assert "World size: 2" in lines
    assert all(last_losses(job.config.OUTPUT_DIR)[name] > 0 for name in TERMS)

    ranks = processes_share_their_gradients(job)
    kinds = {name: [found(rank[name][0]) for rank in ranks] for name in gid_run.STEPS}
    assert kinds == {
        "not yet": [set(), set()],
        "both": [TERMS, TERMS],
        "one without objects": [TERMS, TERMS],
        "one without instances": [TERMS, set()],
        "both without instances": [set(), set()],
        "both again": [TERMS, TERMS],
    }


def found(losses):
    """Which terms are not 0."""
    return {name for name in TERMS if losses.get(name, 0.0) > 0}


# LazyConfigs.


FCOS_CONFIG = """
from distill_d2.testing.tiny import tiny_detector
model = L(tiny_detector)(family="fcos", width={width}, channels={channels})
"""
FCOS_KEYS = "distiller['GID'] = dict(RESPONSE_MASK='inside', RESPONSE_REG_MODE='GIoU')\n"
FCOS_TEACHER = f"""
from detectron2.config import LazyCall as L
{FCOS_CONFIG}
train = dict(init_checkpoint="{{weights}}")
"""


@pytest.fixture
def fcos_file(config_file):
    """A LazyConfig with an FCOS student and an FCOS teacher of more channels, itself a LazyConfig."""
    folder = config_file.parent
    model = tiny_detector("fcos", 16)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)  # strides: untrained boxes are too small
    torch.save({"model": model.state_dict()}, folder / "fcos.pth")
    teacher = FCOS_TEACHER.format(width=16, channels=16, weights=folder / "fcos.pth")
    (folder / "fcos_teacher.py").write_text(teacher)
    text = config_file.read_text().replace('TYPES=["PKD"]', 'TYPES=["GID"]')
    text = text.replace(str(folder / "teacher" / "teacher.yaml"), str(folder / "fcos_teacher.py"))
    config_file.write_text(text + FCOS_CONFIG.format(width=8, channels=8) + FCOS_KEYS)
    return config_file


def test_fcos_of_lazy_configs(fcos_file):
    folder = fcos_file.parent / "output"
    assert "AP" in run_lazy(fcos_file, "train.max_iter=2")["bbox"]
    logged = last_losses(folder)
    assert TERMS | {"loss_fcos_ctr"} < set(logged) and all(0 < logged[name] < 1e3 for name in TERMS)
    saved = lazy_checkpoint(fcos_file)
    assert saved["distiller"].keys() == ADAPTER
    instantiate(LazyConfig.load(str(fcos_file)).model).load_state_dict(saved["model"], strict=True)
    run_lazy(fcos_file, "--resume", "train.max_iter=3")
    assert lazy_checkpoint(fcos_file)["trainer"]["iteration"] == 2

    nowhere = "distiller.MODEL_DISTILLER_CONFIG=nowhere.py"
    weights = f"train.init_checkpoint={folder}/model_final.pth"
    assert "AP" in run_lazy(fcos_file, "--eval-only", weights, nowhere)["bbox"]


def test_teacher_file_beside_a_lazy_config(fcos_file):
    text = fcos_file.read_text()
    fcos_file.write_text(text.replace(f"{fcos_file.parent}/fcos_teacher.py", "fcos_teacher.py"))
    run_lazy(fcos_file, "train.max_iter=1")
    assert TERMS < set(last_losses(fcos_file.parent / "output"))


def test_wrong_values_in_a_lazy_config(fcos_file):
    with pytest.raises(KeyError, match="GID.GI_MOD"):
        run_lazy(fcos_file, "+distiller.GID.GI_MOD=pos")
    with pytest.raises(ValueError, match="GID.GI_MODE is 'positive'"):
        run_lazy(fcos_file, "+distiller.GID.GI_MODE=positive")
    with pytest.raises(ValueError, match="GID.GI_POST_NMS_TOPK"):
        run_lazy(fcos_file, "+distiller.GID.GI_POST_NMS_TOPK=ten")


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
    run(line("train_distill.py", f"{SIX}L1_T_L1.yaml", *start))
    logged = last_losses("output/gid")
    assert TERMS < set(logged) and all(0 <= logged[name] < math.inf for name in TERMS)
    assert not checkpoint("output/gid")["distiller"]


@pytest.mark.slow
def test_commands_of_the_authors(checkout, weights):
    """Teacher, student alone, distillation, resume, evaluation."""
    train, distil, config = "train_baseline.py", "train_distill.py", f"{SIX}L1_T_L1.yaml"
    r50, r101 = (["MODEL.WEIGHTS", weights[depth], "OUTPUT_DIR"] for depth in (50, 101))
    run(line(train, "teacher/RetinaNet_Res101_1x.yaml", *r101, "output/RetinaNet_Res101_1x"))
    run(line(train, "student/RetinaNet_Res50_2x.yaml", *r50, "output/RetinaNet_Res50_2x"))
    run(line(distil, config, *r50, "output/gid"))
    run(line(distil, config, "--resume", *r50, "output/gid", options=SMALL))
    assert checkpoint("output/gid")["trainer"]["iteration"] == 1
    trained = ["MODEL.WEIGHTS", "output/gid/model_final.pth"]
    (lines,) = run(line(distil, config, "--eval-only", *trained))
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
    (lines,) = run(line("train_distill.py", config, "OUTPUT_DIR", "output/gid", *files))
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
        run(line(script, config, f"train.output_dir=output/{folder}", options=small))
    assert TERMS < set(last_losses("output/gid_fcos"))


# Wrong input.


WRONG = {
    "mode": (ValueError, {"GI_MODE": "positive"}, ["GID.GI_MODE is 'positive'", "'semi_pos'"]),
    "K": (ValueError, {"GI_POST_NMS_TOPK": 0}, ["GID.GI_POST_NMS_TOPK is 0", "at least 1"]),
    "order": (ValueError, {"IOU_THRESHOLDS": [0.5, 0.4]}, ["GID.IOU_THRESHOLDS is [0.5", "lower"]),
    "words": (ValueError, {"IOU_THRESHOLDS": ["a", "b"]}, ["GID.IOU_THRESHOLDS is ['a'", "numbers"]),
    "level": (KeyError, {"IN_FEATURES": ["p3", "p7"]}, ["GID.IN_FEATURES", "'p7'", "'p4'"]),
    "gap": (ValueError, {"IN_FEATURES": ["p2", "p4"]}, ["GID.IN_FEATURES", "'p4': 16", "twice"]),
    "kernel": (ValueError, {"ADAPTER_KERNEL_SIZE": 2}, ["GID.ADAPTER_KERNEL_SIZE is 2", "odd"]),
    "form": (ValueError, {"RESPONSE_CLS_MODE": "KL"}, ["GID.RESPONSE_CLS_MODE is 'KL'", "BCE"]),
    "rpn": (TypeError, {"PREDICTIONS": "rpn"}, ["GID.PREDICTIONS", "student", "RetinaNet", "dense"]),
    "weight": (ValueError, {"WEIGHT": -1.0}, ["MODEL.DISTILLER.GID", "WEIGHT -1.0"]),
}


@pytest.mark.parametrize("error, keys, messages", WRONG.values(), ids=list(WRONG))
def test_wrong_values(tmp_path, error, keys, messages):
    fails(gid_job(tmp_path, **keys), error, *messages)


def test_all_weights_are_zero(job):
    for key in [key for key in job.config.MODEL.DISTILLER.GID if key.endswith("_WEIGHT")]:
        job.config.MODEL.DISTILLER.GID[key] = 0.0
    fails(job, ValueError, "MODEL.DISTILLER.GID.FEATURE_WEIGHT", "four terms' weights above 0")


@pytest.mark.parametrize(
    "family, teacher, predictions, messages",
    [
        ("retinanet", "faster", "auto", ["teacher is a GeneralizedRCNN", "no dense()"]),
        ("faster", "retinanet", "auto", ["teacher is a RetinaNet", "no box_head()"]),
        (
            "faster",
            "faster",
            "dense",
            ["student is a GeneralizedRCNN", "rpn, anchors, score_boxes, box_head, own_proposals"],
        ),
    ],
)
def test_predictions_that_a_detector_has_not(tmp_path, family, teacher, predictions, messages):
    job = gid_job(tmp_path, family, PREDICTIONS=predictions)
    use_teacher(job, tiny_config(teacher))
    fails(job, TypeError, f"MODEL.DISTILLER.GID.PREDICTIONS is '{predictions}'", *messages)


def test_teacher_of_other_classes(job):
    teacher = tiny_config(width=16)
    teacher.MODEL.RETINANET.NUM_CLASSES = 7
    use_teacher(job, teacher)
    fails(job, ValueError, "GID", "student has 3 classes", "teacher 7", "MODEL.DISTILLER.TYPES")


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("ANCHOR_GENERATOR.SIZES", [[16.0], [32.0], [60.0]], "their anchors"),
        ("ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]], "their anchors"),
        ("RETINANET.BBOX_REG_WEIGHTS", [10.0, 10.0, 5.0, 5.0], "their box parametrization"),
    ],
)
def test_teacher_of_other_boxes(job, key, value, what):
    teacher = tiny_config(width=16)
    teacher.merge_from_list([f"MODEL.{key}", value])
    use_teacher(job, teacher)
    keys = ("MODEL.ANCHOR_GENERATOR", "BBOX_REG_WEIGHTS", "MODEL.DISTILLER.TYPES")
    fails(job, ValueError, "GID", what, *keys)


@pytest.mark.parametrize("value", ["'10'", "10.5", "ten"])
def test_number_that_is_none(job, value):
    """A key's type is its default's."""
    fails(job, ValueError, NODE + "GI_POST_NMS_TOPK", "int", opts=[NODE + "GI_POST_NMS_TOPK", value])
    job.text = f"MODEL: {{DISTILLER: {{GID: {{GI_POST_NMS_TOPK: {json.dumps(value)}}}}}}}\n"
    fails(job, ValueError, NODE + "GI_POST_NMS_TOPK", "int")


def test_unknown_key(job):
    fails(job, KeyError, NODE + "GI_NMS_THRESH'", opts=[NODE + "GI_NMS_TRESH", 0.5])
    job.text = "MODEL: {DISTILLER: {GID: {GI_NMS_TRESH: 0.5}}}\n"
    fails(job, KeyError, NODE + "GI_NMS_TRESH", job.config_file)
