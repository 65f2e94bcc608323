"""SSDKD on given predictions: by hand, against loops, gradients, and its settings."""

import math
from dataclasses import replace

import naive_ssd as ssd
import naive_ssd_kd as naive
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling.box_regression import Box2BoxTransform
from ssd_kd_case import OBJECTS, Head, K, batch, grid, naive_terms, targets, terms_of

from distill_d2 import add_distill_config
from distill_d2.losses.base import build_losses
from distill_d2.losses.ssd_kd import SSDKD
from distill_d2.losses.ssd_kd.terms import (
    mean_of_rows,
    per_batch_bound,
    per_box_bound,
    soft_cross_entropy,
    targets_of,
)
from distill_d2.testing.synchronization import no_synchronization
from distill_d2.views.matching import assign_by_iou
from distill_d2.views.predictions import encoder_of

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


def test_soft_cross_entropy_of_a_certain_teacher_is_the_hard_one():
    student, labels = torch.randn(2, 6, 4), torch.randint(4, (2, 6))
    teacher = 200.0 * F.one_hot(labels, 4)
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none")
    expected = expected.view(2, 6) * torch.where(labels == 3, 1.5, 1.0)
    torch.testing.assert_close(soft_cross_entropy(student, teacher, 1.0, 1.5), expected)


def test_soft_cross_entropy_of_an_object_by_hand():
    """Student 1/3, teacher 3/4."""
    student, teacher = torch.tensor([[-math.log(2)]]), torch.tensor([[math.log(3)]])
    (loss,) = soft_cross_entropy(student, teacher, 1.0, 1.5)
    assert loss.item() == pytest.approx(0.75 * math.log(3) + 1.5 * 0.25 * math.log(1.5))
    (loss,) = soft_cross_entropy(student, teacher, 2.0, 0.0)
    assert loss.item() == pytest.approx(2 * 0.75 * math.log(3))


def test_soft_cross_entropy_of_an_object_is_that_of_two_classes():
    student, teacher = (torch.randn(7, 1) * 3 for _ in range(2))
    pairs = [torch.cat([logits, 0 * logits], dim=1) for logits in (student, teacher)]
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, 0.7, 1.5), soft_cross_entropy(*pairs, 0.7, 1.5)
    )


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


def test_per_box_bound_of_rows_that_count_otherwise():
    assert per_box_bound(*DISTANCES, torch.tensor([[0.5, 1.0, 0.25, 0.0]]), 1.0) == 0.5 * 4 + 0.25 * 9


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


def test_mean_of_rows():
    values = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [math.inf, 9.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    assert mean_of_rows(values, valid) == 20 / 6
    assert mean_of_rows(values[:1], None) == 4
    assert mean_of_rows(values, torch.zeros_like(valid)) == 0


def test_targets_by_loops():
    head = Head()
    objects, background, classes, deltas = targets_of(head.dense(), batch())
    for image, rows in enumerate(targets(head)):
        assert objects[image].nonzero().flatten().tolist() == sorted(rows)
        for row in range(len(head.anchors)):
            label, wanted = rows.get(row, (K, [0.0] * 4))
            assert classes[image, row] == label and background[image, row] == (label == K)
            assert deltas[image, row].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert {label for rows in targets(head) for label, _ in rows.values()} == {0, 1, 2}


def test_assignment():
    """To the box that a row overlaps most, of those that are there."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [2, 0, 10, 10], [0, 0, 8, 10]]])
    rows = torch.tensor([[0.0, 0, 10, 10], [3, 0, 10, 10], [0, 0, 7, 10], [20, 20, 30, 30]])
    for valid, expected in (
        ([True, True, True], [0, 1, 2]),
        ([False, True, True], [1, 1, 2]),
        ([True, False, False], [0, 0, 0]),
    ):
        assert assign_by_iou(boxes, torch.tensor([valid]), rows)[0, :3].tolist() == expected


def test_encoding_is_detectron2s():
    transform = Box2BoxTransform(weights=(10.0, 7.0, 5.0, 3.0))
    anchors, shift = grid(), torch.rand(64, 4) * 5
    found = encoder_of(transform)(anchors.view(2, 32, 4) + shift.view(2, 32, 4), anchors.view(2, 32, 4))
    assert torch.equal(found.view(-1, 4), transform.get_deltas(anchors, anchors + shift))
    empty = torch.zeros(1, 1, 4)  # which detectron2 refuses
    assert encoder_of(transform)(empty, empty).shape == (1, 1, 4)


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


@pytest.mark.parametrize("objects", [[OBJECTS[0], []], [[], OBJECTS[1]]])
def test_one_image_without_objects(objects):
    student, teacher = Head(1), Head(2)
    compare(terms_of(student, teacher, objects), naive_terms(student, teacher, objects))


def test_cases_differ():
    """The bounds let some boxes through, and not all."""
    student, teacher = Head(1), Head(2)
    some, all_of_them, none = (
        naive_terms(student, teacher, margin=margin)[BOUNDED] for margin in (0.0, 1e9, -1e9)
    )
    assert none == 0 and 0.1 * all_of_them < some < 0.9 * all_of_them


def test_weights_and_schedule_are_the_distillers_affair():
    student, teacher = Head(1), Head(2)
    plain = terms_of(student, teacher)
    assert terms_of(student, teacher, weight=7.0, start_iter=3) == plain


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


def test_soft_term_has_no_gradient_where_student_and_teacher_agree():
    """With equal weights of the classes."""
    student, teacher = Head(1), Head(1)
    terms_of(student, teacher, background_weight=1.0)[SOFT].backward()
    assert student.logits.grad.abs().max() < 1e-7
    student.logits.grad = None
    terms_of(student, teacher)[SOFT].backward()
    assert student.logits.grad.abs().max() > 1e-4


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


def test_gradients_by_hand():
    student, teacher = Head(1), Head(2)
    settings = {"mu": 0.4, "temperature": 2.0, "gamma": 0.0}
    sum(terms_of(student, teacher, **settings).values()).backward()
    found = targets(student)
    count = sum(map(len, found))
    logits, deltas = torch.zeros_like(student.logits), torch.zeros_like(student.deltas)
    for i, rows in enumerate(found):
        losses = [
            ssd.cross_entropy(row, rows[r][0] if r in rows else K)
            for r, row in enumerate(student.logits[i].tolist())
        ]
        positive = [r in rows for r in range(len(losses))]
        for r in ssd.hard_negatives(losses, positive, 3) | set(rows):
            pair = student.logits[i, r].tolist(), teacher.logits[i, r].tolist()
            slope = naive.soft(*pair, [1.0] * K + [1.5], 2.0)[1]
            logits[i, r] = 0.6 * torch.tensor(slope) / count
        for r, (_, wanted) in rows.items():
            pair = student.deltas[i, r].tolist(), teacher.deltas[i, r].tolist()
            if naive.bound_per_box(*pair, wanted, 0.0):
                deltas[i, r] = 2 * 0.5 * (student.deltas[i, r] - torch.tensor(wanted)).detach() / count
    torch.testing.assert_close(student.logits.grad, logits, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(student.deltas.grad, deltas, rtol=1e-4, atol=1e-7)
    assert deltas.any() and logits.any(dim=-1).sum() == 4 * count


@pytest.mark.parametrize("bounded", ["box", "batch"])
def test_a_teacher_far_off_has_no_gradient_at_infinity(bounded):
    """Only rows that count are looked at."""
    student, teacher = Head(1), Head(2)
    with torch.no_grad():
        positive = targets_of(student.dense(), batch())[0]
        teacher.deltas[~positive] = 1e30
    terms = terms_of(student, teacher, bounded=bounded, margin=1.0)
    assert terms[BOUNDED].item() == pytest.approx(
        terms_of(student, Head(2), bounded=bounded, margin=1.0)[BOUNDED].item()
    )
    terms[BOUNDED].backward()
    assert student.deltas.grad.isfinite().all()


def test_nothing_waits_for_the_device():
    student, teacher, settings = Head(1), Head(2), {"hint": "logits"}
    for bounded in ("box", "batch"):
        loss, inputs = SSDKD(bounded=bounded, **settings), batch()
        loss.heads = ["dense"]
        with no_synchronization():
            loss(student, teacher, inputs)


# Settings


def test_from_its_node():
    cfg = get_cfg()
    add_distill_config(cfg)
    node = cfg.MODEL.DISTILLER
    node.TYPES = ["SSDKD"]
    node.SSD_KD.MU, node.SSD_KD.HINT, node.SSD_KD.BOUNDED = 0.25, "logits", "batch"
    (loss,) = build_losses(node).values()
    assert type(loss) is SSDKD and loss.pairs is None
    expected = replace(SSDKD.Settings(), mu=0.25, hint="logits", bounded="batch", in_features=[])
    assert loss.settings == expected


def test_hint_of_features_without_weight_has_no_adapters():
    assert SSDKD().pairs is not None and SSDKD().pairs.always
    assert SSDKD(gamma=0.0).pairs is None


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("MU", -0.1, "at least 0 and at most 1"),
        ("MU", 1.1, "at least 0 and at most 1"),
        ("MU", math.nan, "at least 0 and at most 1"),
        ("BACKGROUND_WEIGHT", -1.0, "at least 0"),
        ("OBJECT_WEIGHT", math.inf, "a finite number"),
        ("TEMPERATURE", 0.0, "above 0"),
        ("TEMPERATURE", math.inf, "above 0"),
        ("TEMPERATURE", math.nan, "above 0"),
        ("LMDA", -1.0, "at least 0"),
        ("NU", -1.0, "at least 0"),
        ("MARGIN", math.nan, "a finite number"),
        ("MARGIN", math.inf, "a finite number"),
        ("BOUNDED", "image", "one of ['box', 'batch']"),
        ("GAMMA", -0.5, "at least 0"),
        ("HINT", "features", "one of ['feature', 'logits']"),
        ("HINT_FORM", "L3", "one of ['L2', 'L1']"),
        ("NEGATIVES_PER_POSITIVE", -1.0, "at least 0"),
        ("WEIGHT", -1.0, ""),
    ],
)
def test_wrong_settings_name_their_keys(key, value, expected):
    with pytest.raises(ValueError) as caught:
        SSDKD(**{key.lower(): value})
    message = str(caught.value)
    assert "MODEL.DISTILLER.SSD_KD" in message and f"{key} " in message and str(value) in message
    assert expected in message


@pytest.mark.parametrize("edge", [{"mu": 0.0}, {"mu": 1.0}, {"margin": -2.0}, {"temperature": 1e-3}])
def test_settings_at_the_edge(edge):
    SSDKD(**edge)
