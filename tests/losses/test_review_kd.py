"""ReviewKD: pools by hand, the plain form of the fusion, and what joins with what."""

import pytest
import torch
import torch.nn.functional as F

from distill_d2.losses.review_kd import Fusion, ReviewKD, hierarchical_distance
from distill_d2.testing.maps import plane, view_of


def test_pools_below_the_height():
    d = plane([4, 0], [0, 0])  # the mean of squares is 4, the pool of one cell 1
    zero = torch.zeros_like(d)
    assert hierarchical_distance(d, zero).item() == pytest.approx((4 + 1 / 2) / 1.5)
    assert hierarchical_distance(d[..., :1, :], zero[..., :1, :]).item() == pytest.approx(8)
    three = plane([9, 0, 0], [0, 0, 0], [0, 0, 0])  # pools of 2 (the first cell is of 4) and of 1
    expected = (9 + (9 / 4) ** 2 / 4 / 2 + 1 / 4) / 1.75
    assert hierarchical_distance(three, torch.zeros_like(three)).item() == pytest.approx(expected)


@pytest.mark.parametrize("size", [(1, 2), (3, 5), (4, 4)])
def test_the_plain_fusion(size):
    fusion = Fusion(6, 3, 4, coarsest=False, synchronized=False)
    feature, coarser = torch.randn(2, 3, 4, 9), torch.randn(2, 6, *size)
    x, y = fusion.first(feature), F.interpolate(coarser, (4, 9), mode="nearest")
    a, b = fusion.attention(torch.cat([x, y], dim=1)).sigmoid().split(1, dim=1)
    torch.testing.assert_close(fusion.join(feature, coarser), a * x + b * y)


def test_a_level_joins_the_coarser_ones():
    """By stride, in whatever order IN_FEATURES has; channels and sizes may differ."""
    student = {
        "p3": torch.randn(2, 3, 8, 9),
        "p4": torch.randn(2, 5, 4, 5),
        "p5": torch.randn(2, 3, 1, 1),
    }
    shapes = {"p3": (2, 4, 8, 9), "p4": (2, 6, 4, 4), "p5": (2, 4, 1, 1)}
    teacher = {name: torch.randn(shape) for name, shape in shapes.items()}
    student = {name: values.requires_grad_() for name, values in student.items()}
    loss = ReviewKD(in_features=["p4", "p5", "p3"], channels=7)
    views = view_of(student, "student"), view_of(teacher, "teacher")
    loss.bind(*views)
    assert list(loss.fusions) == ["p5", "p4", "p3"] and loss.fusions["p5"].attention is None
    made = {name: of_student for name, (of_student, _) in loss.made(*views).items()}
    assert {name: tuple(values.shape) for name, values in made.items()} == shapes
    reached = torch.autograd.grad(made["p4"].square().sum(), list(student.values()), allow_unused=True)
    assert [gradient is not None for gradient in reached] == [False, True, True]
