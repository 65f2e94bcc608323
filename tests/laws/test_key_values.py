"""Law 10: a value of a config key that cannot work fails before anything is built, and the message names key,
value and what was expected; of every key of the tables by the rule that it has there, and of wrong input that
users brought."""

from __future__ import annotations

import functools
import math

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from distill_d2.config import add_distill_config, student_config
from distill_d2.engine.key_rules import Optimizer, check_keys, check_student_name, run_rules
from distill_d2.engine.setup import log_without_effect
from distill_d2.plugins import detectors
from distill_d2.rules import (
    Choice,
    Context,
    Flag,
    Integer,
    Levels,
    Number,
    Sequence,
    Text,
    Unused,
    check_model,
    faults,
)
from distill_d2.testing import distiller_config, tiny_config

WORD = "no such value"


def config(family="retinanet", **values):
    """A whole config, and some of its values, "__" for each point."""
    cfg = tiny_config(family) if family in ("retinanet", "faster", "mask") else FAMILIES[family]()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_train",)
    for key, value in values.items():
        put(cfg, key.replace("__", "."), value)
    return cfg


def put(cfg, key, value):
    *nodes, name = key.split(".")
    setattr(functools.reduce(getattr, nodes, cfg), name, value)


def cascade():
    cfg = tiny_config("faster")
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = "CascadeROIHeads", True
    return cfg


def keypoints():
    cfg = tiny_config("faster")
    cfg.MODEL.KEYPOINT_ON = True
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 17
    return cfg


def distilled():
    return distiller_config(tiny_config(), "teacher.yaml")


def panoptic():
    cfg = plain()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "PanopticFPN", "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3"]
    return cfg


def bottleneck():
    cfg = tiny_config()
    cfg.MODEL.BOTTLENECK.BACKBONE, cfg.MODEL.BACKBONE.NAME = (
        cfg.MODEL.BACKBONE.NAME,
        "build_bottleneck_backbone",
    )
    return cfg


def plain():
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg


def of_plugin(name):
    return detectors()[name].load_family().config(8)


PLUGINS = [name for name, each in detectors().items() if each.rules and each.family]
FAMILIES = {
    "cascade": cascade,
    "keypoints": keypoints,
    "distilled": distilled,
    "panoptic": panoptic,
    "bottleneck": bottleneck,
    **{name: functools.partial(of_plugin, name) for name in PLUGINS},
}


def wrong_values(rule, value):
    """Values that a rule excludes, given one that it allows."""
    if isinstance(rule, Number):
        values = [math.nan, math.inf, -math.inf, WORD, None, True, [1]]
        values += [1.5] * isinstance(rule, Integer)
        beyond = [(rule.at_least, -1), (rule.above, 0), (rule.at_most, 1), (rule.below, 0)]
        values += [bound + step for bound, step in beyond if bound is not None]
        return [each for each in values if all(each is not a and each != a for a in rule.also)]
    if isinstance(rule, Flag):
        return ["yes", 1, None]
    if isinstance(rule, Text):
        return [3, None, ["text"]] + [""] * (not rule.empty)
    if isinstance(rule, Choice):
        return [WORD, None, -7]
    if isinstance(rule, Optimizer):
        return [WORD, None, 7]
    if isinstance(rule, Levels):
        return ["p3", [], ["p99"], ["p2", "p2"], [3]]
    if isinstance(rule, Sequence):
        return wrong_sequences(rule, list(value) if isinstance(value, (list, tuple)) else [value])
    return ["another", not rule.default] if isinstance(rule, Unused) else []


def wrong_sequences(rule, value):
    values = [WORD, None, math.nan]
    values += [[each] for each in wrong_values(rule.item, value[0] if value else None)] * (
        not rule.count
    )
    values += [[]] * (rule.least > 0)
    values += [[*value, *value]] * ((rule.unique or rule.rising) and bool(value))
    values += [value[:-1]] * (bool(rule.count) and len(value) > 1)
    return values


@pytest.mark.parametrize("family", ["retinanet", "mask", *FAMILIES])
def test_a_value_that_a_rule_excludes(family):
    """Of every key that a run of this config reads: the config is right, each wrong value is refused by name."""
    cfg = config(family)
    context, rules = Context(student_config(cfg)), run_rules(cfg)
    assert list(faults(context, rules)) == []
    accepted = []
    for key, rule in rules.items():
        value = context.value(key)
        for wrong in wrong_values(rule, value):
            put(context.cfg, key, wrong)
            problems = list(faults(context, {key: rule}))
            if not (len(problems) == 1 and problems[0].startswith(f"{key} is {wrong!r}; expected ")):
                accepted.append((key, wrong, problems))
        put(context.cfg, key, value)
    assert accepted == []


def run(family, values):
    check_keys(config(family, **values))


# What a user wrote, and the words of the answer: config, values, words.
ROWS = [
    (
        "retinanet",
        {"MODEL__META_ARCHITECTURE": "RetinaNett"},
        ["MODEL.META_ARCHITECTURE", "'RetinaNet'"],
    ),
    ("retinanet", {"MODEL__META_ARCHITECTURE": "OneStageDetecto"}, ["'OneStageDetector'"]),
    ("faster", {"MODEL__PROPOSAL_GENERATOR__NAME": "RPM"}, ["MODEL.PROPOSAL_GENERATOR.NAME", "['RPN'"]),
    (
        "faster",
        {"MODEL__RPN__IN_FEATURES": ["p2", "p7"]},
        ["MODEL.RPN.IN_FEATURES", "'p2', 'p3', 'p4', 'p5', 'p6'"],
    ),
    ("retinanet", {"MODEL__PIXEL_STD": [1.0, 0.0, 1.0]}, ["MODEL.PIXEL_STD", "above 0"]),
    ("retinanet", {"INPUT__FORMAT": "L"}, ["MODEL.PIXEL_MEAN", "1 values", "MODEL.PIXEL_STD"]),
    ("retinanet", {"INPUT__FORMAT": "BRG"}, ["INPUT.FORMAT is 'BRG'", "'BGR'"]),
    (
        "retinanet",
        {"MODEL__ANCHOR_GENERATOR__SIZES": [[8.0], [16.0]]},
        ["ANCHOR_GENERATOR.SIZES", "one list, or 3"],
    ),
    ("retinanet", {"MODEL__ANCHOR_GENERATOR__SIZES": [[8], 16, 32]}, ["ANCHOR_GENERATOR.SIZES has 3"]),
    (
        "retinanet",
        {"MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator"},
        ["ANCHOR_GENERATOR.NAME", "'RRPN'"],
    ),
    ("retinanet", {"SOLVER__REFERENCE_WORLD_SIZE": 7}, ["SOLVER.REFERENCE_WORLD_SIZE is 7", "divisor"]),
    ("retinanet", {"MODEL__RETINANET__IOU_THRESHOLDS": [0.5, 0.4]}, ["none below the one before"]),
    ("retinanet", {"SOLVER__STEPS": (2, 2)}, ["SOLVER.STEPS", "each above the one before"]),
    ("retinanet", {"SOLVER__OPTIMIZER": "AdamX"}, ["SOLVER.OPTIMIZER", "'Adam'"]),
    (
        "retinanet",
        {"SOLVER__CLIP_GRADIENTS__CLIP_VALUE": -1.0},
        ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE is -1.0", "above 0"],
    ),
    ("retinanet", {"SOLVER__BACKBONE_LR_FACTOR": 0}, ["BACKBONE_LR_FACTOR is 0", "FREEZE_AT fixes"]),
    ("retinanet", {"SOLVER__LAYER_DECAY": 1.1}, ["SOLVER.LAYER_DECAY is 1.1", "at most 1"]),
    ("retinanet", {"SOLVER__BASE_LR": math.nan}, ["SOLVER.BASE_LR is nan; expected a finite number"]),
    (
        "retinanet",
        {"SOLVER__MAX_ITER": 0, "SEED": 1.5},
        ["SOLVER.MAX_ITER is 0", "SEED is 1.5", "2 values"],
    ),
    (
        "retinanet",
        {"SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER__BASE_LR_END": 1.0},
        ["SOLVER.BASE_LR_END is 1.0"],
    ),
    ("retinanet", {"SOLVER__NESTEROV": True, "SOLVER__MOMENTUM": 0.0}, ["SOLVER.NESTEROV", "MOMENTUM"]),
    (
        "retinanet",
        {"SOLVER__RESCALE_INTERVAL": True, "SOLVER__WARMUP_ITERS": 9},
        ["SOLVER.WARMUP_ITERS is 9"],
    ),
    ("retinanet", {"DATASETS__TRAIN": ("a", "b", "a")}, ["DATASETS.TRAIN", "none repeated"]),
    (
        "retinanet",
        {"DATALOADER__SAMPLER_TRAIN": "WeightedTrainingSampler"},
        ["one of ['TrainingSampler'"],
    ),
    ("retinanet", {"INPUT__MIN_SIZE_TRAIN": (0,)}, ["INPUT.MIN_SIZE_TRAIN is (0,)", "at least 1"]),
    ("retinanet", {"INPUT__MAX_SIZE_TRAIN": 32}, ["INPUT.MAX_SIZE_TRAIN is 32", "MIN_SIZE_TRAIN, 64"]),
    (
        "retinanet",
        {"INPUT__MIN_SIZE_TRAIN_SAMPLING": "range"},
        ["INPUT.MIN_SIZE_TRAIN is (64,)", "two numbers"],
    ),
    (
        "retinanet",
        {"INPUT__CROP__ENABLED": True, "INPUT__CROP__SIZE": [300, 300]},
        ["INPUT.CROP.SIZE", "at most 1"],
    ),
    (
        "retinanet",
        {"INPUT__CROP__ENABLED": True, "INPUT__CROP__SIZE": [0.9, 0.9], "INPUT__CROP__TYPE": "absolute"},
        ["INPUT.CROP.SIZE", "integers"],
    ),
    ("retinanet", {"INPUT__AUGMENTATIONS": "sdd"}, ["INPUT.AUGMENTATIONS", "the closest are ['ssd']"]),
    ("retinanet", {"TEST__AUG__ENABLED": True}, ["TEST.AUG.ENABLED is True", "tools/train_net.py"]),
    ("retinanet", {"TEST__DETECTIONS_PER_IMAGE": -1}, ["TEST.DETECTIONS_PER_IMAGE is -1"]),
    (
        "retinanet",
        {"DATASETS__TEST": (), "TEST__EXPECTED_RESULTS": [["bbox", "AP", 1.0, 1.0]]},
        ["DATASETS.TEST is empty"],
    ),
    ("keypoints", {"TEST__KEYPOINT_OKS_SIGMAS": [0.1]}, ["TEST.KEYPOINT_OKS_SIGMAS", "17 or 0 values"]),
    (
        "faster",
        {"MODEL__LOAD_PROPOSALS": True},
        ["DATASETS.PROPOSAL_FILES_TRAIN is ()", "1 values"],
    ),
    (
        "faster",
        {"DATASETS__PROPOSAL_FILES_TEST": ("f.pkl",)},
        ["DATASETS.PROPOSAL_FILES_TEST", "LOAD_PROPOSALS True"],
    ),
    (
        "faster",
        {"MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals"},
        ["MODEL.LOAD_PROPOSALS is False; expected True"],
    ),
    (
        "faster",
        {
            "MODEL__LOAD_PROPOSALS": True,
            "MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals",
            "DATASETS__PROPOSAL_FILES_TRAIN": ("nowhere.pkl",),
            "DATASETS__PROPOSAL_FILES_TEST": ("nowhere.pkl",),
        },
        ["DATASETS.PROPOSAL_FILES_TRAIN names 'nowhere.pkl'"],
    ),
    ("faster", {"MODEL__ROI_BOX_HEAD__NUM_FC": 0}, ["MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are 0"]),
    (
        "faster",
        {"MODEL__ROI_BOX_HEAD__USE_FED_LOSS": True},
        ["USE_SIGMOID_CE True", "class_image_count"],
    ),
    (
        "cascade",
        {"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": False},
        ["CLS_AGNOSTIC_BBOX_REG is False"],
    ),
    (
        "cascade",
        {"MODEL__ROI_BOX_CASCADE_HEAD__IOUS": (0.5, 0.6)},
        ["CASCADE_HEAD.BBOX_REG_WEIGHTS", "2 values"],
    ),
    (
        "cascade",
        {"MODEL__ROI_BOX_CASCADE_HEAD__IOUS": (0.4, 0.6, 0.7)},
        ["IOUS is (0.4, 0.6, 0.7); expected to start with 0.5"],
    ),
    (
        "panoptic",
        {"MODEL__RESNETS__DEPTH": 18},
        ["MODEL.BACKBONE.NAME", "MODEL.RESNETS.RES2_OUT_CHANNELS = 64"],
    ),
    ("retinanet", {"MODEL__RETINANET__NORM": "GN"}, ["MODEL.FPN.OUT_CHANNELS is 16", "multiple of 32"]),
    ("retinanet", {"MODEL__FPN__NORM": "GN"}, ["MODEL.BACKBONE.NAME", "divisible"]),
    ("panoptic", {"MODEL__FPN__IN_FEATURES": ["res2", "res9"]}, ["MODEL.BACKBONE.NAME", "res9"]),
    ("distilled", {"MODEL__DISTILLER__TYPES": ["PDK"]}, ["MODEL.DISTILLER.TYPES", "'PKD'"]),
    (
        "distilled",
        {"MODEL__DISTILLER__TASK_LOSS_WEIGHT": -1.0},
        ["MODEL.DISTILLER.TASK_LOSS_WEIGHT is -1.0"],
    ),
]


@pytest.mark.parametrize(
    "family, values, words", ROWS, ids=lambda row: "-".join(row) if isinstance(row, dict) else ""
)
def test_wrong_input(family, values, words):
    with pytest.raises(ValueError) as caught:
        run(family, values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "family, values",
    [
        ("retinanet", {"SOLVER__STEPS": (100, 200)}),  # beyond MAX_ITER: detectron2 warns
        ("retinanet", {"SOLVER__STEPS": (), "SOLVER__WARMUP_ITERS": 1000, "SOLVER__BASE_LR": 1}),
        ("retinanet", {"SOLVER__OPTIMIZER": "adamw", "SOLVER__WEIGHT_DECAY_BIAS": 0.0}),
        ("retinanet", {"SOLVER__CLIP_GRADIENTS__NORM_TYPE": math.inf}),
        ("retinanet", {"INPUT__MIN_SIZE_TRAIN": 64, "INPUT__MIN_SIZE_TEST": 0}),
        ("retinanet", {"INPUT__MIN_SIZE_TRAIN": (0,), "INPUT__MIN_SIZE_TEST": 0}),
        ("retinanet", {"MODEL__ANCHOR_GENERATOR__SIZES": [8, 16], "SOLVER__REFERENCE_WORLD_SIZE": 1}),
        ("retinanet", {"MODEL__RETINANET__FOCAL_LOSS_ALPHA": -1.0, "DATASETS__TEST": ()}),
        ("faster", {"TEST__DETECTIONS_PER_IMAGE": -1, "MODEL__RETINANET__NUM_CLASSES": 0}),  # not read
        ("mask", {"INPUT__MASK_FORMAT": "bitmask", "MODEL__RPN__CONV_DIMS": [-1, -1]}),
    ],
    ids=str,
)
def test_what_detectron2_accepts_stays_accepted(family, values):
    run(family, values)


def test_a_users_registration_counts():
    """Choices come from the registries when a config is checked."""

    @META_ARCH_REGISTRY.register()
    class MineOfKeyValues(RetinaNet):
        pass

    run("retinanet", {"MODEL__META_ARCHITECTURE": "MineOfKeyValues"})
    with pytest.raises(ValueError, match="MODEL.RETINANET.NUM_CLASSES is 0"):
        run(
            "retinanet",
            {"MODEL__META_ARCHITECTURE": "MineOfKeyValues", "MODEL__RETINANET__NUM_CLASSES": 0},
        )


def test_a_teachers_config_is_named():
    with pytest.raises(
        ValueError, match="^the teacher's config 't.yaml': MODEL.RETINANET.PRIOR_PROB is 2"
    ):
        check_model(config(MODEL__RETINANET__PRIOR_PROB=2.0), "the teacher's config 't.yaml'")


def test_a_students_name_is_told_under_its_own_key():
    cfg = config("distilled", MODEL__DISTILLER__STUDENT_META_ARCH="RetinaNett")
    with pytest.raises(
        ValueError, match="^MODEL.DISTILLER.STUDENT_META_ARCH is 'RetinaNett'; "
    ) as caught:
        check_student_name(cfg)
    assert "'RetinaNet'" in str(caught.value) and "Distiller'" not in str(caught.value)


@pytest.mark.parametrize("family, told", [("retinanet", ["MODEL.MASK_ON is True"]), ("mask", [])])
def test_masks_of_a_student_that_has_none(caplog, family, told):
    log_without_effect(config(family, MODEL__MASK_ON=True), distill=False)
    assert [line.partition(":")[0] for line in caplog.messages] == told
