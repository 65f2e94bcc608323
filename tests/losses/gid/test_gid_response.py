"""The response terms and the rows that they compare, against the naive version."""

from dataclasses import replace

import naive_gid as naive
import pytest
import torch
from gid_case import Case, close, or_zero, plain_predictions

from distill_d2.losses.gid import GID
from distill_d2.losses.gid.response import cls_term, reg_term
from distill_d2.testing import as_on_a_gpu

CLS = [("BCE", 0.0), ("L1", 0.0), ("L1", 0.3), ("L2", 0.0)]
REG = [("L1", 0.0), ("L1", 0.1), ("L2", 0.0), ("BCE", 0.0), ("GIoU", 0.0)]
ALL = [("cls", *mode) for mode in CLS] + [("reg", *mode) for mode in REG]
LEAVES = {"cls": "logits", "reg": "deltas"}
KINDS = {
    "anchors": {},
    "points": {"ltrb": True},
    "proposals": {"proposals": (20, 13)},
    "classes": {"proposals": (20, 13), "class_specific": True},
}


def random_mask(case, share=0.2):
    """Some of the rows, of those that are there."""
    rows = case.rows
    mask = torch.rand(rows.anchors.shape[:2], generator=torch.Generator().manual_seed(0)) < share
    return mask & (torch.arange(mask.shape[1]) < torch.tensor(rows.counts)[:, None])


def term_of(case, mask, part, mode, beta):
    """A term, and its gradient."""
    heads = case.predictions(case.student), case.predictions(case.teacher)
    term = {"cls": cls_term, "reg": reg_term}[part](*heads, mask, mode=mode, beta=beta)
    leaf = getattr(case.student, LEAVES[part])
    return term, or_zero(leaf, torch.autograd.grad(term, leaf)[0])


def naive_term_of(case, mask, part, mode, beta):
    leaf = getattr(case.student, LEAVES[part]).detach().double().requires_grad_()
    teacher, student = case.teacher.double(), case.student._replace(**{LEAVES[part]: leaf})
    if part == "cls":
        mode = "CE" if mode == "BCE" and case.rows.background else mode
        term = naive.response_loss(teacher.logits, student.logits, mask, mode, beta)
    else:
        deltas = naive.compared_deltas(teacher, student, case.rows.background)
        term = naive.box_loss(*deltas, mask, case.rows, mode, beta)
    return term, torch.autograd.grad(term, leaf)[0]


@pytest.mark.parametrize("part, mode, beta", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_naive_terms(kind, part, mode, beta):
    case = Case(**KINDS[kind])
    for mask in (random_mask(case), random_mask(case, share=0.0)):
        for actual, expected in zip(
            *(f(case, mask, part, mode, beta) for f in (term_of, naive_term_of))
        ):
            close(actual, expected)


@pytest.mark.parametrize("part, mode, beta", ALL)
@pytest.mark.parametrize("kind", ["points", "classes"])
def test_both_ways_of_masking_agree(kind, part, mode, beta):
    """On a GPU rows are not picked, the others are multiplied away."""
    case = Case(**KINDS[kind])
    for mask in (random_mask(case), random_mask(case, share=0.0)):
        picked = term_of(case, mask, part, mode, beta)
        with as_on_a_gpu():
            other = term_of(case, mask, part, mode, beta)
        for one, another in zip(picked, other):
            close(another, one)


@pytest.mark.parametrize("part, mode, beta", ALL)
def test_equal_heads_have_no_loss(part, mode, beta):
    """But for cross-entropies, whose least value is the teacher's entropy: there is no gradient."""
    for kind in ("points", "classes"):
        case = Case(**KINDS[kind])
        with torch.no_grad():
            getattr(case.student, LEAVES[part]).copy_(getattr(case.teacher, LEAVES[part]))
        term, gradient = term_of(case, random_mask(case), part, mode, beta)
        close(gradient, torch.zeros_like(gradient), floor=0.1)
        if mode != "BCE":
            close(term, 0.0)


def test_student_without_boxes_of_each_class():
    mask = torch.tensor([[True]])
    student = plain_predictions([[9.0, 0, 0]], [[1.0] * 4], background=True)
    teacher = plain_predictions([[0.0, 1, 9]], [[10.0] * 4 + [20.0] * 4], background=True)
    assert reg_term(student, teacher, mask).item() == pytest.approx(4 * 19)
    assert reg_term(teacher, student, mask).item() == pytest.approx(4 * 9)


# Which rows


@pytest.mark.parametrize("reg_mask", ["gi", "gi_pos"])
@pytest.mark.parametrize("mask", ["matcher", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_naive_masks(kind, mask, reg_mask):
    settings = {"response_mask": mask, "response_reg_mask": reg_mask, **KINDS[kind]}
    for objects, least in (((4, 3), 10.0), ((0, 1), 10.0), ((0, 0), 1000.0)):
        case = Case(seed=1, objects=objects, gi_min_side=least, **settings)
        student = case.predictions(case.student)
        found = case.loss.response_masks(student, case.instances(), case.batch())
        instances = case.naive_instances()
        expected = naive.response_masks(instances, case.rows, case.truth, GID.Settings(**case.settings))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert found[0].any() == (least < 1000)
    assert torch.equal(*found) and found[0].dtype == torch.bool


@pytest.mark.parametrize("mask", ["matcher", "inside"])
def test_empty_slots_have_no_rows(mask):
    """Whatever box is in them."""
    case = Case(response_mask=mask, gi_post_nms_topk=60)
    instances, student, batch = case.instances(), case.predictions(case.student), case.batch()
    assert not instances.valid.all()
    found = case.loss.response_masks(student, instances, batch)[0]
    boxes = torch.where(instances.valid[..., None], instances.boxes, torch.tensor([0.0, 0, 96, 64]))
    other = case.loss.response_masks(student, replace(instances, boxes=boxes), batch)[0]
    assert torch.equal(other, found)


@pytest.mark.parametrize("mask", ["matcher", "inside"])
def test_rows_that_fill_up_belong_to_no_instance(mask):
    """Even if they lay where one is."""
    case = Case(seed=1, response_mask=mask, **KINDS["proposals"])
    instances = case.instances()
    case.rows.anchors[1, 13:] = instances.boxes[1, 0]
    found = case.loss.response_masks(case.predictions(case.student), instances, case.batch())[0]
    assert found[1, :13].any() and not found[1, 13:].any()
