"""PKD against literals, against the plain formula, and at the edges."""

import pytest
import torch

from distill_d2.losses.pkd import PKD, pearson_distance
from distill_d2.testing.maps import compare, plane

S, T = plane([1, 2], [3, 4]), plane([1, 2], [4, 3])  # r = 4 / 5


def plain(student, teacher):
    """The formula as the paper's code has it, for autograd in float64."""

    def standardize(x):
        mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        return (x - mean) / (std + 1e-6)

    return (standardize(student) - standardize(teacher)).pow(2).mean() / 2


def value_and_gradient(function, student, teacher):
    student = student.clone().requires_grad_()
    value = function(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def test_literal_value():
    assert compare(PKD(), {"p3": S}, {"p3": T})["loss_pkd"].item() == pytest.approx(0.15, rel=1e-5)


def test_literal_gradient():
    _, gradient = value_and_gradient(pearson_distance, S, T)
    torch.testing.assert_close(gradient, plane([0.045, 0.015], [-0.165, 0.105]), rtol=1e-5, atol=1e-6)


def test_levels_are_summed():
    terms = compare(PKD(), {"p3": S, "p4": S}, {"p3": T, "p4": T})
    assert terms["loss_pkd"].item() == pytest.approx(0.30, rel=1e-5)


CASES = {
    "one image": ((1, 5, 7, 6), 0, 1),
    "batch": ((3, 8, 9, 4), 0, 1),
    "one column": ((2, 3, 5, 1), 0, 1),
    "three elements": ((3, 3, 1, 1), 0, 1),
    "large mean": ((2, 4, 8, 8), 1e4, 1),
    "large scale": ((2, 4, 8, 8), 0, 1e4),
    "tiny std": ((2, 4, 8, 8), 0, 1e-5),
    "tiny std, far from zero": ((2, 4, 8, 8), 1.0, 1e-5),
}


@pytest.mark.parametrize("shape, mean, std", CASES.values(), ids=list(CASES))
def test_equals_the_plain_formula(shape, mean, std):
    student = torch.randn(shape, dtype=torch.float64) * std + mean
    teacher = 0.5 * student + torch.randn(shape, dtype=torch.float64) * std
    value, gradient = value_and_gradient(pearson_distance, student, teacher)
    expected, expected_gradient = value_and_gradient(plain, student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    largest = expected_gradient.abs().max()
    assert (gradient - expected_gradient).abs().max() <= 1e-5 * largest


def test_float32_equals_the_plain_formula_in_float64():
    student, teacher = torch.randn(2, 16, 20, 12) + 1, 3 * torch.randn(2, 16, 20, 12)
    value, gradient = value_and_gradient(pearson_distance, student, teacher)
    expected, expected_gradient = value_and_gradient(plain, student.double(), teacher.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    error = (gradient - expected_gradient).abs().max()
    assert error <= 1e-5 * expected_gradient.abs().max()


def test_memory_layout_does_not_matter():
    student, teacher = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    value, gradient = value_and_gradient(pearson_distance, student, teacher)
    last = torch.channels_last
    other, other_gradient = value_and_gradient(
        pearson_distance, student.to(memory_format=last), teacher.to(memory_format=last)
    )
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(other_gradient, gradient)


def test_gradient_is_scaled_by_what_follows():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    _, gradient = value_and_gradient(pearson_distance, student, teacher)
    _, tripled = value_and_gradient(lambda s, t: 3 * pearson_distance(s, t), student, teacher)
    torch.testing.assert_close(tripled, 3 * gradient)


def test_blind_to_each_channels_scale_and_offset():
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    scale = torch.tensor([0.1, 1.0, 20.0]).view(3, 1, 1)
    offset = torch.tensor([-3.0, 0.0, 5.0]).view(3, 1, 1)
    value = pearson_distance(student, teacher)
    torch.testing.assert_close(
        pearson_distance(student * scale + offset, teacher), value, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        pearson_distance(student, teacher * scale + offset), value, rtol=1e-4, atol=0
    )


def test_anti_correlated():
    feature = torch.randn(1, 1, 2, 5)
    assert pearson_distance(feature, -7 * feature).item() == pytest.approx(2 * 9 / 10, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 2, 5, 3), (2, 2, 8, 8)])
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
@pytest.mark.parametrize("level", [0.0, 0.1, 1000.1])
def test_constant_channels_are_finite(shape, constant, level):
    student = torch.randn(shape) if constant == "teacher" else torch.full(shape, level)
    teacher = torch.randn(shape) if constant == "student" else torch.full(shape, level)
    value, gradient = value_and_gradient(pearson_distance, student, teacher)
    assert value.isfinite() and gradient.isfinite().all()


def test_single_element_gives_nothing():
    # p7 of one 128-pixel image. 1 / eps^2 would make 1e5 of a rounding error.
    value, gradient = value_and_gradient(pearson_distance, plane([3.3]), plane([1.7]))
    assert value == 0 and gradient == 0


@pytest.mark.parametrize("std", [1e-12, 1e-18, 1e-22])
def test_vanishing_student_is_finite(std):
    _, gradient = value_and_gradient(
        pearson_distance, torch.randn(2, 4, 8, 8) * std, torch.randn(2, 4, 8, 8)
    )
    assert gradient.isfinite().all()


def test_constant_channel_leaves_the_others_alone():
    student, teacher = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    _, alone = value_and_gradient(pearson_distance, student[:, :1], teacher[:, :1])
    teacher[:, 1] = student[:, 1] = 0.3
    _, gradient = value_and_gradient(pearson_distance, student, teacher)
    torch.testing.assert_close(gradient[:, :1], alone / 2)
    assert torch.equal(gradient[:, 1], torch.zeros(2, 8, 8))


def test_no_gradient_to_the_teacher():
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, requires_grad=True)
    pearson_distance(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
