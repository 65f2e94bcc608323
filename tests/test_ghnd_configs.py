"""configs/Distillation-GHND: a student is its teacher but for the first stage."""

from pathlib import Path

import pytest
from detectron2 import model_zoo as detectron2_zoo

from distill_d2.config_values import config_keys
from distill_d2.engine import load_config

FOLDER = "Distillation-GHND"
ZOO = {
    "faster_rcnn_R_50_FPN_ghnd": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "mask_rcnn_R_50_FPN_ghnd": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "keypoint_rcnn_R_50_FPN_ghnd": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
}
TORCHVISION = [f"torchvision_{name}" for name in ZOO]
# What is meant to differ: the backbone and what is distilled; MODEL.WEIGHTS. Of tasks that are off.
DIFFERS = ("BACKBONE.", "BOTTLENECK.", "DISTILLER.", "WEIGHTS")
TASKS = {"MASK_ON": "ROI_MASK_HEAD.", "KEYPOINT_ON": "ROI_KEYPOINT_HEAD."}


def packaged(name):
    return load_config(f"{FOLDER}/{name}.yaml")


def values(node):
    """All values of a node by dotted name, those of tasks that are off left out."""
    found = {}
    for key in config_keys(node):
        value = node
        for part in key.split("."):
            value = value[part]
        if not hasattr(value, "items"):
            found[key] = list(value) if isinstance(value, (list, tuple)) else value
    off = tuple(prefix for task, prefix in TASKS.items() if not found[task])
    return {k: v for k, v in found.items() if not k.startswith((*DIFFERS, *off))}


@pytest.mark.parametrize("name", [*ZOO, *TORCHVISION])
def test_student_is_its_teacher_but_for_the_first_stage(name):
    student = packaged(name)
    node = student.MODEL.DISTILLER
    if node.MODEL_LOAD_OFFICIAL:
        assert node.MODEL_DISTILLER_CONFIG == ZOO[name]
        teacher = detectron2_zoo.get_config(ZOO[name])
        # Losses of heads, which are not trained.
        teacher.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = student.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA
        teacher.MODEL.RPN.POST_NMS_TOPK_TRAIN = student.MODEL.RPN.POST_NMS_TOPK_TRAIN
    else:
        assert Path(node.MODEL_DISTILLER_CONFIG).name == f"{name[: -len('_ghnd')]}.yaml"
        teacher = load_config(node.MODEL_DISTILLER_CONFIG)
    found, expected = values(student.MODEL), values(teacher.MODEL)
    assert {key: found.get(key) for key in expected} == expected
    assert student.INPUT.FORMAT == teacher.INPUT.FORMAT
    assert tuple(student.DATASETS.TEST) == tuple(teacher.DATASETS.TEST)
    assert student.MODEL.BACKBONE.NAME == "build_bottleneck_backbone"
    assert student.MODEL.BOTTLENECK.BACKBONE == teacher.MODEL.BACKBONE.NAME


@pytest.mark.parametrize("name", [*ZOO, *TORCHVISION])
def test_official_schedule(name):
    cfg = packaged(name)
    solver, node = cfg.SOLVER, cfg.MODEL.DISTILLER
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.GAMMA) == ("Adam", 1e-3, 0.1)
    assert solver.WARMUP_ITERS == 0
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS) == (0, 0, None)
    assert not solver.CLIP_GRADIENTS.ENABLED and solver.IMS_PER_BATCH == 12
    epoch = solver.CHECKPOINT_PERIOD
    epochs = (9, 27, 35) if cfg.MODEL.KEYPOINT_ON else (5, 15, 20)
    assert [*solver.STEPS, solver.MAX_ITER] == [count * epoch for count in epochs]
    assert cfg.TEST.EVAL_PERIOD == epoch
    assert (list(node.TYPES), node.TASK_LOSS_WEIGHT, cfg.MODEL.BACKBONE.FREEZE_AT) == (["GHND"], 0.0, 0)
    assert list(node.GHND.IN_FEATURES) == ["res2", "res3", "res4", "res5"]
    assert cfg.MODEL.BOTTLENECK.CHANNELS == 3 and cfg.MODEL.BOTTLENECK.QUANT_BITS == 0
