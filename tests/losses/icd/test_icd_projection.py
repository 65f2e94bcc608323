"""Projection of levels and of positions: what concat and F.linear give, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill_d2.losses.icd.decoder import project_positions
from distill_d2.losses.icd.geometry import geometry_of
from distill_d2.losses.icd.projection import project_levels

SIZES = ((3, 4), (2, 2), (1, 3))
S, HEIGHTS, WIDTHS = 19, 6, 9
LAYOUTS = {
    "contiguous": lambda m: m.contiguous(),
    "channels_last": lambda m: m.contiguous(memory_format=torch.channels_last),
    "strided": lambda m: torch.stack([m, m], dim=-1).flatten(-2)[..., ::2],
    "swapped": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(layout="contiguous", images=2, channels=4, outputs=6):
    maps = [LAYOUTS[layout](random(images, channels, *size, seed=i)) for i, size in enumerate(SIZES)]
    offsets = random(images, HEIGHTS, outputs), random(images, WIDTHS, outputs)
    return maps, random(outputs, channels), random(outputs), offsets


def plain(maps, weight, bias, offsets=None):
    """The same, with all positions in one tensor."""
    positions = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1)
    if offsets is None:
        return F.linear(positions, weight, bias)
    heights, widths = zip(*(feature.shape[-2:] for feature in maps))
    parts = zip(offsets[0].split(heights, dim=1), offsets[1].split(widths, dim=1))
    grids = [(row[:, :, None] + column[:, None]).flatten(1, 2) for row, column in parts]
    return F.linear(positions, weight) + torch.cat(grids, dim=1)


@pytest.mark.parametrize("with_offsets", [False, True], ids=["bias", "offsets"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(layout, with_offsets):
    maps, weight, bias, offsets = inputs(layout)
    leaves = [*maps, weight, *(offsets if with_offsets else [bias])]
    for leaf in leaves:
        leaf.requires_grad_()
    results = [f(maps, weight, bias, offsets if with_offsets else None) for f in (project_levels, plain)]
    torch.testing.assert_close(*results)
    upstream = random(2, S, 6, seed=5)
    gradients, plain_gradients = (torch.autograd.grad(result, leaves, upstream) for result in results)
    for actual, expected in zip(gradients, plain_gradients):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected)


def test_gradient_against_finite_differences():
    maps, weight, bias, (rows, columns) = inputs(images=1, channels=2, outputs=3)
    leaves = [leaf.requires_grad_() for leaf in (weight, bias, *maps)]
    torch.autograd.gradcheck(lambda w, b, *m: project_levels(m, w, b), leaves)
    leaves = [leaf.requires_grad_() for leaf in (weight, rows, columns, *maps)]
    torch.autograd.gradcheck(lambda w, r, c, *m: project_levels(m, w, bias, (r, c)), leaves)


@pytest.mark.parametrize("projected", [True, False], ids=["projector", "no_projector"])
def test_positions_are_projected_as_the_embedding_of_each_cell(projected):
    dim = 8
    geometry = geometry_of(SIZES, (24, 32), ((24, 30), (20, 32)), dim, torch.device("cpu"))
    projector = nn.Linear(dim, dim) if projected else None
    weight, bias = random(5, dim).float(), random(5).float()
    offsets = project_positions(projector, geometry, weight, bias)
    nothing = [torch.zeros(2, dim, *size) for size in SIZES]
    actual = project_levels(nothing, weight, bias, offsets)

    heights, widths = zip(*SIZES)
    parts = zip(geometry.rows.split(heights, dim=1), geometry.columns.split(widths, dim=1))
    grids = [torch.broadcast_tensors(row[:, :, None], column[:, None]) for row, column in parts]
    embedding = torch.cat([torch.cat(grid, dim=-1).flatten(1, 2) for grid in grids], dim=1)
    if projector is not None:
        embedding = projector(embedding)
    torch.testing.assert_close(actual, F.linear(embedding, weight, bias))
