"""Which cells are objects, with which masks."""

import naive_solov2 as naive
import numpy as np
import pytest
import torch
from detectron2.structures import PolygonMasks
from distill_d2.projects.solov2 import chunks
from distill_d2.projects.solov2.targets import (
    GridTargets,
    Objects,
    bit_masks,
    centers,
    downscale,
    draw_slots,
)
from solov2_case import GRIDS, PADDED, RANGES, batch, instances, random_objects

CPU = torch.device("cpu")


def assigner(grids=GRIDS, ranges=RANGES, sigma=0.2, most=-1):
    return GridTargets(3, grids, ranges, sigma, most)


def assign(inputs, **settings):
    """The targets of each image."""
    targets = assigner(**settings)
    objects = [targets.objects(item["instances"], PADDED, CPU) for item in inputs]
    return targets(objects, PADDED, 4)


def entries_of(image):
    """[(cell, object)] of the valid entries."""
    return list(zip(image.cell[image.valid].tolist(), image.object[image.valid].tolist()))


def naive_targets(item, sigma=0.2):
    """(R,) classes, sorted [(cell, object)]."""
    truth = item["instances"]
    labels, found = naive.targets(
        *(truth.gt_boxes.tensor.double().tolist(), truth.gt_classes.tolist()),
        *(bit_masks(truth).numpy(), PADDED, GRIDS, RANGES, sigma, 3),
    )
    first = np.cumsum([0, *(grid**2 for grid in GRIDS)])
    cells = [(first[level] + row * GRIDS[level] + column, k) for level, row, column, k in found]
    return np.concatenate([level.ravel() for level in labels]), cells


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("seed, sigma", [(0, 0.2), (1, 0.2), (2, 0.7), (3, 3.0)])
def test_by_loops(seed, sigma, polygons):
    """Entries come level by level, and there object by object and row by row."""
    inputs = batch(12, 0, 7, seed=seed, polygons=polygons)
    total = 0
    for item, image in zip(inputs, assign(inputs, sigma=sigma)):
        classes, entries = naive_targets(item, sigma=sigma)
        assert image.classes.tolist() == classes.tolist()
        assert entries_of(image) == entries
        total += len(entries)
        masks = bit_masks(item["instances"]).numpy()
        expected = [naive.downscale(mask.astype(float), 4, (16, 24)) for mask in masks]
        assert np.array_equal(image.masks, np.array(expected).reshape(-1, 16, 24))
    assert total > 25


def test_ends_of_a_levels_range_belong_to_it():
    for side, levels in ((23, [0]), (24, [0, 1]), (25, [1]), (48, [1, 2]), (49, [2])):
        mask = np.zeros((1, *PADDED), dtype=bool)
        mask[:, :side, :side] = True
        item = {"instances": instances([[0, 0, side, side]], [0], mask, PADDED)}
        (image,) = assign([item], grids=[4] * 3, ranges=[(1, 24), (24, 48), (48, 96)])
        assert sorted({cell // 16 for cell, _ in entries_of(image)}) == levels


def test_objects_with_an_empty_mask_are_left_out():
    (item,) = batch(8)
    full = assign([item])[0]
    item["instances"].gt_masks.tensor[3] = False
    image = assign([item])[0]
    assert entries_of(image) == [pair for pair in entries_of(full) if pair[1] != 3]
    assert len(entries_of(full)) > len(entries_of(image)) > 0
    item["instances"].gt_masks.tensor[:] = False
    image = assign([item])[0]
    assert not image.valid.any() and (image.classes == 3).all()


def test_objects_without_masks():
    (item,) = batch(2)
    del item["instances"]._fields["gt_masks"]
    with pytest.raises(ValueError, match="MODEL.MASK_ON True, and use a dataset whose annotations have"):
        assign([item])


def test_more_objects_than_a_byte_counts():
    (item,) = batch(300, seed=4)
    image = assign([item])[0]
    _, entries = naive_targets(item)
    assert entries_of(image) == entries and image.object.max() > 255


# How many entries there are, known without the device


def test_bound_of_entries():
    random = np.random.default_rng(0)
    total = bound = 0
    for sigma in (0.05, 0.2, 0.5, 1.0):
        targets = assigner(sigma=sigma)
        for _ in range(20):
            boxes, masks = random_objects(random, 15, PADDED)
            truth = instances(boxes, [0] * 15, masks, PADDED)
            objects = targets.objects(truth, PADDED, CPU)
            (image,) = targets([objects], PADDED, 4)
            assert image.valid.sum() == targets.cells(objects, PADDED)[1].sum()
            assert len(image.cell) == objects.most_entries
            total, bound = total + image.valid.sum().item(), bound + objects.most_entries
    assert total <= bound < 2 * total


def test_bound_where_regions_end_on_borders_of_cells():
    """Regions of exactly one cell, and everywhere else in steps that are borders."""
    padded = (96, 96)
    for grid, side in ((8, 60), (12, 40), (3, 96)):
        targets = assigner(grids=[grid], ranges=[(1, 512)])
        corners = torch.cartesian_prod(*[torch.arange(0, 96, 4)] * 2)
        boxes = torch.cat([corners, corners + side], dim=1)
        masks = torch.zeros(len(boxes), 200, 200, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist()):
            mask[y1 : y2 + 1, x1 : x2 + 1] = True  # the center of mass is the center
        objects = Objects(boxes.float(), torch.zeros(len(boxes)).long(), masks, 0)
        for each, there in zip(boxes, targets.cells(objects, padded)[1][0]):
            assert there.sum() <= targets.most_entries(each[None].float(), padded)


def test_slots_drawn_by_chance():
    assert draw_slots([5, 0, 3], -1) == draw_slots([5, 0, 3], 8) == [5, 0, 3]
    drawn = np.array([draw_slots([5, 0, 15], 4) for _ in range(500)])
    assert (drawn.sum(axis=1) == 4).all() and (drawn[:, 1] == 0).all()
    assert drawn.mean(axis=0)[0] == pytest.approx(1.0, abs=0.15)
    assert draw_slots([], 4) == []


def test_limit_of_entries():
    """Each about as often, of the right cells, and none that only fills up while others are left out."""
    inputs = batch(6, 2, seed=6)
    whole = [set(entries_of(image)) for image in assign(inputs)]
    count = sum(map(len, whole))
    seen = {}
    for _ in range(300):
        images = assign(inputs, most=count // 2)
        found = [entries_of(image) for image in images]
        assert sum(len(image.cell) for image in images) == count // 2
        for image, entries, possible in zip(images, found, whole):
            assert set(entries) <= possible and len(set(entries)) == len(entries)
            assert len(entries) == min(len(image.cell), len(possible))
        for index, entries in enumerate(found):
            for entry in entries:
                seen[index, entry] = seen.get((index, entry), 0) + 1
    assert len(seen) == count and min(seen.values()) > 60
    complete = assign(inputs, most=10**6)
    assert [set(entries_of(image)) for image in complete] == whole


# Masks


@pytest.mark.parametrize("size", [(40, 24), (41, 27), (42, 25), (3, 2), (39, 26)])
def test_downscaling_by_loops(size):
    masks = np.random.default_rng(0).uniform(size=(6, *size)) < 0.5
    found = downscale(torch.tensor(masks), 4, (11, 9))
    assert found.shape == (6, 11, 9) and found.dtype == torch.bool
    expected = [naive.downscale(mask.astype(float), 4, (11, 9)) for mask in masks]
    assert np.array_equal(found, np.array(expected))


def test_an_image_smaller_than_a_cell():
    full = downscale(torch.ones(1, 1, 1, dtype=torch.bool), 4, (8, 8))
    assert full.nonzero().tolist() == [[0, 0, 0]]


def test_downscaling_a_part_at_a_time(monkeypatch):
    masks = torch.rand(9, 40, 24) < 0.5
    expected = downscale(masks, 4, (12, 12))
    for at_once in (2 * 40 * 24, 1):
        monkeypatch.setattr(chunks, "_PIXELS_AT_ONCE", at_once)
        assert torch.equal(downscale(masks, 4, (12, 12)), expected) and expected.any()


def test_center_of_a_large_mask():
    """Sums of positions exceed what float32 counts one by one."""
    masks = torch.ones(1, 1001, 3001, dtype=torch.bool)
    (x, y), _ = centers(masks)
    assert (x.item(), y.item()) == (1500.0, 500.0)


def test_polygons_are_drawn():
    polygon = np.array([4.0, 4, 20, 4, 20, 12, 4, 12])
    truth = instances([[4, 4, 20, 12]], [0], np.zeros((1, 24, 32)), (24, 32))
    truth.gt_masks = PolygonMasks([[polygon, polygon + 1.0]])
    masks = bit_masks(truth)
    assert masks.shape == (1, 24, 32) and masks.dtype == torch.bool
    assert masks[0, 4:12, 4:20].all() and masks[0, 12, 10] and not masks[0, 14:].any()
