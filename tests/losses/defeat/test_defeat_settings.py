"""What DeFeat and FGFI refuse: values of several settings, and detectors that they cannot compare."""

import pytest
from defeat_case import ALL, HEAD, NECK, OFF
from detectron2.modeling import build_model

from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
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


@pytest.mark.parametrize("loss, node", [(DeFeat, "DEFEAT"), (FGFI, "FGFI")])
def test_levels_without_anchors(loss, node):
    settings = {"mask": "roi"} if loss is DeFeat else {}
    message = (
        rf"MODEL.DISTILLER.{node}.IN_FEATURES: .* none on the levels \['res4'\]; .*'p2', 'p3', 'p4'"
    )
    with pytest.raises(ValueError, match=message):
        bind("retinanet", "retinanet", loss, in_features=("p3", "res4"), **settings)
    bind("retinanet", "retinanet", loss, in_features=("p3",), **settings)


@pytest.mark.parametrize("proposals", ["teacher", "both"])
def test_dense_heads_have_no_proposals(proposals):
    message = f"MODEL.DISTILLER.DEFEAT.PROPOSALS is '{proposals}'; expected student"
    with pytest.raises(ValueError, match=message):
        bind("retinanet", "retinanet", **HEAD, proposals=proposals)


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_different_classes(family):
    cfg = tiny_config(family)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(ValueError, match="HEAD_CLS_W .* the student has 3 classes and the teacher 5"):
        bind(family, build_model(cfg), **HEAD)
    bind(family, build_model(cfg), **NECK)
