"""What the losses on necks share: maps as they are, modules per level, masks of areas, norms, and seeds."""

import pytest
import torch
from detectron2.utils import comm
from torch import nn

from distill_d2.losses import FeaturePairs
from distill_d2.losses.attention import attentions, spatial_attention
from distill_d2.losses.masks import inverse_area_mask
from distill_d2.losses.norms import BatchStatisticsNorm
from distill_d2.losses.pairing import level_modules
from distill_d2.losses.randomness import generator_of, seed_of
from distill_d2.losses.regions import weighted_distances
from distill_d2.testing.maps import view_of


def bound(**options):
    student = {"p3": torch.randn(2, 3, 5, 6), "p4": torch.randn(2, 4, 3, 3)}
    teacher = {"p3": torch.randn(2, 8, 4, 6), "p4": torch.randn(2, 4, 3, 3)}
    views = view_of(student, "student"), view_of(teacher, "teacher")
    pairs = FeaturePairs(**options)
    pairs.bind(*views)
    return pairs, views, student


def test_maps_as_they_are():
    pairs, views, student = bound(adapt=False)
    assert pairs.level_channels == {"p3": (3, 8), "p4": (4, 4)} and not list(pairs.parameters())
    found = pairs(*views)
    assert found["p3"][0].shape == (2, 3, 4, 6) and torch.equal(found["p4"][0], student["p4"])
    shapes = [{"p3": (channels, 5 - s, 6), "p4": (4, 3, 3)} for s, channels in enumerate((3, 8))]
    assert [row[-1] for row in pairs.describe(*shapes)] == ["resize", "none"]


def test_modules_per_level():
    made = level_modules(bound(adapt=False)[0], nn.Linear)
    assert {name: module.weight.shape for name, module in made.items()} == {"p3": (8, 3), "p4": (4, 4)}
    assert level_modules(bound()[0], nn.Linear)["p3"].weight.shape == (8, 8)


def test_adapters_without_bias():
    pairs, *_ = bound(bias=False)
    assert [name for name, _ in pairs.named_parameters()] == ["adapters.p3.weight"]


# Masks.


def test_the_smallest_box_wins():
    """Cells of 8 pixels: both ends count, also beyond the level, and negative corners are 0."""
    boxes = torch.tensor([[[-9.0, 0, 8, 7], [8, 8, 90, 9], [30, 9, 20, 20], [-9, 0, -1, 9]]])
    drawn = torch.ones(1, 4, dtype=torch.bool)
    mask = inverse_area_mask(boxes, drawn, (4, 3), 8)
    small, large = 1 / 4, 1 / 24  # 2 x 2 cells, and 12 x 2
    expected = [[small, small, 0], [small, small, large], [0, large, large], [0, 0, 0]]
    torch.testing.assert_close(mask, torch.tensor([expected]))
    assert not inverse_area_mask(boxes, ~drawn, (4, 3), 8).any()


def test_many_boxes_by_loops():
    torch.manual_seed(0)
    corner, drawn = torch.rand(2, 40, 2) * 90 - 10, torch.rand(2, 40) > 0.2
    boxes = torch.cat([corner, corner + 40 * torch.rand(2, 40, 2)], dim=-1)
    expected = torch.zeros(2, 7, 9)
    for image in range(2):
        for x1, y1, x2, y2 in boxes[image][drawn[image]].tolist():
            if x2 > 0 and y2 > 0:
                left, top, right, bottom = max(x1, 0) // 8, max(y1, 0) // 8, -(-x2 // 8), -(-y2 // 8)
                cells = (int(bottom) - int(top) + 1) * (int(right) - int(left) + 1)
                part = expected[image, int(top) : int(bottom) + 1, int(left) : int(right) + 1]
                part.clamp_(min=1 / cells)
    torch.testing.assert_close(inverse_area_mask(boxes, drawn, (7, 9), 8), expected)


# Sums and norms.


def test_gradients():
    torch.manual_seed(0)
    s, t = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: weighted_distances(x, t, weights), s.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: attentions(x, 0.5), s)
    torch.testing.assert_close(attentions(s, 0.5)[0], spatial_attention(s, 0.5))
    cells, total, sums = weighted_distances(s, t, weights)
    d = s - t
    torch.testing.assert_close(cells, (weights[..., None, None] * d**2).sum(1))
    torch.testing.assert_close([total, sums], [(d**2).sum(), d.sum((2, 3))])


def test_a_norm_by_the_batch_alone():
    torch.manual_seed(0)
    norm, feature = BatchStatisticsNorm(3, weight=0.5), torch.randn(2, 3, 4, 5)
    assert list(norm.state_dict()) == ["weight", "bias"]
    expected = 0.5 * nn.functional.batch_norm(feature, None, None, training=True)
    torch.testing.assert_close(norm(feature), expected)
    torch.testing.assert_close(norm.eval()(feature), expected)
    cell = torch.randn(1, 3, 1, 1, requires_grad=True)
    norm(cell).sum().backward()
    assert norm(cell).abs().max() < 1e-4 and cell.grad.abs().max() < 1e-2  # up to rounding


def norm_of_this_process():
    return norm_of(comm.get_rank(), synchronized=True)


def norm_of(rank, synchronized=False):
    """The output of a norm and its input's gradient, on a map of this rank, or on those of both."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 4, 5), 3 + torch.randn(2, 3, 2, 5)]
    parts = [feature.flatten(2) for feature in maps]
    feature = maps[rank] if synchronized else torch.cat(parts, dim=2)[..., None]
    norm = BatchStatisticsNorm(3, synchronized=synchronized)
    normed = norm(feature.requires_grad_())
    (normed**3).sum().backward()
    return normed.detach(), feature.grad


def test_a_norm_of_two_processes(pool):
    both = norm_of(0)
    for index, found in enumerate(pool.run(norm_of_this_process)):
        for own, whole in zip(found, both):
            part = whole.split([20, 10], dim=2)[index]
            torch.testing.assert_close(own.flatten(2), part[..., 0], rtol=1e-4, atol=1e-5)


# Random numbers.


def test_seeds_repeat_and_differ():
    torch.manual_seed(3)
    before, seed = torch.get_rng_state(), seed_of(7, "loss p3")
    drawn = torch.rand(4, generator=generator_of(7, "loss p3", torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)  # as in other work of the step
    assert seed_of(7, "loss p3") == seed
    again = torch.rand(4, generator=generator_of(7, "loss p3", torch.device("cpu")))
    assert torch.equal(again, drawn)
    torch.manual_seed(4)  # of another rank
    others = {seed_of(7, "loss p3"), seed_of(7, "loss p4"), seed_of(8, "loss p3"), seed_of(7)}
    assert len(others | {seed}) == 5


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_attentions_of_a_constant_map(value):
    feature = torch.full((1, 2, 1, 1), value, requires_grad=True)
    cells, channels = attentions(feature, 0.5)
    assert cells.tolist() == [[[1.0]]] and channels.tolist() == [[1.0, 1.0]]
