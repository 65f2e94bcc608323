"""Predictions: one layout for the outputs of all heads."""

from dataclasses import replace

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear

from distill_d2.views import Predictions
from distill_d2.views.predictions import by_position, decoder_of, rows_of

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = ((4, 6), (2, 3), (1, 2))
ANCHORS, CLASSES = 3, 5
ROWS = ANCHORS * sum(height * width for height, width in SIZES)


def outputs(length, layout=torch.contiguous_format):
    """A head's outputs for two images, per level (2, A length, H, W)."""
    return [torch.randn(2, ANCHORS * length, *size).contiguous(memory_format=layout) for size in SIZES]


def boxes_of(*shape):
    corners = 40 * torch.rand(*shape, 2)
    return torch.cat([corners, corners + 5 + 20 * torch.rand(*shape, 2)], dim=-1)


def dense(logits=None, deltas=None):
    return Predictions(
        logit_levels=[by_position(level, CLASSES) for level in logits or outputs(CLASSES)],
        delta_levels=[by_position(level, 4) for level in deltas or outputs(4)],
        anchors=boxes_of(ROWS),
        decode=decoder_of(Box2BoxTransform((1.0, 1.0, 1.0, 1.0))),
        match=lambda boxes, valid: None,
    )


def scored(specific=True, rows=7):
    """Of a box head: proposals of two images, with a background class."""
    return Predictions(
        logit_levels=[torch.randn(2, rows, 1, CLASSES + 1)],
        delta_levels=[torch.randn(2, rows, 1, 4 * CLASSES if specific else 4)],
        anchors=boxes_of(2, rows),
        decode=decoder_of(Box2BoxTransform((10.0, 10.0, 5.0, 5.0))),
        match=lambda boxes, valid: None,
        background=True,
    )


# The layout.


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("length", [1, 4, CLASSES])
def test_by_position_by_loops(length, layout):
    for output in outputs(length, layout):
        level = by_position(output, length)
        height, width = output.shape[-2:]
        assert level.shape == (2, height * width, ANCHORS, length)
        for y in range(height):
            for x in range(width):
                for anchor in range(ANCHORS):
                    expected = output[:, anchor * length : (anchor + 1) * length, y, x]
                    assert torch.equal(level[:, y * width + x, anchor], expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_rows_of_all_levels(layout):
    logits, deltas = outputs(CLASSES, layout), outputs(4, layout)
    predictions = dense(logits, deltas)
    assert predictions.level_sizes == [72, 18, 6] and sum(predictions.level_sizes) == ROWS
    assert predictions.logits.shape == (2, ROWS, CLASSES) and predictions.deltas.shape == (2, ROWS, 4)
    # Row 72 + 3 (3 y + x) + a of the second level.
    row = 72 + 3 * (3 * 1 + 2) + 1
    assert torch.equal(predictions.logits[:, row], logits[1][:, CLASSES : 2 * CLASSES, 1, 2])
    assert torch.equal(predictions.deltas[:, row], deltas[1][:, 4:8, 1, 2])
    assert torch.equal(rows_of(predictions.logit_levels), predictions.logits)


def test_logits_by_the_name_of_the_level():
    predictions = replace(dense(), level_names=("p3", "p4", "p5"))
    assert list(predictions.logits_by_level) == ["p3", "p4", "p5"]
    assert predictions.logits_by_level["p4"] is predictions.logit_levels[1]
    assert scored().logits_by_level == {}


# Classes.


def test_best_class_is_never_the_background():
    predictions = scored()
    predictions.logit_levels[0][..., -1] = 100.0
    predictions.logit_levels[0][0, 4, 0, 2] = 50.0
    best = predictions.best_class()
    assert best[0, 4] == 2 and best.max() < CLASSES
    assert torch.equal(best, predictions.logits[..., :CLASSES].argmax(dim=2))


def test_deltas_of_given_classes():
    predictions = scored()
    classes = torch.randint(0, CLASSES, (2, 7))
    deltas = predictions.deltas_of(classes)
    assert predictions.class_specific and deltas.shape == (2, 7, 4)
    for image in range(2):
        for row in range(7):
            first = 4 * classes[image, row]
            expected = predictions.delta_levels[0][image, row, 0, first : first + 4]
            assert torch.equal(deltas[image, row], expected)
    with pytest.raises(ValueError, match="each class has its own deltas"):
        predictions.deltas_of(None)


@pytest.mark.parametrize("predictions", [dense, lambda: scored(specific=False)])
def test_deltas_that_classes_share(predictions):
    predictions = predictions()
    assert not predictions.class_specific
    assert torch.equal(predictions.deltas_of(None), predictions.deltas)
    assert torch.equal(predictions.deltas_of(predictions.best_class()), predictions.deltas)


# Boxes.


@pytest.mark.parametrize(
    "transform",
    [Box2BoxTransform((1.0, 2.0, 3.0, 4.0)), Box2BoxTransformLinear(), Box2BoxTransformLinear(False)],
    ids=["RetinaNet", "FCOS", "FCOS without sizes"],
)
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 5)])
def test_decoder_of_any_number_of_dimensions(transform, shape):
    deltas, anchors = torch.randn(*shape, 4), boxes_of(*shape)
    expected = transform.apply_deltas(deltas.view(-1, 4), anchors.view(-1, 4)).view(*shape, 4)
    decode = decoder_of(transform)
    assert torch.equal(decode(deltas, anchors), expected)
    transposed = deltas.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(decode(transposed, anchors), expected)


@pytest.mark.parametrize("specific", [True, False])
def test_boxes_of_the_best_class_of_proposals(specific):
    predictions = scored(specific)
    boxes, best = predictions.boxes(), predictions.best_class()
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    for image in range(2):
        each = transform.apply_deltas(predictions.deltas[image], predictions.anchors[image])
        if specific:
            each = each.view(7, CLASSES, 4)[torch.arange(7), best[image]]
        torch.testing.assert_close(boxes[image], each)
    assert best.unique().numel() > 1
