"""Divergences of class probabilities, and means over rows, where GID's tests do not look already."""

import naive_defeat as naive
import pytest
import torch

from distill_d2.losses.rows import box_mean, class_mean, divergence, masked_sum, row_loss
from distill_d2.views import Predictions

BOTH = pytest.mark.parametrize("background", [True, False], ids=["softmax", "sigmoid"])
SHAPE, LEVELS = (2, 18), (6, 2)  # rows: two anchors at six positions of a level, three at two


# Divergence


@BOTH
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_naive_divergence(background, temperature):
    student, teacher = torch.randn(2, 3, 5, 6, dtype=torch.float64) * 4
    found = divergence(background, temperature)(student, teacher)
    assert found.shape == (3, 5)
    for n in range(3):
        for row in range(5):
            both = student[n, row : row + 1], teacher[n, row : row + 1]
            expected = naive.divergence(*both, temperature, background)
            assert found[n, row].item() == pytest.approx(expected.item(), rel=1e-9)


@BOTH
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_gradcheck(background, temperature):
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(background, temperature)(s, teacher), student)


@BOTH
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_equal_logits_give_exactly_nothing(background, temperature, scale):
    student = (torch.randn(40, 7) * scale).requires_grad_()
    found = divergence(background, temperature)(student, student.detach().clone())
    found.sum().backward()
    assert torch.equal(found, torch.zeros(40))
    assert student.grad.abs().max() < 1e-6


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_are_finite(background, sign):
    student = torch.tensor([[1e4, -1e4, 0.0], [3e4, 3e4, -3e4], [0.0, 0, 0]]).requires_grad_()
    teacher = sign * torch.tensor([[-1e4, 1e4, 0.0], [3e4, -3e4, 3e4], [1e4, 0, -1e4]])
    found = divergence(background, 1.0)(student, teacher)
    found.sum().backward()
    assert found.isfinite().all() and student.grad.isfinite().all()


# Means over rows


def predictions(seed, columns=4, class_specific=False):
    """Of two levels, of random numbers, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(SHAPE[0], LEVELS[0], 2), (SHAPE[0], LEVELS[1], 3)]

    def levels(length):
        return [torch.randn(*s, length, generator=generator).requires_grad_() for s in shapes]

    return Predictions(
        logit_levels=levels(columns),
        delta_levels=levels(4 * columns if class_specific else 4),
        anchors=torch.zeros(SHAPE[1], 4),
        decode=lambda deltas, anchors: deltas,
        match=lambda boxes, valid: None,
    )


def random_mask(share=0.4):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(9)) < share


def one_row():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1, 7] = True
    return mask


MASKS = {"some": random_mask(), "all": random_mask(2.0), "one": one_row(), "none": random_mask(0.0)}


def gradients(term, *levels):
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(levels, torch.autograd.grad(term, levels, allow_unused=True))
    ]


@BOTH
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_naive_class_mean(background, sparse, mask):
    student, teacher = predictions(0), predictions(1)
    found = class_mean(divergence(background, 2.0), student, teacher, MASKS[mask], sparse=sparse)
    both = (heads.logits[MASKS[mask]].double() for heads in (student, teacher))
    expected = naive.divergence(*both, 2.0, background)
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@BOTH
@pytest.mark.parametrize("mask", MASKS)
def test_few_rows_and_many_are_masked_alike(background, mask):
    student, teacher = predictions(0), predictions(1)
    results = []
    for sparse in (True, False):
        found = class_mean(divergence(background, 2.0), student, teacher, MASKS[mask], sparse=sparse)
        results.append([found, *gradients(found, *student.logit_levels)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)
    rows = torch.cat([gradient.flatten(1, 2) for gradient in results[0][1:]], dim=1)
    assert torch.equal(rows.any(dim=2), MASKS[mask])  # and no row beside the mask has a gradient


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_box_mean_by_loops(class_specific, mask):
    student, teacher = (predictions(seed, 3, class_specific) for seed in (0, 1))
    classes = torch.randint(0, 3, SHAPE)
    found = box_mean(row_loss("L1", 0.5), student, teacher, MASKS[mask], classes)
    total, count = 0.0, 0
    for image in range(SHAPE[0]):
        for row in range(SHAPE[1]):
            if not MASKS[mask][image, row]:
                continue
            first = 4 * int(classes[image, row]) if class_specific else 0
            both = zip(student.deltas[image, row].tolist(), teacher.deltas[image, row].tolist())
            gaps = [abs(s - t) for s, t in both][first : first + 4]
            total += sum(gap**2 if gap < 0.5 else gap - 0.25 for gap in gaps)
            count += 1
    assert found.item() == pytest.approx(total / max(1, count), rel=1e-5)


@pytest.mark.parametrize("class_specific", [False, True])
def test_gradients_of_box_mean(class_specific):
    """Of the deltas of the rows' classes alone; all are zero where the mask is empty."""
    student, teacher = (predictions(seed, 3, class_specific) for seed in (0, 1))
    classes = torch.randint(0, 3, SHAPE)
    for mask in MASKS.values():
        found = box_mean(row_loss("L2", 0.0), student, teacher, mask, classes)
        found = gradients(found, *student.delta_levels)
        touched = torch.cat([gradient.flatten(1, 2) for gradient in found], dim=1) != 0
        expected = mask[..., None].expand(*SHAPE, 4)
        if class_specific:
            own = torch.nn.functional.one_hot(classes, 3).bool() & mask[..., None]
            expected = own.repeat_interleave(4, dim=2)
        assert torch.equal(touched, expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_beside_the_mask_may_be_anything(sparse):
    """Of rows that fill up nothing is known."""
    values = [torch.randn(1, 4, 1, 3), torch.randn(1, 4, 1, 3)]
    mask = torch.tensor([True, False, True, False]).view(1, 4, 1)
    expected = masked_sum(divergence(True, 1.0), mask, *values, sparse=sparse)
    values[0][0, 1], values[1][0, 3] = torch.inf, torch.nan
    values[0].requires_grad_()
    found = masked_sum(divergence(True, 1.0), mask, *values, sparse=sparse)
    assert found == expected
    assert gradients(found, values[0])[0].isfinite().all()
