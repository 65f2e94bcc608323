"""Which location predicts which object."""

import naive_fcos as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.fcos.targets import FCOSAssigner
from fcos_case import STRIDES, anchors, fcos, objects

from distill_d2.testing import no_synchronization

BOUNDS = [(-1, 16), (16, 32), (32, 1e8)]
SIZE = (48, 64)
POINTS = [
    (x, y, stride, level)
    for level, stride in enumerate(STRIDES)
    for x, y in naive.locations(SIZE[0] // stride, SIZE[1] // stride, stride)
]


def targets_of(model, gt):
    return model.proposal_generator.targets(anchors(model, *SIZE), gt)[1]


def random_objects(count, seed):
    """Many sides, centers and longest distances are equal to a location, or to a limit of a level; two
    objects are equal, and one is at the left border."""
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 0.7, (count, 2)) * 64
    boxes = np.concatenate([corner, corner + random.uniform(0.03, 0.6, (count, 2)) * 64], axis=1)
    boxes[::2] = (boxes[::2] / 2).round() * 2
    boxes[0, :3:2] = 0, 14
    boxes[-1] = boxes[count // 2]
    return objects(boxes.tolist(), random.integers(0, 3, count).tolist(), SIZE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("radius, centers", [(None, False), (0.5, False), (1.5, False), (1.5, True)])
def test_by_loops(radius, centers, seed):
    """Centers are those of masks."""
    model = fcos(CENTER_SAMPLE=radius is not None, POS_RADIUS=radius or 1.5)
    gt = [random_objects(12, seed), objects([], [], SIZE), random_objects(4, seed + 10)]
    for image in gt if centers else ():
        low, high = image.gt_boxes.tensor.split(2, dim=1)
        image.gt_centers = low + torch.rand(len(image), 2) * (high - low)
        image.gt_centers[:1, 0] = 0.0
    found = targets_of(model, gt)
    assert found.ltrb.isfinite().all()
    for image, each in enumerate(gt):
        boxes = each.gt_boxes.tensor.tolist()
        middles = each.gt_centers.tolist() if centers else None
        expected = naive.assign(POINTS, boxes, BOUNDS, radius, middles)
        assert found.positive[image].tolist() == [index is not None for index in expected]
        assert image or 5 < sum(index is not None for index in expected) < len(expected)
        for row, ((x, y, stride, _), index) in enumerate(zip(POINTS, expected)):
            if index is None:
                assert found.classes[image, row] == 3
                continue
            assert found.objects[image, row] == index
            assert found.classes[image, row] == each.gt_classes[index]
            ltrb = [d / stride for d in naive.distances(x, y, boxes[index])]
            np.testing.assert_allclose(found.ltrb[image, :, row], ltrb, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "keys, box, expected",
    [
        # A box of 12 x 12: the locations at 6, 10 and 14 in both directions.
        ({}, [4, 4, 16, 16], {(x, y, 4) for x in (6, 10, 14) for y in (6, 10, 14)}),
        # A location on a side of the box, or of its central region, does not belong to it.
        ({"CENTER_SAMPLE": False}, [6, 6, 14, 14], {(10, 10, 4)}),
        ({"POS_RADIUS": 1.0}, [4, 4, 16, 16], {(10, 10, 4)}),
        # Limits belong to both levels: the longest distance of x 6, and of x 12, is 16.
        ({"CENTER_SAMPLE": False}, [3, 1, 22, 3], {(6, 2, 4), (10, 2, 4), (14, 2, 4), (18, 2, 4)}),
        ({"CENTER_SAMPLE": False}, [2, 3, 28, 5], {(4, 4, 8), (12, 4, 8), (20, 4, 8)}),
    ],
)
def test_by_hand(keys, box, expected):
    found = targets_of(fcos(**keys), [objects([box], [2], SIZE)])
    assert {POINTS[row][:3] for row in found.positive[0].nonzero().flatten().tolist()} == expected


def test_padding_boxes_count_nothing():
    assigner = FCOSAssigner([16, 32], 1.5)
    points = assigner.points(anchors(fcos(), *SIZE))
    boxes = random_objects(6, 7).gt_boxes.tensor
    valid = torch.tensor([True, False, True, False, True, True])
    index, positive = assigner.assign(points, boxes, valid)
    kept, alone = assigner.assign(points, boxes[valid])
    assert torch.equal(positive, alone)
    assert torch.equal(index[positive], valid.nonzero().flatten()[kept[positive]])
    assert not assigner.assign(points, boxes, torch.zeros(6, dtype=torch.bool))[1].any()


def test_does_not_synchronize():
    model, gt = fcos(), [random_objects(4, 1), objects([], [], SIZE)]
    with no_synchronization():
        targets_of(model, gt)
