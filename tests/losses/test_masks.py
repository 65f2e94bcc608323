"""Masks of objects: against the naive version, by hand, and at the borders."""

import math

import naive_defeat as naive
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.losses.masks import (
    anchor_mask,
    box_mask,
    cells_of_boxes,
    gaussian_mask,
    level_of_boxes,
    stage_mask,
)
from distill_d2.losses.object_masks import ObjectMasks
from distill_d2.testing.maps import view_of
from distill_d2.testing.tiny import tiny_detector
from distill_d2.views import Batch, DetectorView, build_view

SIZES = [(12, 20), (7, 9), (1, 6), (13, 1)]
STRIDES = (4, 8, 32)


def drawn_boxes(images):
    """N images' boxes, padded with a box that would be seen, and a mask of those to draw."""
    longest = max(1, *map(len, images))
    boxes = torch.tensor([[[0.0, 0, 1e4, 1e4]] * longest] * len(images))
    drawn = torch.zeros(len(images), longest, dtype=torch.bool)
    for image, found in enumerate(images):
        for slot, box in enumerate(found):
            boxes[image, slot], drawn[image, slot] = torch.tensor([float(x) for x in box]), True
    return boxes, drawn


def tensors(images):
    return [torch.tensor(boxes).float().view(-1, 4) for boxes in images]


def batch_of(images, padded):
    inputs = []
    for found in images:
        instances = Instances(padded, gt_boxes=Boxes(torch.tensor(found).float().view(-1, 4)))
        instances.gt_classes = torch.zeros(len(found), dtype=torch.int64)
        inputs.append({"image": torch.empty(3, *padded), "instances": instances})
    return Batch(inputs, padded, iteration=0, max_iter=1)


def random_images(seed, size, stride):
    """Boxes of all kinds, whole and fractional, inside, across, on and beyond the borders of a level."""
    random = np.random.default_rng(seed)
    height, width = size[0] * stride, size[1] * stride
    images = []
    for count in (random.integers(1, 9), 0, random.integers(1, 9), 4):
        x1, x2 = np.sort(random.uniform(-1.0, 2.0, (2, count)), axis=0) * width
        y1, y2 = np.sort(random.uniform(-1.0, 2.0, (2, count)), axis=0) * height
        boxes = np.stack([x1, y1, x2, y2], axis=1)
        kind = random.integers(0, 7, count)
        boxes[kind == 1] = np.round(boxes[kind == 1] / stride) * stride  # on the grid
        boxes[kind == 2, 2] = boxes[kind == 2, 0]  # no width
        boxes[kind == 3, 3] = boxes[kind == 3, 1]  # no height
        boxes[kind == 4, 2:] = boxes[kind == 4, :2] + random.uniform(0, stride / 2)  # about one cell
        boxes[kind == 5] = boxes[kind == 5].clip(0, [width, height] * 2)  # within, and on the border
        images.append(np.float32(boxes).tolist())
    return images


# Levels


@pytest.mark.parametrize(
    "x2, y2, level",
    [
        *((110, 110, 0), (110.9, 110.9, 0), (111, 111, 1), (111, 110, 0)),  # sides count x2 - x1 + 1
        *((222.9, 222.9, 1), (223, 223, 2), (446, 446, 2), (447, 447, 3)),
        *((0, 0, 0), (-1, 5, 0), (5000, 5000, 3), (27, 447, 1), (27, 446, 0)),  # 28 x 448 is 112 x 112
    ],
)
def test_level_by_hand(x2, y2, level):
    boxes = torch.tensor([[[0.0, 0, x2, y2], [30, 70, 30 + x2, 70 + y2]]])
    assert level_of_boxes(boxes, 4).tolist() == [[level, level]]


@pytest.mark.parametrize("scale", [56.0, 7.5])
def test_naive_levels(scale):
    random = np.random.default_rng(0)
    corner, sides = random.uniform(-50, 900, (300, 2)), np.exp(random.uniform(0, 7.5, (300, 2)))
    boxes = torch.tensor(np.hstack([corner, corner + sides])).float().view(3, 100, 4)
    found = level_of_boxes(boxes, 5, scale)
    expected = [[naive.level_of(box, 5, scale) for box in of_image] for of_image in boxes.tolist()]
    assert found.tolist() == expected and found.dtype == torch.int64
    assert set(found.flatten().tolist()) == {0, 1, 2, 3, 4}


# Cells of boxes


@pytest.mark.parametrize(
    "box, cells",
    [
        ([0, 0, 32, 24], (0, 0, 4, 3)),
        ([7.9, 8, 16.1, 23.9], (0, 1, 2, 2)),  # truncated; the last ones are left out
        ([9, 9, 14, 14], (1, 1, 2, 2)),  # inside one cell
        ([9, 1, 14, 23], (1, 0, 2, 1)),  # one cell of a long and thin box
        ([1, 9, 31, 9], (0, 1, 1, 2)),
        ([5, 5, 5, 5], (0, 0, 1, 1)),
        ([-20, -9, 9, 17], (0, 0, 1, 2)),
        ([-20, 0, -9, 16], (0, 0, -1, 2)),  # beside the level: none
        ([24, 16, 99, 99], (3, 2, 4, 3)),
        ([32, 0, 40, 16], (3, 0, 4, 1)),  # on the right border: the last column
        ([32, 24, 32, 24], (3, 2, 4, 3)),
        ([0, 24, 16, 24], (0, 2, 1, 3)),
        ([40, 0, 80, 16], (5, 0, 4, 2)),
    ],
)
def test_cells_by_hand(box, cells):
    """Of a level of 3 x 4 cells of 8 pixels: first column and row, column and row after the last."""
    found = cells_of_boxes(torch.tensor([[[float(x) for x in box]]]), (3, 4), 8)
    assert tuple(x.item() for x in found) == cells


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_naive_box_and_gaussian_masks(size, stride):
    for seed in range(12):
        images = random_images(seed, size, stride)
        found = box_mask(*drawn_boxes(images), size, stride)
        expected = naive.draw(tensors(images), size, lambda box: naive.box_marks(box, size, stride))
        assert torch.equal(found.double(), expected)
        found = gaussian_mask(*drawn_boxes(images), size, stride)
        expected = naive.draw(tensors(images), size, lambda box: naive.gaussian_marks(box, size, stride))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


# Gaussians


# Anchors


def anchors_of(size, stride):
    return naive.square_anchors({"p3": size}, {"p3": stride})["p3"]


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("size", [(6, 9), (1, 5)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.93])
def test_naive_anchor_masks(size, stride, threshold):
    anchors, seen = anchors_of(size, stride), set()
    for seed in range(5):
        images = random_images(seed, size, stride)
        found = anchor_mask(*drawn_boxes(images), anchors, threshold)
        expected = naive.draw(
            tensors(images), size, lambda box: naive.anchor_marks(box, anchors, threshold)
        )
        assert found.dtype == torch.float32 and torch.equal(found.double(), expected)
        seen.update(found.flatten().tolist())
    assert seen == {0.0, 1.0}


def test_a_box_that_no_anchor_overlaps_marks_nothing():
    anchors = anchors_of((4, 4), 8)
    outside, empty = [500, 0, 520, 30], [10, 10, 10, 20]
    for threshold in (0.0, 0.5):
        mask = anchor_mask(*drawn_boxes([[outside, empty], [outside]]), anchors, threshold)
        assert not mask.any()
        images = [[outside, [8, 8, 24, 24]], [[8, 8, 24, 24]]]
        first, second = anchor_mask(*drawn_boxes(images), anchors, threshold)
        assert torch.equal(first, second) and second.any()


# Backbone stages


@pytest.mark.parametrize("padded", [(32, 48), (33, 50), (3, 9)], ids=str)
def test_naive_stage_mask(padded):
    for seed in range(5):
        images = random_images(seed, (padded[0] // 3 + 1, padded[1] // 3 + 1), 3)
        found = stage_mask(batch_of(images, padded))
        assert torch.equal(found.double(), naive.stage_mask(tensors(images), padded))


# The masks of a step

LEVELS = {"p3": 8, "p4": 16, "p5": 32}
BY_SIZE = [[0, 0, 60, 60], [0, 0, 130, 130], [0, 0, 250, 250]]  # the first on p3, the second on p4, ...


class AnchorView(DetectorView):
    """A view of anchors alone."""

    offers = ("anchors",)
    of_level = {}

    @property
    def anchor_levels(self):
        return list(self.of_level)

    def anchors(self):
        return self.of_level


def anchor_view(anchors):
    view = AnchorView(view_of({"p3": torch.zeros(1, 1, 1, 1)}, "student").model, "student")
    view.of_level = anchors
    return view


def sizes_of(padded, strides=LEVELS):
    return {name: tuple(math.ceil(side / stride) for side in padded) for name, stride in strides.items()}


def found_masks(images, padded, kind="gt", strides=LEVELS, **options):
    sizes = sizes_of(padded, strides)
    student = anchor_view(naive.square_anchors(sizes, strides))
    return ObjectMasks(kind, **options)(student, batch_of(images, padded), sizes, strides)


@pytest.mark.parametrize("level_assign", ["single", "all"])
@pytest.mark.parametrize("kind", ["gt", "roi", "gaussian", "one"])
def test_naive_object_masks(kind, level_assign):
    for seed, padded in enumerate([(96, 160), (90, 100), (64, 70)]):
        images = random_images(seed, (padded[0] // 8, padded[1] // 8), 8)
        options = {"level_assign": level_assign, "finest_scale": 20.0, "threshold": 0.6}
        found = found_masks(images, padded, kind, **options)
        sizes = sizes_of(padded)
        anchors = naive.square_anchors(sizes, LEVELS)
        expected = naive.object_masks(kind, tensors(images), sizes, LEVELS, anchors, **options)
        assert found.keys() == expected.keys()
        for name, mask in found.items():
            assert mask.dtype == torch.float32 and not mask.requires_grad
            torch.testing.assert_close(mask.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_masks_of_anchors_on_a_larger_map_are_picked_from():
    """Where a student's map has one cell more, FeaturePairs gives it the size of the teacher's."""
    images, sizes = [BY_SIZE], {"p3": (32, 32)}
    anchors = naive.square_anchors({"p3": (33, 34)}, LEVELS)
    masks = ObjectMasks("roi", level_assign="all")
    found = masks(anchor_view(anchors), batch_of(images, (256, 256)), sizes, LEVELS)["p3"]
    larger = masks(anchor_view(anchors), batch_of(images, (256, 256)), {"p3": (33, 34)}, LEVELS)["p3"]
    assert found.shape == (1, 32, 32) and 0 < found.sum() < found.numel()
    rows, columns = ((torch.arange(32) * cells / 32).long() for cells in (33, 34))
    assert torch.equal(found[0], larger[0][rows][:, columns])


# Detectors

FAMILIES = {"retinanet": (3, 3), "fcos": (3, 1), "faster": (5, 3)}  # levels, anchors per cell


def observed(family, padded=(64, 96)):
    student = build_view(tiny_detector(family), "student")
    student.taps.start()
    student.model.backbone(torch.zeros(2, 3, *padded))
    return student


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_a_detectors_anchors(family):
    student = observed(family)
    ObjectMasks("roi").bind(student, student.strides, "KEY")
    anchors = student.anchors()
    levels, count = FAMILIES[family]
    sizes = {name: tuple(level.shape[-2:]) for name, level in student.features.items()}
    shapes = {name: tuple(boxes.shape) for name, boxes in anchors.items()}
    assert shapes == {name: (*size, count, 4) for name, size in sizes.items()} and len(sizes) == levels
    images = [[[3, 5, 30, 40], [50, 2, 90, 63]], [[10, 10, 25, 18]]]
    options = {"finest_scale": 16.0, "threshold": 0.4}
    found = ObjectMasks("roi", **options)(student, batch_of(images, (64, 96)), sizes, student.strides)
    expected = naive.object_masks("roi", tensors(images), sizes, student.strides, anchors, **options)
    assert any(mask.any() for mask in expected.values())
    for name, mask in found.items():
        assert torch.equal(mask.double(), expected[name])


def test_fcos_has_squares_of_8_strides():
    student = observed("fcos")
    points = student.model.anchor_generator(list(student.features.values()))
    for (name, anchors), boxes in zip(student.anchors().items(), points):
        stride = student.strides[name]
        anchors = anchors.flatten(0, 2)
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        assert torch.equal(centers, (boxes.tensor[:, :2] + boxes.tensor[:, 2:]) / 2)
        assert (anchors[:, 2:] - anchors[:, :2] == 8 * stride).all()


def test_a_student_without_anchors():
    student = view_of({"p3": torch.zeros(1, 1, 2, 2)}, "student")
    with pytest.raises(TypeError, match="the student is a MapDetector, which has no anchors"):
        ObjectMasks("roi").bind(student, ["p3"], "KEY")
    for kind in ("gt", "gaussian", "one"):
        ObjectMasks(kind).bind(student, ["p3"], "KEY")
        assert not student.required


def test_a_level_without_anchors():
    student = build_view(tiny_detector(), "student")
    with pytest.raises(ValueError) as error:
        ObjectMasks("roi").bind(student, ["p3", "res4", "p5"], "MODEL.DISTILLER.X.IN_FEATURES")
    message = str(error.value)
    assert message.startswith("MODEL.DISTILLER.X.IN_FEATURES: ")
    assert "['res4', 'p5']" in message and "['p2', 'p3', 'p4']" in message
