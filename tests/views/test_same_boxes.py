"""Predictions are compared row by row only where both detectors have the same rows."""

import pytest
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from recorded import detector, detector_from_p3

from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views import build_view, require_same_boxes

WEIGHTS = (2.0, 2.0, 1.0, 1.0)
FCOS_LIKE = ("ANCHOR_GENERATOR.SIZES", [[4.0], [8.0], [16.0]], "ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
TWO_SIZES = ("ANCHOR_GENERATOR.SIZES", [[32.0], [64.0]])
RETINANET, FASTER = ("retinanet", "dense"), ("faster", "rpn")
BOX_HEAD = ("faster", "box_head")


def configured(family, *options):
    """A detector with these keys of MODEL."""
    cfg = tiny_config(family)
    cfg.merge_from_list([f"MODEL.{o}" if isinstance(o, str) else o for o in options])
    return build_model(cfg)


def check(student, teacher, capability):
    require_same_boxes(build_view(student, "student"), build_view(teacher, "teacher"), capability, "KD")


@pytest.mark.parametrize("family, capability", [RETINANET, ("fcos", "dense"), FASTER, BOX_HEAD])
def test_equal_ones_pass(family, capability):
    """Whatever the sizes of the networks."""
    check(detector(family), tiny_detector(family, width=16, channels=24), capability)


@pytest.mark.parametrize(
    "family, capability, options",
    [
        (*RETINANET, ("RETINANET.NUM_CLASSES", 5)),
        (*RETINANET, ("RETINANET.IOU_THRESHOLDS", [0.3, 0.6])),
        # Those of the box head are the proposals.
        (*BOX_HEAD, ("ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]], "RPN.BBOX_REG_WEIGHTS", WEIGHTS)),
    ],
)
def test_what_else_differs_does_not_matter(family, capability, options):
    check(configured(family), configured(family, *options), capability)


@pytest.mark.parametrize(
    "family, capability, options",
    [
        (*RETINANET, ("ANCHOR_GENERATOR.SIZES", [[16.0], [32.0], [48.0]])),
        (*RETINANET, ("ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 3.0]])),
        (*RETINANET, ("ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]])),
        (*RETINANET, ("ANCHOR_GENERATOR.OFFSET", 0.5)),
        (*RETINANET, ("RETINANET.IN_FEATURES", ["p2", "p3"], *TWO_SIZES)),
        (*FASTER, ("ANCHOR_GENERATOR.SIZES", [[8.0], [16.0], [32.0], [64.0], [96.0]])),
    ],
    ids=["sizes", "ratios", "number of anchors", "offset", "number of levels", "rpn"],
)
def test_anchors_that_differ(family, capability, options):
    message = rf"^KD compares the {capability} predictions .* their anchors differ: "
    with pytest.raises(ValueError, match=message):
        check(configured(family), configured(family, *options), capability)


def test_message_has_the_numbers():
    """24 anchors of 3 levels with 2 x 2 positions and 2 each, 12 with 1 each."""
    student = configured("retinanet", "ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0, 4.0]])
    teacher = configured("retinanet", "ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
    message = (
        r"the student has 24 boxes, from \[-8\.0, -8\.0, 8\.0, 8\.0\] to \[0\.0, -48\.0, 32\.0, 80\.0\], "
        r"the teacher 12 boxes, from \[-8\.0, -8\.0, 8\.0, 8\.0\] to \[-16\.0, -16\.0, 48\.0, 48\.0\]\..*"
        r"MODEL\.ANCHOR_GENERATOR.*MODEL\.DISTILLER\.TYPES"
    )
    with pytest.raises(ValueError, match=message):
        check(student, teacher, "dense")


def test_levels_that_differ():
    """As many levels, anchors of the same size, but another stride."""
    student = configured("retinanet", "RETINANET.IN_FEATURES", ["p2", "p3"], *TWO_SIZES)
    with pytest.raises(ValueError, match="their anchors differ"):
        check(student, detector_from_p3(), "dense")
    check(detector_from_p3(), detector_from_p3(), "dense")


def test_retinanet_and_fcos():
    """Their anchors differ, or else their parametrizations, which may differ between two FCOS, too."""
    fcos, other = detector("fcos"), detector("fcos")
    with pytest.raises(ValueError, match="their anchors differ"):
        check(detector("retinanet"), fcos, "dense")
    other.box2box_transform = Box2BoxTransformLinear(normalize_by_size=False)
    for model in (configured("retinanet", *FCOS_LIKE, "ANCHOR_GENERATOR.OFFSET", 0.5), other):
        with pytest.raises(ValueError, match="their box parametrizations differ"):
            check(model, fcos, "dense")


@pytest.mark.parametrize(
    "family, capability, key",
    [
        (*RETINANET, "RETINANET.BBOX_REG_WEIGHTS"),
        (*FASTER, "RPN.BBOX_REG_WEIGHTS"),
        (*BOX_HEAD, "ROI_BOX_HEAD.BBOX_REG_WEIGHTS"),
    ],
)
def test_box_weights_that_differ(family, capability, key):
    message = rf"^KD compares the {capability} .* their box parametrizations differ.*BBOX_REG_WEIGHTS"
    with pytest.raises(ValueError, match=message):
        check(configured(family), configured(family, key, WEIGHTS), capability)
    check(configured(family, key, WEIGHTS), configured(family, key, WEIGHTS), capability)
