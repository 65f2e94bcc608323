"""Matching on a whole batch gives detectron2's labels, and waits for no device."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from recorded import detector

from distill_d2.testing.synchronization import no_synchronization
from distill_d2.views import build_view
from distill_d2.views.matching import (
    batched_ioa,
    batched_iou,
    match_by_iou,
    rows_inside,
)

MATCHERS = {
    "RetinaNet": ([0.4, 0.5], [0, -1, 1], True),
    "RPN": ([0.3, 0.7], [0, -1, 1], True),
    "ROI heads": ([0.5], [0, 1], False),
    "others ignored": ([0.2, 0.6], [-1, 0, 1], False),
    "four ranges": ([0.1, 0.3, 0.5], [0, -1, 0, 1], True),
}
SQUARE = torch.tensor([0.0, 0.0, 10.0, 10.0])


def random_boxes(*shape, size=64):
    """On whole pixels, so that there are equal overlaps."""
    corners = torch.randint(0, size - 8, (*shape, 2))
    return torch.cat([corners, corners + torch.randint(8, size // 2, (*shape, 2))], dim=-1).float()


def grid(stride, side, size=64):
    """Square anchors on a grid, many of which overlap a box equally."""
    x, y = torch.meshgrid(*2 * [torch.arange(0, size, stride).float()], indexing="xy")
    center = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return torch.cat([center - side / 2, center + side / 2], dim=1)


def labels_one_by_one(matcher, boxes, valid, rows):
    """detectron2's Matcher, image by image."""
    labels = []
    for image, (per_image, there) in enumerate(zip(boxes, valid)):
        own = rows if rows.dim() == 2 else rows[image]
        labels.append(matcher(pairwise_iou(Boxes(per_image[there]), Boxes(own)))[1])
    return torch.stack(labels)


def everything(count):
    return torch.ones(1, count, dtype=torch.bool)


def case(images=4, most=6):
    """Boxes of some images, of which the last has none."""
    valid = torch.arange(most) < torch.tensor([[most], [3], [1], [0]])[:images]
    return random_boxes(images, most), valid


# Against detectron2's Matcher.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shared", [True, False], ids=["anchors", "proposals"])
@pytest.mark.parametrize("settings", MATCHERS.values(), ids=list(MATCHERS))
def test_labels(settings, shared, seed):
    """Of anchors of all images, with ties, and of proposals that differ between images."""
    torch.manual_seed(seed)
    matcher, (boxes, valid) = Matcher(*settings), case()
    if shared:
        rows = torch.cat([grid(4, 12), grid(8, 24), grid(16, 48)])
        # A slot without a box may hold anything: the best of boxes, for example.
        boxes = torch.where(valid[..., None], boxes, rows[100])
    else:
        rows = torch.cat([random_boxes(4, 50), boxes + torch.randint(-2, 3, boxes.shape)], dim=1)
    expected = labels_one_by_one(matcher, boxes, valid, rows)
    actual = match_by_iou(matcher, boxes, valid, rows)
    assert actual.dtype == torch.int8 and torch.equal(actual, expected)
    assert (expected[3] == settings[1][0]).all()
    if shared:
        assert set(expected.unique().tolist()) == set(settings[1])
    else:
        assert (expected[:3] == 1).any(dim=1).all()


# Where there is no overlap.


def test_a_box_that_overlaps_nothing_matches_nothing():
    """There alone detectron2's Matcher differs: it takes all rows for the box's best."""
    boxes, rows = SQUARE[None, None], torch.tensor([[20.0, 0.0, 30.0, 10.0], [10.0, 0.0, 20.0, 10.0]])
    matcher = Matcher([0.3, 0.7], [0, -1, 1], True)
    assert match_by_iou(matcher, boxes, everything(1), rows).tolist() == [[0, 0]]
    assert labels_one_by_one(matcher, boxes, everything(1), rows).tolist() == [[1, 1]]


@pytest.mark.parametrize("settings", MATCHERS.values(), ids=list(MATCHERS))
def test_boxes_and_rows_without_area_match_nothing(settings):
    point = torch.tensor([5.0, 5.0, 5.0, 5.0])
    boxes = torch.stack([point, SQUARE])[None]
    rows = torch.stack([point, SQUARE, torch.zeros(4)])
    labels = match_by_iou(Matcher(*settings), boxes, everything(2), rows)
    assert labels.tolist() == [[settings[1][0], 1, settings[1][0]]]


# Other measures.


def test_measures_are_detectron2s():
    boxes, others = random_boxes(7), random_boxes(9)
    iou = pairwise_iou(Boxes(boxes), Boxes(others))
    ioa = pairwise_ioa(Boxes(others), Boxes(boxes)).T  # of the second argument's area
    assert torch.equal(batched_iou(boxes, others), iou) and torch.equal(batched_ioa(boxes, others), ioa)
    assert (iou > 0).any() and (iou == 0).any()
    assert batched_iou(torch.zeros(1, 4), torch.zeros(1, 4)).isnan().all()


# Rows inside.


def inside_one_by_one(boxes, valid, rows):
    result = torch.zeros(len(boxes), rows.shape[-2], dtype=torch.bool)
    for image in range(len(boxes)):
        for index, row in enumerate((rows if rows.dim() == 2 else rows[image]).tolist()):
            x, y = (row[0] + row[2]) / 2, (row[1] + row[3]) / 2
            for box, there in zip(boxes[image].tolist(), valid[image].tolist()):
                if there and box[0] < x < box[2] and box[1] < y < box[3]:
                    result[image, index] = True
    return result


@pytest.mark.parametrize("shared", [True, False])
def test_rows_inside(shared):
    boxes, valid = case()
    rows = grid(4, 8) if shared else random_boxes(4, 200)
    expected = inside_one_by_one(boxes, valid, rows)
    assert torch.equal(rows_inside(boxes, valid, rows), expected)
    assert expected[0].any() and not expected[0].all() and not expected[3].any()


# FCOS' own rule.


def fcos_case():
    model = detector("fcos")
    sizes = {"p2": 16, "p3": 8, "p4": 4}
    anchors = model.anchor_generator([torch.empty(1, 1, side, side) for side in sizes.values()])
    boxes, valid = case(most=5)
    # Sizes of all levels: p2 up to 32 pixels, p3 up to 64, p4 from 64.
    boxes[0, 0] = torch.tensor([1.0, 2.0, 63.0, 62.0])
    boxes[0, 1] = torch.tensor([4.0, 4.0, 50.0, 50.0])
    return build_view(model, "student"), anchors, boxes, valid


@pytest.mark.parametrize("seed", range(5))
def test_fcos_labels_are_the_models_own(seed):
    torch.manual_seed(seed)
    view, anchors, boxes, valid = fcos_case()
    boxes = torch.where(valid[..., None], boxes, boxes[0, 1])  # slots without a box hold a good one
    truth = []
    for per_image, there in zip(boxes, valid):
        instances = Instances((64, 64), gt_boxes=Boxes(per_image[there]))
        instances.gt_classes = torch.zeros(int(there.sum()), dtype=torch.int64)
        truth.append(instances)
    expected = torch.stack(view.model.label_anchors(anchors, truth)[0]) != view.num_classes
    actual = view._match(boxes, valid, anchors)
    assert actual.dtype == torch.int8 and torch.equal(actual, expected.to(torch.int8))
    assert expected[0].any() and not expected[3].any()


# Law 7.


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x[0].item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.clone().masked_select(x > 0),
        lambda x: x.clone().__setitem__(x > 0, torch.zeros(2)),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
    ],
    ids=["item", "bool", "nonzero", "mask", "masked_select", "set by mask", "tolist", "cpu"],
)
def test_the_guard_sees_what_waits(waits):
    with pytest.raises(AssertionError), no_synchronization():
        waits(torch.tensor([1.0, 2.0]))
