"""Padding masks and positional embeddings against the naive version's, map by map."""

import pytest
import torch
from naive_icd import padding_masks, position_embedding

from distill_d2.losses.icd.geometry import geometry_of

CPU = torch.device("cpu")
CASES = {
    "padded": ((64, 128), ((60, 90), (50, 128)), ((4, 8), (2, 4))),
    "one_image_fills": ((64, 128), ((64, 128), (20, 33)), ((8, 16), (4, 8), (1, 2))),
    "no_padding": ((64, 128), ((64, 128), (64, 128)), ((4, 8), (2, 4))),
    "less_than_a_cell": ((64, 128), ((63, 127),), ((4, 8), (2, 4))),
    "odd_levels": ((96, 160), ((95, 101), (33, 160), (1, 1)), ((13, 21), (7, 11), (4, 6))),
    "one_cell": ((32, 32), ((20, 30),), ((1, 1),)),
}


def geometry(name, channels=16):
    padded, images, levels = CASES[name]
    return geometry_of(levels, padded, images, channels, CPU)


def naive(name, channels=16):
    """Padding (N, H, W) and embedding (N, C, H, W) of each level."""
    padded, images, levels = CASES[name]
    shapes = {str(i): size for i, size in enumerate(levels)}
    masks = padding_masks(shapes, images, padded, CPU).values()
    return [(mask[:, 0], position_embedding(mask, channels, torch.float64)) for mask in masks]


@pytest.mark.parametrize("name", CASES)
def test_padding(name):
    expected = torch.cat([mask.flatten(1) for mask, _ in naive(name)], dim=1)
    actual = geometry(name).padding
    if actual is None:
        assert not expected.any()
    else:
        assert torch.equal(actual, expected) and expected.any() and not expected.all(1).any()


def test_no_mask_where_nothing_is_padded():
    assert geometry("no_padding").padding is None and geometry("less_than_a_cell").padding is None
    assert geometry("padded").padding is not None


@pytest.mark.parametrize("channels", [8, 28])
@pytest.mark.parametrize("name", CASES)
def test_rows_and_columns_are_the_embedding(name, channels):
    actual, half = geometry(name, channels), channels // 2
    heights, widths = zip(*actual.level_sizes)
    rows, columns = actual.rows.split(heights, dim=1), actual.columns.split(widths, dim=1)
    assert actual.rows.dtype == torch.float32
    for (mask, expected), row, column in zip(naive(name, channels), rows, columns):
        outside = mask[:, None]
        ours_y = row.double().transpose(1, 2)[..., None].masked_fill(outside, 0)
        ours_x = column.double().transpose(1, 2)[:, :, None].masked_fill(outside, 0)
        expected = expected.masked_fill(outside, 0)
        torch.testing.assert_close(ours_y, expected[:, :half], atol=2e-6, rtol=0)
        torch.testing.assert_close(ours_x, expected[:, half:], atol=2e-6, rtol=0)


def test_geometry_is_remembered():
    assert geometry("padded") is geometry("padded")
    assert geometry("padded") is not geometry("padded", channels=8)
