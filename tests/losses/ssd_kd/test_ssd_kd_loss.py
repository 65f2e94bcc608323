"""SSDKD on given predictions: by hand, against loops, gradients, and its settings."""

import math

import naive_ssd_kd as naive
import pytest
import torch
from ssd_kd_case import Head, naive_terms, targets, terms_of

from distill_d2.losses.ssd_kd import SSDKD
from distill_d2.losses.ssd_kd.terms import (
    per_batch_bound,
    per_box_bound,
    soft_cross_entropy,
)

SOFT, BOUNDED, HINT = (f"loss_ssd_kd_{name}" for name in ("soft", "bounded", "hint"))
EMPTY = [[], []]


def compare(terms, expected):
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.shape == ()
        assert term.item() == pytest.approx(expected[name], rel=2e-5, abs=1e-7), name


# The terms by hand


def test_soft_cross_entropy_by_hand():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2); the last class is the background."""
    student = torch.tensor([[math.log(2), 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0, math.log(2)]])
    log2 = math.log(2)
    (loss,) = soft_cross_entropy(student, teacher, 1.0, 1.5)
    assert loss.item() == pytest.approx(0.25 * log2 + 0.25 * 2 * log2 + 1.5 * 0.5 * 2 * log2)
    (loss,) = soft_cross_entropy(student, teacher, 3.0, 0.0)
    assert loss.item() == pytest.approx(3 * (0.25 * log2 + 0.25 * 2 * log2))


@pytest.mark.parametrize("length", [1, 3])
def test_soft_cross_entropy_of_large_logits(length):
    student = torch.full((2, length), -300.0)
    student[:, 0] = 300.0
    student.requires_grad_()
    loss = soft_cross_entropy(student, -student.detach(), 1.0, 1.5).sum()
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and loss > 100


# Squared distances of the student 4, 1, 9, 25, of the teacher 1, 4, 9, 0; the last does not count.
DISTANCES = (
    torch.tensor([[[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 5]]]),
    torch.tensor([[[0.0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]]]),
)
ROWS = torch.tensor([[True, True, True, False]])


@pytest.mark.parametrize(
    "margin, expected", [(0.0, 4), (0.5, 13), (3.0, 13), (3.5, 14), (-3.0, 0), (-2.5, 4)]
)
def test_per_box_bound_by_hand(margin, expected):
    """Equal ones count from a margin above 0 on."""
    assert per_box_bound(*DISTANCES, ROWS, margin) == expected
    assert per_box_bound(*DISTANCES, ROWS, -10.0) == 0


@pytest.mark.parametrize(
    "rows, margin, expected",
    [
        ([True, True, True, False], 0.0, 0.0),  # 14 / 12 of both
        ([True, True, True, False], 0.01, 14 / 12),
        ([True, True, True, True], 0.0, 39 / 16),
        ([False, True, False, False], 0.74, 0.0),
        ([False, True, False, False], 0.76, 1 / 4),
        ([False, False, False, False], 5.0, 0.0),
    ],
)
def test_per_batch_bound_by_hand(rows, margin, expected):
    bound = per_batch_bound(*DISTANCES, torch.tensor([rows]), margin)
    assert bound.item() == pytest.approx(expected)


@pytest.mark.parametrize("far", [(1e30, 0.0), (0.0, 1e30), (1e30, 1e30)])
@pytest.mark.parametrize("bound", [per_box_bound, per_batch_bound])
def test_bounds_of_rows_that_do_not_count(bound, far):
    """However far off they are."""
    student, teacher = (boxes.clone() for boxes in DISTANCES)
    student[0, 3], teacher[0, 3] = far
    student.requires_grad_()
    value = bound(student, teacher, ROWS.float(), 1.0)
    value.backward()
    assert value == bound(*DISTANCES, ROWS, 1.0) > 0
    assert not student.grad[0, 3].any() and student.grad.isfinite().all()


# The whole, by loops


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mu": 0.2, "background_weight": 3.0, "object_weight": 0.5, "temperature": 2.0},
        {"lmda": 2.0, "nu": 0.7, "margin": 3.0},
        {"lmda": 2.0, "nu": 0.7, "margin": -3.0},
        {"bounded": "batch", "margin": 1000.0},
        {"bounded": "batch", "margin": -1000.0},
        {"gamma": 2.0, "hint_form": "L1"},
        {"negatives_per_positive": 1.0},
        {"negatives_per_positive": 0.0, "mu": 0.0},
        {"mu": 1.0},
        {"nu": 0.0},
        {"gamma": 0.0},
        {"lmda": 0.0},
    ],
    ids=str,
)
def test_naive_version(settings):
    student, teacher = Head(1), Head(2)
    compare(terms_of(student, teacher, **settings), naive_terms(student, teacher, **settings))


# Special cases


def test_student_equal_to_its_teacher():
    """Not better: bounded only with a margin; the cross entropy is the teacher's own."""
    student, teacher = Head(1), Head(1)
    terms = terms_of(student, teacher)
    assert terms[BOUNDED] == 0 and terms[HINT] == 0 and terms[SOFT] > 0
    terms = terms_of(student, teacher, margin=1e-3)
    rows = [
        naive.squared(student.deltas[image, row].tolist(), wanted)
        for image, rows in enumerate(targets(student))
        for row, (_, wanted) in rows.items()
    ]
    assert terms[BOUNDED].item() == pytest.approx(0.5 * sum(rows) / len(rows), rel=1e-5)


@pytest.mark.parametrize("bounded", ["box", "batch"])
@pytest.mark.parametrize("margin", [0.0, 5.0])
def test_no_objects_at_all(bounded, margin):
    """Nothing is selected: only the hint is left."""
    student, teacher = Head(1), Head(2)
    terms = terms_of(student, teacher, EMPTY, bounded=bounded, margin=margin)
    assert terms[SOFT] == 0 and terms[BOUNDED] == 0 and terms[HINT] > 0
    (terms[SOFT] + terms[BOUNDED]).backward(retain_graph=True)
    assert not student.logits.grad.any() and not student.deltas.grad.any()
    terms[HINT].backward()
    expected = (student.logits - teacher.logits).detach() / student.logits.numel()
    torch.testing.assert_close(student.logits.grad, expected)


# Adapters


def test_hint_of_features_without_weight_has_no_adapters():
    assert SSDKD().pairs is not None and SSDKD().pairs.always
    assert SSDKD(gamma=0.0).pairs is None
