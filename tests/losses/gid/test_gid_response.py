"""The response terms and the rows that they compare: against the naive version, and by hand."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import naive_gid as naive
import pytest
import torch
import torch.nn.functional as F
from gid_case import Case, close, naive_masks, or_zero, pad_instances, plain_predictions

from distill_d2.losses import rows
from distill_d2.losses.gid import GID
from distill_d2.losses.gid.response import cls_term, reg_term
from distill_d2.testing.synchronization import no_synchronization

CLS = [("BCE", 0.0), ("L1", 0.0), ("L1", 0.3), ("L2", 0.0)]
REG = [("L1", 0.0), ("L1", 0.1), ("L2", 0.0), ("BCE", 0.0), ("GIoU", 0.0)]
KINDS = {
    "anchors": {},
    "points": {"ltrb": True},
    "proposals": {"proposals": (20, 13)},
    "classes": {"proposals": (20, 13), "class_specific": True},
}


def random_mask(case, share=0.2, seed=0):
    """Some of the rows, of those that are there."""
    rows = case.rows
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows.anchors.shape[:2], generator=generator) < share
    return mask & (torch.arange(mask.shape[1]) < torch.tensor(rows.counts)[:, None])


def terms_of(case, mask, cls=("BCE", 0.0), reg=("L1", 0.0)):
    heads = case.predictions(case.student), case.predictions(case.teacher)
    return {
        "logits": cls_term(*heads, mask, mode=cls[0], beta=cls[1]),
        "deltas": reg_term(*heads, mask, mode=reg[0], beta=reg[1]),
    }


def gradient_of(case, name, term):
    leaf = getattr(case.student, name)
    return or_zero(leaf, torch.autograd.grad(term, leaf)[0])


# Against the naive version


@pytest.mark.parametrize("mode, beta", CLS)
@pytest.mark.parametrize("kind", KINDS)
def test_naive_cls_term(kind, mode, beta):
    case = Case(**KINDS[kind])
    mask = random_mask(case)
    term = terms_of(case, mask, cls=(mode, beta))["logits"]
    leaf = case.student.logits.detach().double().requires_grad_()
    mode = "CE" if mode == "BCE" and case.rows.background else mode
    expected = naive.response_loss(case.teacher.logits.double(), leaf, mask, mode, beta)
    close(term, expected)
    close(gradient_of(case, "logits", term), torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("mode, beta", REG)
@pytest.mark.parametrize("kind", KINDS)
def test_naive_reg_term(kind, mode, beta):
    case = Case(**KINDS[kind])
    mask = random_mask(case)
    term = terms_of(case, mask, reg=(mode, beta))["deltas"]
    leaf = case.student.deltas.detach().double().requires_grad_()
    foreground = case.teacher.logits[..., :3]
    classes = [[naive.highest_class(row) for row in naive.numbers(image)] for image in foreground]
    teacher, student = (
        torch.stack([naive.deltas_of_classes(d, c) for d, c in zip(deltas, classes)])
        for deltas in (case.teacher.deltas.double(), leaf)
    )
    if mode == "GIoU":
        anchors = case.rows.anchors.double()
        expected = naive.response_giou_loss(teacher, student, mask, anchors, case.rows.decode)
    else:
        expected = naive.response_loss(teacher, student, mask, mode, beta)
    close(term, expected)
    close(gradient_of(case, "deltas", term), torch.autograd.grad(expected, leaf)[0])


# On a GPU rows are not picked, the others are multiplied away.


class Elsewhere(torch.Tensor):
    """A mask that seems to be on another device than it is."""

    @property
    def device(self):
        return SimpleNamespace(type="cuda")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the terms take the way that they take on a GPU."""
    masked_sum = rows.masked_sum

    def elsewhere(loss, mask, *values, **options):
        total = masked_sum(loss, mask.as_subclass(Elsewhere), *values, **options)
        return total.as_subclass(torch.Tensor)

    @contextlib.contextmanager
    def replaced():
        with monkeypatch.context() as patch:
            patch.setattr(rows, "masked_sum", elsewhere)
            yield

    return replaced


ALL = [("cls", *mode) for mode in CLS] + [("reg", *mode) for mode in REG]


@pytest.mark.parametrize("part, mode, beta", ALL)
@pytest.mark.parametrize("kind", ["points", "classes"])
def test_both_ways_of_masking_agree(as_on_a_gpu, kind, part, mode, beta):
    name = {"cls": "logits", "reg": "deltas"}[part]
    case = Case(**KINDS[kind])
    for mask in (random_mask(case), torch.zeros(case.rows.anchors.shape[:2], dtype=torch.bool)):
        as_on_a_cpu = terms_of(case, mask, **{part: (mode, beta)})[name]
        gradient = gradient_of(case, name, as_on_a_cpu)
        with as_on_a_gpu(), no_synchronization():
            other = terms_of(case, mask, **{part: (mode, beta)})[name]
        close(other, as_on_a_cpu)
        close(gradient_of(case, name, other), gradient)


def test_the_other_way_picks_no_rows(as_on_a_gpu):
    """That the test above would notice."""
    case = Case()
    with pytest.raises(AssertionError, match="index|nonzero"), no_synchronization():
        terms_of(case, random_mask(case))
    with as_on_a_gpu(), no_synchronization():
        terms_of(case, random_mask(case))


# By hand

MASK = torch.tensor([[True, False, True]])
TEACHER = [[1.0, -2.0], [50, 50], [0, 3]]
STUDENT = [[0.0, -1.0], [-50, -50], [0, 1]]
BOXES = [[0.0, 0, 10, 10], [0, 0, 1, 1], [2, 0, 12, 10]]
OTHERS = [[20.0, 0, 30, 10], [7, 7, 9, 9], [2, 0, 12, 10]]


def heads(background=False):
    student = plain_predictions(STUDENT, BOXES, background=background)
    return student, plain_predictions(TEACHER, OTHERS, background=background)


@pytest.mark.parametrize(
    "mode, beta, expected",
    [("L1", 0.0, (1 + 1 + 2) / 2), ("L1", 2.0, (0.25 + 0.25 + 1) / 2), ("L2", 0.0, (1 + 1 + 4) / 2)],
)
def test_cls_modes(mode, beta, expected):
    for background in (False, True):
        loss = cls_term(*heads(background), MASK, mode=mode, beta=beta)
        assert loss.item() == pytest.approx(expected)


def test_cls_bce_is_torchs():
    bce = F.binary_cross_entropy_with_logits
    theirs, ours = torch.tensor(TEACHER)[[0, 2]], torch.tensor(STUDENT)[[0, 2]]
    expected = bce(ours, theirs.sigmoid(), reduction="sum") / 2
    close(cls_term(*heads(), MASK), expected)


def test_cross_entropy_counts_the_background():
    teacher = plain_predictions([[0.0, math.log(3)]], BOXES[:1], background=True)
    student = plain_predictions([[0.0, 2 * math.log(3)]], BOXES[:1], background=True)
    loss = cls_term(student, teacher, MASK[:, :1])
    assert loss.item() == pytest.approx(0.75 * math.log(10 / 9) + 0.25 * math.log(10))


@pytest.mark.parametrize(
    "mode, beta, expected", [("L1", 0.0, 40 / 2), ("L1", 20.0, 20 / 2), ("L2", 0.0, 800 / 2)]
)
def test_reg_modes(mode, beta, expected):
    loss = reg_term(*heads(), MASK, mode=mode, beta=beta)
    assert loss.item() == pytest.approx(expected)


def test_giou_is_of_the_decoded_boxes():
    """10 pixels between two boxes of 10: 1 + 1/3; and two equal ones."""
    loss = reg_term(*heads(), MASK, mode="GIoU")
    assert loss.item() == pytest.approx((1 + 1 / 3) / 2)


def test_deltas_of_the_class_that_the_teacher_ranks_highest():
    student = plain_predictions([[9.0, 0, 0]], [[1.0] * 4 + [2.0] * 4], background=True)
    teacher = plain_predictions([[0.0, 1, 9]], [[10.0] * 4 + [20.0] * 4], background=True)
    loss = reg_term(student, teacher, MASK[:, :1])
    assert loss.item() == pytest.approx(4 * 18)


def test_student_without_boxes_of_each_class():
    student = plain_predictions([[9.0, 0, 0]], [[1.0] * 4], background=True)
    teacher = plain_predictions([[0.0, 1, 9]], [[10.0] * 4 + [20.0] * 4], background=True)
    assert reg_term(student, teacher, MASK[:, :1]).item() == pytest.approx(4 * 19)
    assert reg_term(teacher, student, MASK[:, :1]).item() == pytest.approx(4 * 9)


@pytest.mark.parametrize("part, mode, beta", ALL)
@pytest.mark.parametrize("kind", ["points", "classes"])
def test_nothing_masked_is_zero_with_a_gradient(kind, part, mode, beta):
    name = {"cls": "logits", "reg": "deltas"}[part]
    case = Case(**KINDS[kind])
    nothing = torch.zeros(case.rows.anchors.shape[:2], dtype=torch.bool)
    term = terms_of(case, nothing, **{part: (mode, beta)})[name]
    assert term == 0 and term.shape == ()
    gradient = gradient_of(case, name, term)
    assert gradient.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("part, mode, beta", ALL)
def test_equal_heads_have_no_loss(part, mode, beta):
    """But for cross-entropies, whose least value is the teacher's entropy: there is no gradient."""
    name = {"cls": "logits", "reg": "deltas"}[part]
    for kind in ("points", "classes"):
        case = Case(**KINDS[kind])
        with torch.no_grad():
            getattr(case.student, name).copy_(getattr(case.teacher, name))
        term = terms_of(case, random_mask(case), **{part: (mode, beta)})[name]
        gradient = gradient_of(case, name, term)
        close(gradient, torch.zeros_like(gradient), floor=0.1)
        if mode != "BCE":
            close(term, 0.0)


@pytest.mark.parametrize("part, mode, beta", ALL)
def test_gradients_reach_masked_rows_alone(part, mode, beta):
    name = {"cls": "logits", "reg": "deltas"}[part]
    case = Case()
    mask = random_mask(case)
    gradient = gradient_of(case, name, terms_of(case, mask, **{part: (mode, beta)})[name])
    assert torch.equal(gradient.any(dim=2), mask)


# Which rows


def masks(case):
    instances = case.instances()
    found = case.loss.response_masks(case.predictions(case.student), instances, case.batch())
    settings = SimpleNamespace(**{**vars(GID.Settings()), **case.settings})
    expected = naive_masks(case.naive_instances(), case.rows, case.truth, settings)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.bool and ours.shape == case.rows.anchors.shape[:2]
        for row, flags, count in zip(ours, theirs, case.rows.counts):
            assert row[:count].tolist() == flags and not row[count:].any()
    return found


@pytest.mark.parametrize("reg_mask", ["gi", "gi_pos"])
@pytest.mark.parametrize("mask", ["matcher", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_naive_masks(kind, mask, reg_mask):
    settings = {"response_mask": mask, "response_reg_mask": reg_mask}
    case = Case(seed=1, objects=(4, 3), **settings, **KINDS[kind])
    cls, reg = masks(case)
    assert cls.any() and not cls.all() and reg.any()
    assert torch.equal(cls, reg) == (reg_mask == "gi")


@pytest.mark.parametrize("reg_mask", ["gi", "gi_pos"])
@pytest.mark.parametrize("mask", ["matcher", "inside"])
def test_masks_without_ground_truth_or_instances(mask, reg_mask):
    settings = {"response_mask": mask, "response_reg_mask": reg_mask}
    cls, reg = masks(Case(objects=(0, 1), **settings))
    assert cls[0].any() and reg[0].any() == (reg_mask == "gi")
    cls, reg = masks(Case(objects=(0, 1), gi_min_side=1000.0, **settings))
    assert not cls.any() and not reg.any()
    masks(Case(proposals=(9, 4), objects=(0, 0), **settings))


@pytest.mark.parametrize("mask", ["matcher", "inside"])
def test_empty_slots_have_no_rows(mask):
    """Whatever box is in them."""
    case = Case(response_mask=mask)
    boxes, valid = pad_instances(case.naive_instances(), 12)
    instances = replace(case.instances(), boxes=boxes, valid=valid)
    student, batch = case.predictions(case.student), case.batch()
    found = case.loss.response_masks(student, instances, batch)[0]
    boxes[~valid] = torch.tensor([0.0, 0, 96, 64])
    assert torch.equal(case.loss.response_masks(student, instances, batch)[0], found)


@pytest.mark.parametrize("mask", ["matcher", "inside"])
def test_rows_that_fill_up_belong_to_no_instance(mask):
    """Even if they lay where one is."""
    case = Case(seed=1, response_mask=mask, **KINDS["proposals"])
    instances = case.instances()
    case.rows.anchors[1, 13:] = instances.boxes[1, 0]
    found = case.loss.response_masks(case.predictions(case.student), instances, case.batch())[0]
    assert found[1, :13].any() and not found[1, 13:].any()


@pytest.mark.parametrize("reg_mask", ["gi", "gi_pos"])
@pytest.mark.parametrize("mask", ["matcher", "inside"])
def test_masks_do_not_synchronise(mask, reg_mask):
    case = Case(objects=(2, 0), response_mask=mask, response_reg_mask=reg_mask)
    instances, student, batch = case.instances(), case.predictions(case.student), case.batch()
    with no_synchronization():
        case.loss.response_masks(student, instances, batch)
