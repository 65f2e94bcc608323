"""Which location predicts which object."""

import naive_fcos as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.fcos.targets import FCOSAssigner
from fcos_case import fcos, maps, objects

from distill_d2.testing.synchronization import no_synchronization

BOUNDS = [(-1, 16), (16, 32), (32, 1e8)]
STRIDES = (4, 8, 16)


def points_of(height=64, width=64):
    return [
        (x, y, stride, level)
        for level, stride in enumerate(STRIDES)
        for x, y in naive.locations(-(-height // stride), -(-width // stride), stride)
    ]


def targets_of(model, gt, height=64, width=64):
    generator = model.proposal_generator.anchor_generator
    _, targets = model.proposal_generator.targets(generator(maps(model, height, width)), gt)
    return targets


def random_objects(count, seed, size=64):
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 0.7, (count, 2)) * size
    boxes = np.concatenate([corner, corner + random.uniform(0.03, 0.6, (count, 2)) * size], axis=1)
    # Some sides and centers on locations, where comparisons are between equal numbers.
    boxes[::2] = (boxes[::2] / 2).round() * 2
    return objects(boxes.tolist(), random.integers(0, 3, count).tolist(), (size, size))


@pytest.mark.parametrize("radius", [None, 0.5, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_by_loops(radius, seed):
    model = fcos(CENTER_SAMPLE=radius is not None, POS_RADIUS=radius or 1.5)
    gt = [random_objects(12, seed), objects([], []), random_objects(1, seed + 10)]
    found = targets_of(model, gt, 48, 64)
    assert found.ltrb.isfinite().all()
    for image, each in enumerate(gt):
        boxes = each.gt_boxes.tensor.tolist()
        expected = naive.assign(points_of(48, 64), boxes, BOUNDS, radius)
        assert found.positive[image].tolist() == [index is not None for index in expected]
        if len(each) > 1:
            assert 5 < sum(index is not None for index in expected) < len(expected)
        for row, ((x, y, stride, _), index) in enumerate(zip(points_of(48, 64), expected)):
            if index is None:
                assert found.classes[image, row] == 3
                continue
            assert found.objects[image, row] == index
            assert found.classes[image, row] == each.gt_classes[index]
            wanted = [d / stride for d in naive.distances(x, y, boxes[index])]
            np.testing.assert_allclose(found.ltrb[image, :, row], wanted, rtol=1e-6, atol=1e-6)


def test_by_hand():
    """A box of 12 x 12 around (10, 10): the locations within 6 pixels on the first level, where the
    longest distance to a side is at most 16."""
    found = targets_of(fcos(), [objects([[4, 4, 16, 16]], [2])])
    on_first = found.positive[0, :256].view(16, 16)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[1:4, 1:4] = True  # centers at 6, 10, 14
    assert torch.equal(on_first, expected) and not found.positive[0, 256:].any()
    row = 2 * 16 + 1  # x 6, y 10
    assert found.ltrb[0, :, row].tolist() == [0.5, 1.5, 2.5, 1.5] and found.classes[0, row] == 2


def test_limits_of_levels_belong_to_both():
    """A longest distance of exactly 16 pixels is of the first and of the second level."""
    found = targets_of(fcos(CENTER_SAMPLE=False), [objects([[6, 4, 26, 20]], [0])])
    places = points_of()
    hit = {places[row][:3] for row in found.positive[0].nonzero().flatten().tolist()}
    assert (10, 10, 4) in hit and (22, 10, 4) in hit  # 16 to the right, or to the left
    assert (12, 12, 8) not in hit and (20, 12, 8) not in hit  # 14
    assert (14, 10, 4) in hit
    found = targets_of(fcos(CENTER_SAMPLE=False), [objects([[4, 4, 28, 20]], [0])])
    hit = {places[row][:3] for row in found.positive[0].nonzero().flatten().tolist()}
    assert (12, 12, 8) in hit and (20, 12, 8) in hit  # 16
    assert (22, 10, 4) not in hit and (10, 10, 4) not in hit  # 18


def test_sides_are_outside():
    """A location on a side of the box, or of its central region, does not belong to it."""
    found = targets_of(fcos(CENTER_SAMPLE=False), [objects([[6, 6, 14, 14]], [0])])
    assert found.positive[0, :256].view(16, 16).nonzero().tolist() == [[2, 2]]
    found = targets_of(fcos(POS_RADIUS=1.0), [objects([[4, 4, 16, 16]], [0])])
    assert found.positive[0, :256].view(16, 16).nonzero().tolist() == [[2, 2]]


def test_the_smallest_and_of_equal_ones_the_first():
    boxes = [[0, 0, 20, 20], [4, 4, 16, 16], [4, 4, 16, 16], [4, 2, 16, 14]]
    found = targets_of(fcos(), [objects(boxes, [0, 1, 2, 0])])
    row = 2 * 16 + 2
    assert found.objects[0, row] == 1 and found.classes[0, row] == 1


def test_centers_of_masks():
    gt = objects([[0, 0, 40, 12], [0, 40, 14, 54]], [0, 1])
    gt.gt_centers = torch.tensor([[8.0, 6.0], [0.0, 0.0]])
    found = targets_of(fcos(), [gt])
    centers = gt.gt_centers.tolist()
    expected = naive.assign(points_of(), gt.gt_boxes.tensor.tolist(), BOUNDS, 1.5, centers)
    assert found.positive[0].tolist() == [index is not None for index in expected]
    assert found.positive[0].any() and not (found.classes[0] == 1).any()


def test_a_first_center_at_zero_hides_no_other_object():
    gt = objects([[0, 20, 14, 34], [4, 4, 16, 16]], [0, 1])
    gt.gt_centers = torch.tensor([[0.0, 27.0], [10.0, 10.0]])
    found = targets_of(fcos(), [gt])
    assert (found.classes[0] == 1).sum() == 9 and (found.classes[0] == 0).any()


def test_objects_in_any_order():
    gt = random_objects(8, 5)
    order = torch.randperm(8)
    first, second = (targets_of(fcos(), [x]) for x in (gt, gt[order]))
    assert torch.equal(first.classes, second.classes)
    rows = first.positive[0]
    assert torch.equal(first.objects[0, rows], order[second.objects[0, rows]])


@pytest.mark.parametrize("across, down", [(1, 0), (0, 2), (1, 1)])
def test_a_shift_by_strides_shifts_the_targets(across, down):
    """By multiples of the coarsest stride, on a canvas that has room for it."""
    gt = random_objects(8, 3)
    moved = objects(
        (gt.gt_boxes.tensor + 16 * torch.tensor([across, down] * 2)).tolist(), gt.gt_classes.tolist()
    )
    first, second = (targets_of(fcos(), [x], 96, 96) for x in (gt, moved))
    assert first.positive.sum() > 20
    start = 0
    for stride in STRIDES:
        side = 96 // stride
        rows = slice(start, start + side * side)
        start += side * side
        step = (down * 16 // stride, across * 16 // stride)
        classes = first.classes[0, rows].view(side, side)
        expected = torch.roll(classes, step, dims=(0, 1))
        assert torch.equal(second.classes[0, rows].view(side, side), expected)
        here, there = (x.ltrb[0, :, rows].view(4, side, side) for x in (first, second))
        torch.testing.assert_close(
            there * (expected < 3), torch.roll(here * (classes < 3), step, dims=(1, 2))
        )


def test_boxes_that_are_not_there_count_nothing():
    assigner = FCOSAssigner([16, 32], 1.5)
    model = fcos()
    points = assigner.points(model.proposal_generator.anchor_generator(maps(model)))
    boxes = random_objects(6, 7).gt_boxes.tensor
    valid = torch.tensor([True, False, True, False, True, True])
    index, positive = assigner.assign(points, boxes, valid)
    kept, alone = assigner.assign(points, boxes[valid])
    assert torch.equal(positive, alone)
    assert torch.equal(index[positive], valid.nonzero().flatten()[kept[positive]])
    assert not assigner.assign(points, boxes, torch.zeros(6, dtype=torch.bool))[1].any()


def test_does_not_synchronize():
    model, gt = fcos(), [random_objects(4, 1), objects([], [])]
    with no_synchronization():
        targets_of(model, gt)
