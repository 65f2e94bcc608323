"""What DeFeat and FGFI refuse: values of several settings, and detectors that they cannot compare."""

import pytest
import torch
from defeat_case import ALL, HEAD, NECK, OFF
from detectron2.modeling import build_model

from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
from distill_d2.testing.maps import view_of
from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views import build_view


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
