"""Which boxes are general instances: the package's selection, the naive one, and torchvision's NMS."""

import functools
import math
from dataclasses import replace

import naive_gid as naive
import numpy as np
import pytest
import torch
import torchvision
from gid_case import Case, close, pad_instances, permuted_images, plain_predictions

from distill_d2.losses.gid import GeneralInstanceSelection
from distill_d2.losses.gid.selection import first_kept
from distill_d2.testing.synchronization import no_synchronization

SIZE = [(100, 100)]
WHOLE = ((64, 96), (64, 96))  # without padding, so that every box of Case has an area
A, B, FAR = [0, 0, 20, 20], [0, 0, 20, 50], [60, 60, 90, 90]  # IoU of A and B is 0.4
ODDS = {0.5: 0.0, 0.9: math.log(9), 0.2: -math.log(4), 0.6: math.log(1.5)}


def logits(*rows):
    return [[ODDS[p] for p in row] for row in rows]


def select(teacher, student, boxes=(A,), student_boxes=None, **options):
    """Of one image, from probabilities (R, K) and boxes (R, 4)."""
    selection = GeneralInstanceSelection(**options)
    theirs = plain_predictions(logits(*teacher), boxes)
    ours = plain_predictions(logits(*student), student_boxes or boxes)
    return selection(theirs, ours, SIZE)


def gaps(teacher, student, **options):
    scores, from_teacher = GeneralInstanceSelection(**options).gaps(teacher, student)
    return scores[0].tolist(), from_teacher[0].tolist()


def rows(instances):
    return instances.rows[instances.valid].tolist()


# Against the naive version


def compare(case):
    found, expected = case.instances(), case.naive_instances()
    boxes, valid = pad_instances(expected, found.valid.shape[1])
    assert torch.equal(found.valid, valid)
    close(found.boxes[valid], boxes[valid], "boxes")
    flat = [instance for image in expected for instance in image]
    close(found.scores[valid], torch.tensor([float(i.score) for i in flat]), "scores")
    assert found.rows[valid].tolist() == [i.row for i in flat]
    assert found.from_teacher[valid].tolist() == [i.from_teacher for i in flat]
    return found


KINDS = {
    "anchors": {},
    "points": {"ltrb": True, "centerness": True},
    "centerness": {"ltrb": True, "centerness": True, "gi_centerness": True},
    "proposals": {"proposals": (30, 17, 9)},
    "classes": {"proposals": (30, 17, 9), "class_specific": True},
}


@pytest.mark.parametrize("score", ["classwise", "max_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_naive_selection(kind, score):
    compare(Case(seed=1, objects=(2, 0, 1), gi_score=score, **KINDS[kind]))


@pytest.mark.parametrize("seed", range(10, 18))
def test_naive_selection_of_random_settings(seed):
    random = np.random.default_rng(seed)
    found = compare(
        Case(
            seed=seed,
            objects=random.integers(0, 4, random.integers(1, 4)).tolist(),
            padded=tuple((32 * random.integers(2, 4, 2)).tolist()),
            strides=(8, 16, 32)[int(random.integers(0, 3)) :],
            classes=int(random.integers(1, 6)),
            gi_score=str(random.choice(["classwise", "max_first"])),
            gi_nms_thresh=float(random.choice([0.0, 0.3, 0.7, 1.0])),
            gi_pre_nms_topk=int(random.choice([5, 40, 3000])),
            gi_post_nms_topk=int(random.choice([1, 3, 10])),
            gi_min_side=float(random.choice([0, 10, 30])),
        )
    )
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.rows.dtype == torch.int64


@pytest.mark.parametrize("count", [1, 2, 7, 400])
def test_never_more_than_k_instances(count):
    found = Case(sizes=WHOLE, gi_post_nms_topk=count, gi_nms_thresh=1.0, gi_min_side=0.0).instances()
    assert found.boxes.shape == (2, count, 4)
    for name in ("scores", "rows", "from_teacher", "valid"):
        assert getattr(found, name).shape == (2, count)
    assert found.valid.sum(dim=1).tolist() == [min(count, 252)] * 2


@pytest.mark.parametrize("count", [1, 5, 60])
def test_pre_nms_topk_is_of_each_image(count):
    settings = {"gi_nms_thresh": 1.0, "gi_min_side": 0.0, "gi_post_nms_topk": 80}
    case = Case(sizes=WHOLE, gi_pre_nms_topk=count, **settings)
    assert case.instances().valid.sum(dim=1).tolist() == [count] * 2


# By hand


@pytest.mark.parametrize("score, expected", [("classwise", 0.7), ("max_first", 0.4)])
def test_scores_of_different_classes(score, expected):
    found = select([[0.9, 0.2]], [[0.2, 0.5]], score=score)
    assert found.scores[0, 0].item() == pytest.approx(expected) and rows(found) == [0]
    assert found.from_teacher[0, 0]


def test_box_of_the_surer_model():
    found = select([[0.5], [0.2]], [[0.2], [0.9]], [A, A], [FAR, FAR])
    assert rows(found) == [1, 0] and found.from_teacher[found.valid].tolist() == [False, True]
    assert found.boxes[found.valid].tolist() == [FAR, A]


def test_equally_sure_is_the_students():
    found = select([[0.9, 0.2]], [[0.2, 0.9]], [A], [FAR])
    assert not found.from_teacher[0, 0] and found.boxes[0, 0].tolist() == FAR
    assert found.scores[0, 0].item() == pytest.approx(0.7)


def test_agreement_is_no_instance():
    """A score of exactly 0; with "max_first" also where they are as sure of other classes."""
    assert rows(select([[0.9, 0.5]], [[0.9, 0.5]])) == []
    assert rows(select([[0.9, 0.2]], [[0.2, 0.9]], score="max_first")) == []
    found = select([[0.9], [0.5]], [[0.9], [0.2]], [A, FAR])
    assert rows(found) == [1]


def test_softmax_without_background():
    """0.2, 0.1 and 0.7 of background against 0.5, 0.1 and 0.4; the classes decide which box."""
    teacher, student = ([[math.log(p) for p in row]] for row in ([0.2, 0.1, 0.7], [0.5, 0.1, 0.4]))
    predictions = [plain_predictions(x, [A], background=True) for x in (teacher, student)]
    for score in ("classwise", "max_first"):
        (gap,), from_teacher = gaps(*predictions, score=score)
        assert gap == pytest.approx(0.3) and from_teacher == [False]


def test_centerness_multiplies_both():
    weights = [torch.tensor([0.0, math.log(3)]), torch.tensor([math.log(3), 0.0])]  # 1/2, 3/4
    models = []
    for p, weight in zip((0.5, 0.9), weights):
        own = {"centerness_levels": [weight[None, :, None, None]]}
        models.append(plain_predictions(logits([p], [p]), [A, FAR], **own))
    for score in ("classwise", "max_first"):
        scores, from_teacher = gaps(*models, score=score, centerness=True)
        assert scores == pytest.approx([0.9 * 0.75 - 0.25, 0.45 - 0.375])
        assert from_teacher == [False, False]
        assert gaps(*models, score=score)[0] == pytest.approx([0.4, 0.4])


def test_centerness_of_heads_without():
    models = [plain_predictions(logits([p]), [A]) for p in (0.9, 0.5)]
    assert gaps(*models, centerness=True) == gaps(*models)


def test_rows_that_fill_up_are_no_instances():
    valid = torch.tensor([[True, False]])
    models = [plain_predictions(logits([p], [p]), [A, FAR], valid=valid) for p in (0.9, 0.5)]
    assert gaps(*models)[0] == pytest.approx([0.4, -1])
    assert rows(GeneralInstanceSelection()(*models, SIZE)) == [0]


def test_sides_must_be_larger_than_the_least():
    boxes = [[0, 0, 10, 20], [0, 30, 20, 40], [0, 50, 10.01, 60.01], [30, 0, 40, 10]]
    teacher, student = [[0.9]] * 4, [[0.2]] * 4
    assert rows(select(teacher, student, boxes)) == [2]
    assert sorted(rows(select(teacher, student, boxes, min_side=9.99))) == [0, 1, 2, 3]


def test_boxes_are_clipped_before_they_are_measured():
    boxes = [[-20, -5, 30, 11], [85, 20, 130, 60], [95, 70, 140, 99], [70, 91, 99, 140]]
    found = select([[0.9]] * 4, [[0.2]] * 4, boxes)
    assert found.boxes[found.valid].tolist() == [[0, 0, 30, 11], [85, 20, 100, 60]]


def test_each_image_is_clipped_to_its_own_size():
    model = plain_predictions(logits([0.9]), [[10, 20, 500, 500]])
    other = plain_predictions(logits([0.2]), [[10, 20, 500, 500]])
    two = lambda p: replace(  # noqa: E731
        p, **{n: [x.repeat(2, 1, 1, 1) for x in getattr(p, n)] for n in ("logit_levels", "delta_levels")}
    )
    found = GeneralInstanceSelection()(two(model), two(other), [(50, 80), (90, 30)])
    assert found.boxes[:, 0].tolist() == [[10, 20, 80, 50], [10, 20, 30, 90]]


def test_nms_threshold_itself_is_kept():
    """IoU 0.4; compared in float32, as both are."""
    teacher, student = [[0.9], [0.6]], [[0.2], [0.2]]
    assert rows(select(teacher, student, [B, A], nms_thresh=0.4)) == [0, 1]
    assert rows(select(teacher, student, [B, A], nms_thresh=0.39)) == [0]


def test_nms_is_by_score_across_levels():
    teacher = plain_predictions(logits([0.6], [0.9], [0.6]), [A, B, FAR])
    student = plain_predictions(logits([0.2], [0.2], [0.2]), [A, B, FAR])
    split = lambda p: replace(  # noqa: E731
        p,
        logit_levels=list(p.logit_levels[0].split([1, 2], dim=1)),
        delta_levels=list(p.delta_levels[0].split([1, 2], dim=1)),
    )
    found = GeneralInstanceSelection()(split(teacher), split(student), SIZE)
    assert rows(found) == [1, 2]


def test_boxes_of_the_class_that_each_ranks_highest():
    """Two classes with boxes of their own: the teacher's second; the student prefers the first."""
    deltas = [[*A, *B]], [[*FAR, *A]]
    teacher = plain_predictions([[1.0, 5.0, 0.0]], deltas[0], background=True)
    student = plain_predictions([[2.0, 1.0, 9.0]], deltas[1], background=True)
    found = GeneralInstanceSelection()(teacher, student, SIZE)
    assert found.from_teacher[0, 0] and found.boxes[0, 0].tolist() == B
    found = GeneralInstanceSelection()(student, teacher, SIZE)
    assert not found.from_teacher[0, 0] and found.boxes[0, 0].tolist() == B


# What is not finite

BEST = 7  # a row whose score is the highest


def spoilt(value, part, where=slice(None), seed=3, **settings):
    """A case in which both models' most disputed row has this value."""
    case = Case(seed=seed, objects=(1, 1), gi_nms_thresh=0.0, **settings)
    with torch.no_grad():
        case.teacher.logits[0, BEST], case.student.logits[0, BEST] = 6.0, -9.0
        for model in (case.teacher, case.student):
            getattr(model, part)[0, BEST, where] = value
    return case


SPOILT = [
    (float("nan"), "logits", slice(None)),
    (float("nan"), "logits", 1),
    (float("nan"), "deltas", slice(None)),
    (float("nan"), "deltas", 0),
    (float("nan"), "deltas", 3),
    (float("inf"), "deltas", slice(None)),
    (float("inf"), "deltas", 0),
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


# Properties


def test_order_of_images_does_not_matter():
    case, order = Case(objects=(2, 1, 0)), [2, 0, 1]
    found, other = case.instances(), permuted_images(case, order).instances()
    for name in ("boxes", "scores", "rows", "from_teacher", "valid"):
        assert torch.equal(getattr(found, name)[order], getattr(other, name)), name


def test_order_of_levels_does_not_matter():
    case = Case(centerness=True, gi_centerness=True)
    heads = [case.predictions(model) for model in (case.teacher, case.student)]
    sizes, order = heads[0].level_sizes, [2, 0, 1]

    def permuted(p):
        parts = ("logit_levels", "delta_levels", "centerness_levels")
        anchors = p.anchors.split(sizes)
        return replace(
            p,
            anchors=torch.cat([anchors[i] for i in order]),
            **{name: [getattr(p, name)[i] for i in order] for name in parts},
        )

    found = case.loss.select(*heads, case.sizes)
    other = case.loss.select(*map(permuted, heads), case.sizes)
    assert found.valid.all()
    for name in ("boxes", "scores", "from_teacher", "valid"):
        assert torch.equal(getattr(found, name), getattr(other, name)), name
    moved = torch.cat([torch.arange(sum(sizes)).split(sizes)[i] for i in order])
    assert torch.equal(moved[other.rows], found.rows)


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


def test_predictions_are_left_as_they_are_and_get_no_gradient():
    case = Case()
    before = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
    logits = case.teacher.logits.clone()
    found = case.instances()
    assert all(torch.equal(leaf, before[name]) for name, leaf in case.leaves().items())
    assert torch.equal(case.teacher.logits, logits)
    assert not found.boxes.requires_grad and not found.scores.requires_grad


def test_selection_does_not_synchronise():
    for kind in ("centerness", "classes"):
        case = Case(objects=(2, 0, 1), **KINDS[kind])
        heads = case.predictions(case.teacher), case.predictions(case.student)
        with no_synchronization():
            case.loss.select(*heads, case.sizes)


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
    picked, valid = first_kept(boxes, usable, threshold, count)
    assert picked.shape == valid.shape == (4, count)
    for image in range(4):
        left = usable[image].nonzero()[:, 0]
        kept = torchvision.ops.nms(boxes[image, left], scores[image, left], threshold)[:count]
        assert picked[image, valid[image]].tolist() == left[kept].tolist()
        assert valid[image].tolist() == [i < len(kept) for i in range(count)]  # the rest at the end


def test_nms_changes_nothing_of_its_input():
    boxes, usable = torch.tensor([[A, B, FAR]]).float(), torch.tensor([[True, True, False]])
    first_kept(boxes, usable, 0.3, 3)
    assert usable.tolist() == [[True, True, False]]


def test_boxes_without_area_do_not_suppress():
    point = [[5.0, 5, 5, 5], [5, 5, 5, 5], A, [3, 3, 3, 30]]
    picked, valid = first_kept(torch.tensor([point]), torch.ones(1, 4, dtype=torch.bool), 0.3, 4)
    assert picked[valid].tolist() == [0, 1, 2, 3]


@functools.cache
def one_of_each():
    return Case(seed=2, objects=(3, 3), gi_post_nms_topk=30)


def test_scores_are_in_order():
    found = one_of_each().instances()
    scores = found.scores.where(found.valid, torch.tensor(-1.0))
    assert (scores.diff(dim=1) <= 0).all() and (found.scores[found.valid] > 0).all()


def test_overlaps_are_at_most_the_threshold():
    found = one_of_each().instances()
    for boxes, valid in zip(found.boxes, found.valid):
        kept = naive.numbers(boxes[valid])
        assert all(naive.iou(a, b) <= 0.3 for i, a in enumerate(kept) for b in kept[:i])
