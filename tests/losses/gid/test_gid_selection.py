"""Which boxes are general instances: at the limits, by the naive selection, and by torchvision's NMS."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from gid_case import Case, close, plain_predictions

from distill_d2.losses.gid import GeneralInstanceSelection
from distill_d2.losses.gid.selection import first_kept

A, B, FAR = [0, 0, 20, 20], [0, 0, 20, 50], [60, 60, 90, 90]  # IoU of A and B is 0.4
ODDS = {0.5: 0.0, 0.9: math.log(9), 0.2: -math.log(4), 0.6: math.log(1.5)}


def select(teacher, student, boxes=(A,), student_boxes=None, **options):
    """Of one image, from probabilities (R, K) and boxes (R, 4)."""
    teacher, student = ([[ODDS[p] for p in row] for row in rows] for rows in (teacher, student))
    of_teacher, of_student = (
        plain_predictions(teacher, boxes),
        plain_predictions(student, student_boxes or boxes),
    )
    return GeneralInstanceSelection(**options)(of_teacher, of_student, [(100, 100)])


def rows(instances):
    return instances.rows[instances.valid].tolist()


# Against the naive version

KINDS = {
    "anchors": {},
    "points": {"ltrb": True, "centerness": True},
    "centerness": {"ltrb": True, "centerness": True, "gi_centerness": True},
    "proposals": {"proposals": (30, 17, 9)},
    "classes": {"proposals": (30, 17, 9), "class_specific": True},
}


def compare(case):
    found = case.instances()
    for image, expected in enumerate(case.naive_instances()):
        count = len(expected.boxes)
        assert found.valid[image].tolist() == [slot < count for slot in range(found.valid.shape[1])]
        close(found.boxes[image, :count], expected.boxes, "boxes")
        close(found.scores[image, :count], expected.scores, "scores")
        assert torch.equal(found.rows[image, :count], expected.rows)
        assert torch.equal(found.from_teacher[image, :count], expected.from_teacher)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert not found.boxes.requires_grad and not found.scores.requires_grad


@pytest.mark.parametrize("score", ["classwise", "max_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_naive_selection(kind, score):
    compare(Case(seed=1, objects=(2, 0, 1), gi_score=score, **KINDS[kind]))


@pytest.mark.parametrize("seed", range(10, 22))
def test_naive_selection_of_random_settings(seed):
    random = np.random.default_rng(seed)
    compare(
        Case(
            seed=seed,
            objects=random.integers(0, 4, random.integers(1, 4)).tolist(),
            padded=tuple((32 * random.integers(2, 4, 2)).tolist()),
            strides=(8, 16, 32)[int(random.integers(0, 3)) :],
            classes=int(random.integers(1, 6)),
            gi_score=str(random.choice(["classwise", "max_first"])),
            gi_nms_thresh=float(random.choice([0.0, 0.3, 0.7, 1.0])),
            gi_pre_nms_topk=int(random.choice([5, 40, 3000])),
            gi_post_nms_topk=int(random.choice([1, 3, 10, 400])),
            gi_min_side=float(random.choice([0, 10, 30])),
        )
    )


# By hand: at the limits


def test_equally_confident_is_the_students():
    found = select([[0.9, 0.2]], [[0.2, 0.9]], [A], [FAR])
    assert not found.from_teacher[0, 0] and found.boxes[0, 0].tolist() == FAR
    assert found.scores[0, 0].item() == pytest.approx(0.7)


def test_agreement_is_no_instance():
    """A score of exactly 0; with "max_first" also where they are as confident of other classes."""
    assert rows(select([[0.9, 0.5]], [[0.9, 0.5]])) == []
    assert rows(select([[0.9, 0.2]], [[0.2, 0.9]], score="max_first")) == []
    assert rows(select([[0.9], [0.5]], [[0.9], [0.2]], [A, FAR])) == [1]


def test_sides_must_be_larger_than_the_least():
    boxes = [[0, 0, 10, 20], [0, 30, 20, 40], [0, 50, 10.01, 60.01], [30, 0, 40, 10]]
    teacher, student = [[0.9]] * 4, [[0.2]] * 4
    assert rows(select(teacher, student, boxes)) == [2]
    assert sorted(rows(select(teacher, student, boxes, min_side=9.99))) == [0, 1, 2, 3]


def test_boxes_are_clipped_before_they_are_measured():
    boxes = [[-20, -5, 30, 11], [85, 20, 130, 60], [95, 70, 140, 99], [70, 91, 99, 140]]
    found = select([[0.9]] * 4, [[0.2]] * 4, boxes)
    assert found.boxes[found.valid].tolist() == [[0, 0, 30, 11], [85, 20, 100, 60]]


def test_nms_threshold_itself_is_kept():
    """IoU 0.4; compared in float32, as both are."""
    teacher, student = [[0.9], [0.6]], [[0.2], [0.2]]
    assert rows(select(teacher, student, [B, A], nms_thresh=0.4)) == [0, 1]
    assert rows(select(teacher, student, [B, A], nms_thresh=0.39)) == [0]


def test_rows_that_fill_up_are_no_instances():
    valid = torch.tensor([[True, False]])
    models = [plain_predictions([[odds]] * 2, [A, FAR], valid=valid) for odds in (2.0, 0.0)]
    assert rows(GeneralInstanceSelection()(*models, [(100, 100)])) == [0]


# What is not finite

BEST = 7  # a row whose score is the highest


def spoilt(value, part, where=slice(None), **settings):
    """A case in which both models' most disputed row has this value."""
    case = Case(seed=3, objects=(1, 1), gi_nms_thresh=0.0, **settings)
    with torch.no_grad():
        case.teacher.logits[0, BEST], case.student.logits[0, BEST] = 6.0, -9.0
        for model in (case.teacher, case.student):
            getattr(model, part)[0, BEST, where] = value
    return case


SPOILT = [
    (float("nan"), "logits", slice(None)),
    (float("nan"), "logits", 1),
    (float("nan"), "deltas", 0),
    (float("nan"), "deltas", 3),
    (float("inf"), "deltas", slice(None)),
    (float("inf"), "deltas", 2),
    (float("-inf"), "deltas", 3),
]


@pytest.mark.parametrize("ltrb", [False, True])
@pytest.mark.parametrize("value, part, where", SPOILT)
def test_what_is_not_finite_is_no_instance(value, part, where, ltrb):
    """Even where it would be the best, and its row fills the empty slots."""
    good = spoilt(0.5 * ltrb, "deltas", ltrb=ltrb).instances()  # the anchor itself
    assert good.rows[0, 0] == BEST
    case = spoilt(value, part, where, ltrb=ltrb)
    found = case.instances()
    assert BEST not in rows(found)[: found.valid[0].sum()]
    assert found.boxes.isfinite().all() and not found.valid.all()
    for features in case.loss.pooled(*case.views(), found):
        assert features.isfinite().all()
    assert torch.equal(found.boxes[1], good.boxes[1])  # the other image


@pytest.mark.parametrize("score", ["classwise", "max_first"])
def test_not_a_number_of_one_model_only(score):
    for model in ("teacher", "student"):
        case = Case(gi_score=score)
        with torch.no_grad():
            getattr(case, model).logits[0, ::2, 1] = float("nan")
        found = case.instances()
        assert all(row % 2 for row in rows(found)[: found.valid[0].sum()]) and found.valid[0].any()
        assert found.scores[found.valid].isfinite().all()


def test_infinite_logits_of_a_softmax_are_no_instance():
    case = Case(proposals=(12, 12))
    with torch.no_grad():
        case.teacher.logits[0, :, 0] = float("inf")
    found = case.instances()
    assert not found.valid[0].any() and found.valid[1].any()


# Layouts


def test_memory_layout_does_not_matter():
    """Levels as convolutions give them: positions last."""
    case = Case(centerness=True, gi_centerness=True)
    heads = [case.predictions(model) for model in (case.teacher, case.student)]

    def positions_last(p):
        move = lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # noqa: E731
        parts = ("logit_levels", "delta_levels", "centerness_levels")
        return replace(p, **{name: [move(x) for x in getattr(p, name)] for name in parts})

    found = case.loss.select(*heads, case.sizes)
    other = case.loss.select(*map(positions_last, heads), case.sizes)
    assert torch.equal(found.boxes, other.boxes) and torch.equal(found.rows, other.rows)


# NMS


def boxes_on_a_grid(count, generator):
    """Overlaps and scores with many ties."""
    corner = torch.randint(0, 6, (count, 2), generator=generator) * 4.0
    return torch.cat([corner, corner + torch.randint(1, 4, (count, 2), generator=generator) * 8.0], 1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 4, 60])
def test_nms_is_torchvisions(threshold, count, ties):
    generator = torch.Generator().manual_seed(count)
    images = []
    for _ in range(4):
        if ties:
            boxes = boxes_on_a_grid(50, generator)
            scores = torch.randint(0, 9, (50,), generator=generator).float()
        else:
            corner = torch.rand(50, 2, generator=generator) * 60
            boxes = torch.cat([corner, corner + 5 + torch.rand(50, 2, generator=generator) * 40], dim=1)
            scores = torch.rand(50, generator=generator)
        scores, order = scores.sort(descending=True, stable=True)
        images.append((boxes[order], scores))
    boxes, scores = map(torch.stack, zip(*images))
    usable = torch.rand(4, 50, generator=generator) < 0.8
    usable[3] = False
    given = usable.clone()
    picked, valid = first_kept(boxes, usable, threshold, count)
    assert picked.shape == valid.shape == (4, count) and torch.equal(usable, given)
    for image in range(4):
        left = usable[image].nonzero()[:, 0]
        kept = torchvision.ops.nms(boxes[image, left], scores[image, left], threshold)[:count]
        assert picked[image, valid[image]].tolist() == left[kept].tolist()
        assert valid[image].tolist() == [i < len(kept) for i in range(count)]  # the rest at the end


def test_boxes_without_area_do_not_suppress():
    point = [[5.0, 5, 5, 5], [5, 5, 5, 5], A, [3, 3, 3, 30]]
    picked, valid = first_kept(torch.tensor([point]), torch.ones(1, 4, dtype=torch.bool), 0.3, 4)
    assert picked[valid].tolist() == [0, 1, 2, 3]
