"""What DeFeat and FGFI refuse: values that cannot be, and detectors that they cannot compare."""

import math

import pytest
import torch
from defeat_case import ALL, HEAD, NECK, OFF, WEIGHTS
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from distill_d2 import add_distill_config
from distill_d2.losses import build_losses
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
from distill_d2.testing.maps import view_of
from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views import build_view

NOT_A_SIZE = (-0.1, math.inf, math.nan)

# Values

WRONG = [
    *((DeFeat, "mask", "all"), (DeFeat, "level_assign", "one"), (DeFeat, "loss_form", "l2")),
    *((DeFeat, "head_cls_rows", "fore"), (DeFeat, "predictions", "rpn"), (DeFeat, "proposals", "duo")),
    *((DeFeat, "decay", "step"), (DeFeat, "decay", "")),
    *((DeFeat, name, value) for name in (*WEIGHTS, "adapt_init_std") for value in NOT_A_SIZE),
    *((DeFeat, "finest_scale", value) for value in (0.0, *NOT_A_SIZE)),
    *((DeFeat, name, v) for name in ("head_cls_t", "head_cls_back_t") for v in (0.0, *NOT_A_SIZE)),
    *((loss, "roi_phi", v) for loss in (DeFeat, FGFI) for v in (-0.1, 1.0, 1.5, math.nan)),
    *((FGFI, "level_assign", "none"), (FGFI, "finest_scale", 0.0), (FGFI, "finest_scale", -56.0)),
    *((FGFI, "finest_scale", math.nan), (FGFI, "finest_scale", math.inf)),
    *((FGFI, "adapter_init_std", value) for value in NOT_A_SIZE),
    *((DeFeat, "adapt_kernel_size", value) for value in (0, 2, -1)),
    *((FGFI, "adapter_kernel_size", value) for value in (0, 2, -1)),
]


@pytest.mark.parametrize("loss, name, value", WRONG)
def test_wrong_value_is_named(loss, name, value):
    with pytest.raises(ValueError) as error:
        loss(**{name: value})
    message = f"MODEL.DISTILLER.{loss.NODE}.{name.upper()} is {value!r}; expected "
    assert str(error.value).startswith(message) and len(str(error.value)) > len(message)


@pytest.mark.parametrize("loss", [DeFeat, FGFI])
@pytest.mark.parametrize("name", ["weight", "warmup_iters"])
def test_wrong_schedule(loss, name):
    with pytest.raises(
        ValueError, match=rf"MODEL.DISTILLER.{loss.NODE}.{name.upper()} is -1; expected .*at least 0"
    ):
        loss(**{name: -1})


def test_some_weight_must_be_above_zero():
    with pytest.raises(ValueError, match="MODEL.DISTILLER.DEFEAT.HINT_NECK_W is 0.0; .* above 0"):
        DeFeat(**OFF)


@pytest.mark.parametrize("head_cls_rows", ["all", "correct", "cfore"])
def test_one_class_term_has_one_weight(head_cls_rows):
    message = "MODEL.DISTILLER.DEFEAT.HEAD_CLS_W is 0.0; .* HEAD_CLS_BACK_W is not its weight"
    for others in (OFF, NECK):
        with pytest.raises(ValueError, match=message):
            DeFeat(**{**others, "head_cls_rows": head_cls_rows, "head_cls_back_w": 1.0})
    DeFeat(**{**HEAD, "head_cls_rows": head_cls_rows, "head_cls_back_w": 0.0})
    DeFeat(**NECK, head_cls_rows=head_cls_rows)


EXTREMES = [
    *((DeFeat, {**OFF, weight: 1e-9}) for weight in WEIGHTS),
    *((DeFeat, {"roi_phi": 0.0}), (DeFeat, {"adapt_init_std": 0.0}), (DeFeat, {"finest_scale": 1e-9})),
    *((FGFI, {"roi_phi": 0.999}), (FGFI, {"adapter_init_std": 0.0}), (FGFI, {"weight": 0.0})),
]


@pytest.mark.parametrize("loss, settings", EXTREMES, ids=str)
def test_extreme_values_are_allowed(loss, settings):
    loss(**settings)


def test_every_key_reaches_the_loss():
    cfg = get_cfg()
    add_distill_config(cfg)
    node = cfg.MODEL.DISTILLER
    for loss in (DeFeat, FGFI):
        assert set(node[loss.NODE]) == {name.upper() for name in vars(loss.Settings())}
    values = {
        "IN_FEATURES": ["p4"],
        "HINT_NECK_W": 1.0,
        "HINT_NECK_BACK_W": 2.0,
        "MASK": "gaussian",
        "LEVEL_ASSIGN": "all",
        "FINEST_SCALE": 5.0,
        "ROI_PHI": 0.1,
        "LOSS_FORM": "L1",
        "NECK_ADAPT": False,
        "BB_FEATURES": ["res4"],
        "HINT_BB_W": 3.0,
        "HINT_BB_BACK_W": 4.0,
        "BB_ADAPT": True,
        "ADAPT_INIT_STD": 0.5,
        "HEAD_CLS_W": 5.0,
        "HEAD_CLS_BACK_W": 6.0,
        "HEAD_CLS_T": 7.0,
        "HEAD_CLS_BACK_T": 8.0,
        "HEAD_CLS_ROWS": "all",
        "PREDICTIONS": "box_head",
        "PROPOSALS": "both",
        "DECAY": "cos",
        "REFERENCE_BUGS": True,
        "ADAPT_KERNEL_SIZE": 1,
    }
    schedule = {"WEIGHT": 9.0, "START_ITER": 3, "STOP_ITER": 8, "WARMUP_ITERS": 2}
    node.merge_from_list(
        [x for pair in {**values, **schedule}.items() for x in ("DEFEAT." + pair[0], pair[1])]
    )
    assert set(values) | set(schedule) == set(node.DEFEAT)
    node.TYPES = ["DeFeat", "FGFI"]
    loss = build_losses(node)["DeFeat"]
    expected = {name.lower(): value for name, value in {**values, **schedule}.items()}
    assert vars(loss.settings) == expected
    masks = loss.masks
    found = masks.kind, masks.level_assign, masks.finest_scale, masks.threshold
    assert found == ("gaussian", "all", 5.0, 0.1)


# Detectors


def bind(student, teacher, loss=DeFeat, **settings):
    """The loss, bound to tiny detectors of two families, or to given ones."""
    models = [tiny_detector(x) if isinstance(x, str) else x for x in (student, teacher)]
    loss = loss(**settings)
    loss.bind(*(build_view(model, role) for model, role in zip(models, ("student", "teacher"))))
    return loss


@pytest.mark.parametrize("head_cls_rows", ["correct", "cfore"])
@pytest.mark.parametrize("predictions", ["auto", "dense"])
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_rows_of_dense_heads_have_no_classes(family, predictions, head_cls_rows):
    settings = {**HEAD, "head_cls_rows": head_cls_rows, "predictions": predictions}
    with pytest.raises(
        ValueError, match=f"DEFEAT.HEAD_CLS_ROWS is '{head_cls_rows}'; .*decouple or all"
    ):
        bind(family, family, **settings)
    bind(family, family, **{**settings, **NECK})  # no class term
    bind(family, family, **{**settings, "head_cls_rows": "all"})


@pytest.mark.parametrize("proposals", ["teacher", "both"])
def test_dense_heads_have_no_proposals(proposals):
    message = f"MODEL.DISTILLER.DEFEAT.PROPOSALS is '{proposals}'; expected student"
    with pytest.raises(ValueError, match=message):
        bind("retinanet", "retinanet", **HEAD, proposals=proposals)


@pytest.mark.parametrize(
    "family, predictions, capability",
    [
        *(("retinanet", "auto", "dense"), ("fcos", "auto", "dense"), ("retinanet", "dense", "dense")),
        *(("faster", "auto", "box_head"), ("mask", "auto", "box_head")),
        ("faster", "box_head", "box_head"),
    ],
)
def test_what_is_compared(family, predictions, capability):
    assert bind(family, family, **HEAD, predictions=predictions).capability == capability


UNLIKE = [
    ("retinanet", "faster", "auto", "the teacher is a GeneralizedRCNN, which has no dense"),
    ("faster", "retinanet", "auto", "the teacher is a RetinaNet, which has no box_head"),
    ("faster", "faster", "dense", "the student is a GeneralizedRCNN, which has no dense"),
    ("fcos", "fcos", "box_head", "the student is a FCOS, which has no box_head"),
]


@pytest.mark.parametrize("student, teacher, predictions, message", UNLIKE)
def test_heads_of_different_kinds(student, teacher, predictions, message):
    with pytest.raises(TypeError, match=f"MODEL.DISTILLER.DEFEAT.HEAD_CLS_W: {message}"):
        bind(student, teacher, **ALL, bb_features=("res3",), predictions=predictions)
    bind(student, teacher, **NECK, in_features=("p2", "p3", "p4"), predictions=predictions)


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_different_classes(family):
    cfg = tiny_config(family)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(ValueError, match="HEAD_CLS_W .* the student has 3 classes and the teacher 5"):
        bind(family, build_model(cfg), **HEAD)
    bind(family, build_model(cfg), **NECK)


def test_different_anchors_matter_to_dense_heads_alone():
    for family in ("retinanet", "faster"):
        cfg = tiny_config(family)
        sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[2 * size for size in of_level] for of_level in sizes]
        if family == "faster":
            bind(family, build_model(cfg), **HEAD)
            continue
        with pytest.raises(ValueError, match="HEAD_CLS_W .* dense predictions .* anchors differ"):
            bind(family, build_model(cfg), **HEAD)
        bind(family, build_model(cfg), **NECK, mask="roi")


def test_classes_of_proposals_do_not_care_for_box_parametrizations():
    cfg = tiny_config("faster")
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (2.0, 2.0, 3.0, 3.0)
    bind("faster", build_model(cfg), **HEAD)


@pytest.mark.parametrize("loss, node", [(DeFeat, "DEFEAT"), (FGFI, "FGFI")])
def test_levels_without_anchors(loss, node):
    settings = {"mask": "roi"} if loss is DeFeat else {}
    message = (
        rf"MODEL.DISTILLER.{node}.IN_FEATURES: .* none on the levels \['res4'\]; .*'p2', 'p3', 'p4'"
    )
    with pytest.raises(ValueError, match=message):
        bind("retinanet", "retinanet", loss, in_features=("p3", "res4"), **settings)
    bind("retinanet", "retinanet", loss, in_features=("p3",), **settings)


@pytest.mark.parametrize("loss, settings", [(DeFeat, {"mask": "roi"}), (FGFI, {})])
def test_a_student_without_anchors(loss, settings):
    views = [view_of({"p3": torch.zeros(1, 1, 2, 2)}, role) for role in ("student", "teacher")]
    with pytest.raises(TypeError, match="the student is a MapDetector, which has no anchors"):
        loss(**settings).bind(*views)


@pytest.mark.parametrize(
    "loss, key, settings",
    [
        (DeFeat, "DEFEAT.IN_FEATURES", {"in_features": ("p7",)}),
        (DeFeat, "DEFEAT.BB_FEATURES", {"hint_bb_w": 1.0, "bb_features": ("p7",)}),
        (FGFI, "FGFI.IN_FEATURES", {"in_features": ("p7",)}),
    ],
)
def test_unknown_levels(loss, key, settings):
    with pytest.raises(KeyError, match=f"MODEL.DISTILLER.{key}: .*no level 'p7'"):
        bind("retinanet", "retinanet", loss, **settings)


def test_a_teacher_without_its_own_proposals_or_a_box_head():
    with pytest.raises(TypeError, match="MODEL.DISTILLER.DEFEAT.HEAD_CLS_W: the teacher is a RetinaNet"):
        bind("faster", "retinanet", **HEAD, proposals="teacher", in_features=("p3",))
