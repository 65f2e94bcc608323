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
        anchors = rows if rows.dim() == 2 else rows[image]
        labels.append(matcher(pairwise_iou(Boxes(per_image[there]), Boxes(anchors)))[1])
    return torch.stack(labels)


def everything(count):
    return torch.ones(1, count, dtype=torch.bool)


def case(images=4, most=6):
    """Boxes of some images, of which the last has none."""
    valid = torch.arange(most) < torch.tensor([[most], [3], [1], [0]])[:images]
    return random_boxes(images, most), valid


# Against detectron2's Matcher.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", MATCHERS.values(), ids=list(MATCHERS))
def test_labels_of_anchors(settings, seed):
    torch.manual_seed(seed)
    matcher, (boxes, valid) = Matcher(*settings), case()
    rows = torch.cat([grid(4, 12), grid(8, 24), grid(16, 48)])
    # A slot without a box may hold anything: the best of boxes, for example.
    boxes = torch.where(valid[..., None], boxes, rows[100])
    expected = labels_one_by_one(matcher, boxes, valid, rows)
    actual = match_by_iou(matcher, boxes, valid, rows)
    assert actual.dtype == torch.int8
    assert torch.equal(actual, expected)
    assert set(expected.unique().tolist()) == set(settings[1])
    assert (expected[3] == settings[1][0]).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", MATCHERS.values(), ids=list(MATCHERS))
def test_labels_of_proposals_that_differ_between_images(settings, seed):
    torch.manual_seed(seed)
    matcher, (boxes, valid) = Matcher(*settings), case()
    rows = torch.cat([random_boxes(4, 50), boxes + torch.randint(-2, 3, boxes.shape)], dim=1)
    expected = labels_one_by_one(matcher, boxes, valid, rows)
    assert torch.equal(match_by_iou(matcher, boxes, valid, rows), expected)
    assert (expected[:3] == 1).any(dim=1).all()


def test_low_quality_matches_decide_something_and_tie():
    """What the comparison above relies on."""
    boxes, valid = case()
    rows = torch.cat([grid(4, 12), grid(8, 24), grid(16, 48)])
    strict, lenient = (Matcher([0.3, 0.7], [0, -1, 1], low) for low in (False, True))
    more = match_by_iou(lenient, boxes, valid, rows) != match_by_iou(strict, boxes, valid, rows)
    iou = batched_iou(boxes, rows.expand(4, -1, -1))[valid]
    ties = (iou == iou.amax(dim=1, keepdim=True)).sum(dim=1)
    assert more.any() and (ties > 1).any()


# By hand.


@pytest.mark.parametrize(
    "width, label",
    [(10.0, 1), (5.0, 1), (4.999, -1), (4.0, -1), (3.999, 0), (0.0, 0)],
)
def test_thresholds(width, label):
    rows = torch.tensor([[0.0, 0.0, width, 10.0]])
    matcher = Matcher([0.4, 0.5], [0, -1, 1])
    assert match_by_iou(matcher, SQUARE[None, None], everything(1), rows).tolist() == [[label]]


def test_best_anchors_of_a_box_even_if_bad():
    rows = torch.tensor([[0.0, 0.0, 2.0, 10.0], [8.0, 0.0, 10.0, 10.0], [0.0, 0.0, 1.0, 10.0]])
    boxes = SQUARE[None, None]
    for low_quality, labels in ((True, [[1, 1, 0]]), (False, [[0, 0, 0]])):
        matcher = Matcher([0.3, 0.7], [0, -1, 1], low_quality)
        assert match_by_iou(matcher, boxes, everything(1), rows).tolist() == labels


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


@pytest.mark.parametrize("batched, pairwise", [(batched_iou, pairwise_iou), (batched_ioa, None)])
def test_measures_are_detectron2s(batched, pairwise):
    boxes, others = random_boxes(7), random_boxes(9)
    if pairwise is None:  # detectron2's is of the second argument's area
        expected = pairwise_ioa(Boxes(others), Boxes(boxes)).T
    else:
        expected = pairwise(Boxes(boxes), Boxes(others))
    assert torch.equal(batched(boxes, others), expected)
    assert (expected > 0).any() and (expected == 0).any()


def test_measures_by_hand():
    others = torch.tensor(
        [[0.0, 0.0, 10, 10], [5.0, 0.0, 15, 10], [-10.0, -10.0, 30, 30], [10.0, 0.0, 20, 10]]
    )
    iou, ioa = batched_iou(SQUARE[None], others), batched_ioa(SQUARE[None], others)
    torch.testing.assert_close(iou, torch.tensor([[1.0, 1 / 3, 1 / 16, 0.0]]))
    torch.testing.assert_close(ioa, torch.tensor([[1.0, 0.5, 1.0, 0.0]]))
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


def test_a_center_on_the_border_is_outside():
    centers = [(5, 5), (0, 5), (10, 5), (5, 0), (5, 10), (0.01, 9.99)]
    rows = torch.tensor([[x - 3, y - 2, x + 3, y + 2] for x, y in centers])
    inside = rows_inside(SQUARE[None, None], everything(1), rows)
    assert inside.tolist() == [[True, False, False, False, False, True]]


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


def test_fcos_by_hand():
    """Points nearer to a box's center than 1.5 strides, from which its farthest side is less than 8
    strides away and, but for the finest level, more than 4."""
    view, anchors, _, _ = fcos_case()
    boxes = torch.tensor([[[4.0, 4.0, 20.0, 20.0], [0.0, 0.0, 60.0, 60.0]]])
    labels = view._match(boxes, everything(2), anchors)
    levels = [level.nonzero().flatten().tolist() for level in labels[0].split([256, 64, 16])]
    # Of stride 4, at 2, 6, 10, ...: 10 and 14 are near 12; from (30, 30) all sides are 30 away.
    assert levels[0] == [16 * y + x for y in (2, 3) for x in (2, 3)] + [16 * 7 + 7]
    # Of stride 8, at 4, 12, 20, ...: 20, 28 and 36 are near 30; from (28, 28) all sides are near.
    assert levels[1] == [8 * y + x for y in (2, 3, 4) for x in (2, 3, 4) if (x, y) != (3, 3)]
    assert levels[2] == []


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


@pytest.mark.parametrize("settings", MATCHERS.values(), ids=list(MATCHERS))
def test_matching_does_not_synchronize(settings):
    matcher, (boxes, valid), rows = Matcher(*settings), case(), grid(8, 24)
    with no_synchronization():
        match_by_iou(matcher, boxes, valid, rows)
        match_by_iou(matcher, boxes, valid, rows.expand(4, -1, -1))
        rows_inside(boxes, valid, rows)
        batched_ioa(boxes, boxes)
