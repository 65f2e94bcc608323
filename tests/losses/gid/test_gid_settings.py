"""What GID refuses: values of several settings, and detectors that it cannot compare."""

import pytest
from detectron2.modeling import build_model
from gid_case import EVEN, OFF, only

from distill_d2.losses.gid import GID
from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views import build_view

# Values


@pytest.mark.parametrize(
    "value", [(0.5, 0.4), (0.4,), (0.4, 0.5, 0.6), (-0.1, 0.5), (0.4, 1.1)], ids=str
)
def test_wrong_thresholds(value):
    with pytest.raises(ValueError, match="MODEL.DISTILLER.GID.IOU_THRESHOLDS is .*; expected "):
        GID(iou_thresholds=value)
    GID(iou_thresholds=(0.5, 0.5))


def test_some_weight_must_be_above_zero():
    with pytest.raises(ValueError, match="MODEL.DISTILLER.GID.FEATURE_WEIGHT is 0.0; .* above 0"):
        GID(**OFF)
    for weight in OFF:
        GID(**{**OFF, weight: 1e-9})


# Detectors


def bind(student, teacher, **settings):
    GID(**settings).bind(build_view(student, "student"), build_view(teacher, "teacher"))


def with_classes(family, count):
    cfg = tiny_config(family)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = count
    return build_model(cfg)


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_different_classes(family):
    student, teacher = tiny_detector(family), with_classes(family, 5)
    with pytest.raises(ValueError, match="GID .* the student has 3 classes and the teacher 5"):
        bind(student, teacher)
    bind(student, teacher, gi_mode="gt", **only("feature", "relation"))


def test_classes_do_not_matter_to_the_rpn():
    bind(tiny_detector("faster"), with_classes("faster", 5), predictions="rpn")


@pytest.mark.parametrize("family, predictions", [("retinanet", "dense"), ("faster", "rpn")])
def test_different_anchors(family, predictions):
    cfg = tiny_config(family)
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[2 * size for size in of_level] for of_level in sizes]
    student, teacher = tiny_detector(family), build_model(cfg)
    with pytest.raises(ValueError, match=f"GID .* the {predictions} predictions .* anchors differ"):
        bind(student, teacher, predictions=predictions)
    bind(student, teacher, gi_mode="gt", **only("feature"))


@pytest.mark.parametrize(
    "node, family, predictions",
    [
        ("RPN", "faster", "rpn"),
        ("ROI_BOX_HEAD", "faster", "box_head"),
        ("RETINANET", "retinanet", "dense"),
    ],
)
def test_different_box_parametrization(node, family, predictions):
    cfg = tiny_config(family)
    cfg.MODEL[node].BBOX_REG_WEIGHTS = (2.0, 2.0, 3.0, 3.0)
    with pytest.raises(
        ValueError, match=f"the {predictions} predictions .* box parametrizations differ"
    ):
        bind(tiny_detector(family), build_model(cfg), predictions=predictions)


@pytest.mark.parametrize("names", [("p2", "p4"), ("p2", "p3", "res3"), ("p2", "res2")], ids=str)
def test_strides_that_do_not_double(names):
    with pytest.raises(ValueError, match="MODEL.DISTILLER.GID.IN_FEATURES: the levels have strides"):
        bind(tiny_detector(), tiny_detector(), in_features=names)


UNLIKE = [
    ("retinanet", "faster", "auto", "the teacher is a GeneralizedRCNN, which has no dense"),
    ("faster", "retinanet", "auto", "the teacher is a RetinaNet, which has no box_head"),
    ("faster", "retinanet", "rpn", "the teacher is a RetinaNet, which has no rpn"),
    ("faster", "mask", "dense", "the student is a GeneralizedRCNN, which has no dense"),
    ("fcos", "fcos", "box_head", "the student is a FCOS, which has no box_head"),
    ("retinanet", "retinanet", "rpn", "the student is a RetinaNet, which has no rpn"),
]


@pytest.mark.parametrize("student, teacher, predictions, message", UNLIKE)
def test_detectors_without_such_predictions(student, teacher, predictions, message):
    with pytest.raises(TypeError, match=message):
        bind(tiny_detector(student), tiny_detector(teacher), predictions=predictions)


@pytest.mark.parametrize(
    "family, predictions, capability",
    [
        *(("retinanet", "auto", "dense"), ("fcos", "auto", "dense"), ("fcos", "dense", "dense")),
        *(("faster", "auto", "box_head"), ("mask", "auto", "box_head"), ("faster", "rpn", "rpn")),
    ],
)
def test_what_is_compared(family, predictions, capability):
    views = [build_view(tiny_detector(family), role) for role in ("student", "teacher")]
    loss = GID(predictions=predictions, **EVEN)
    loss.bind(*views)
    assert loss.capability == capability
    assert all(view.required == {capability} for view in views)
