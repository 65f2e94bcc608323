"""HeadKD against a naive version with loops, by hand, and what it refuses of two detectors."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from recorded import c4_config, detector
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from distill_d2.losses.head_kd import HeadKD
from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views import Batch, Predictions, build_view

CLASSES = 3
CLS, REG = "loss_head_kd_cls", "loss_head_kd_reg"
# Two images' boxes with the class of each, 3 where it is background, as a student and as a teacher
# might sample them: of some the same number of rows, so that only the pairing tells them apart.
OURS = [
    ([[0.0, 0, 10, 10], [4, 8, 20, 30], [9, 9, 30, 15]], [2, 3, 0]),
    ([[1.0, 1, 12, 9]], [3]),
]
THEIRS = [
    ([[5.0, 1, 9, 30], [2, 2, 18, 11], [0, 0, 31, 31]], [3, 1, 1]),
    ([[7.0, 3, 21, 17]], [0]),
]


class Head:
    """A box head that scores a box by its coordinates, in the place of a detector's view."""

    def __init__(self, seed, rows=OURS, agnostic=False):
        torch.manual_seed(seed)
        self.logits = nn.Linear(4, CLASSES + 1)
        self.regression = nn.Linear(4, 4 if agnostic else 4 * CLASSES)
        self.boxes = [Boxes(torch.tensor(boxes).reshape(-1, 4)) for boxes, _ in rows]
        self.classes = [torch.tensor(classes, dtype=torch.int64) for _, classes in rows]

    def scores(self, box):
        """One box's logits and deltas."""
        return self.logits(box / 32), self.regression(box / 32)

    def box_head(self, proposals=None, classes=None):
        if proposals is None:
            proposals, classes = self.boxes, self.classes
        boxes = pad_sequence([per_image.tensor for per_image in proposals], batch_first=True)
        counts = torch.tensor([len(per_image) for per_image in proposals])
        valid = torch.arange(boxes.shape[1]) < counts[:, None]
        logits, deltas = self.scores(boxes)
        return Predictions(
            # What fills up counts for nothing, whatever is in it.
            logit_levels=[logits.masked_fill(~valid[..., None], 7.0).unsqueeze(2)],
            delta_levels=[deltas.masked_fill(~valid[..., None], -7.0).unsqueeze(2)],
            anchors=boxes,
            decode=None,
            match=None,
            background=True,
            valid=valid,
            classes=classes and pad_sequence(classes, batch_first=True, padding_value=CLASSES),
        )

    def sampled_proposals(self):
        return self.boxes

    def own_proposals(self, _batch):
        return self.boxes, self.classes


def terms_of(student, teacher, **settings):
    return HeadKD(**settings)(student, teacher, Batch([], (64, 64), 0, 1))


def rows_of(head):
    return [
        (box, int(kind))
        for boxes, classes in zip(head.boxes, head.classes)
        for box, kind in zip(boxes.tensor, classes)
    ]


def softmax(logits, temperature):
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def naive_terms(student, teacher, rows, temperature=1.0, mode="L1", beta=0.0):
    """Both terms, box by box and number by number."""
    divergences, distances = [], []
    for box, kind in rows:
        (s, s_deltas), (t, t_deltas) = student.scores(box), teacher.scores(box)
        p, q = softmax(s.tolist(), temperature), softmax(t.tolist(), temperature)
        divergences.append(sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q)))
        if kind == CLASSES:
            continue
        student_rows, teacher_rows = (
            deltas.tolist() if len(deltas) == 4 else deltas[4 * kind : 4 * kind + 4].tolist()
            for deltas in (s_deltas, t_deltas)
        )
        distances.append(sum(distance(a - b, mode, beta) for a, b in zip(student_rows, teacher_rows)))
    return {
        CLS: temperature**2 * sum(divergences) / len(divergences),
        REG: sum(distances) / max(1, len(distances)),
    }


def distance(d, mode, beta):
    if mode == "L2":
        return d * d
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


def compare(terms, expected):
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.shape == () and term.requires_grad
        assert term.item() == pytest.approx(expected[name], rel=1e-5), name


# Numbers.


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("mode, beta", [("L1", 0.0), ("L1", 0.3), ("L2", 0.0)])
@pytest.mark.parametrize("proposals", ["student", "teacher"])
def test_naive_version(temperature, mode, beta, proposals):
    student, teacher = Head(1), Head(2, THEIRS)
    settings = {"reg_mode": mode, "reg_smooth_l1_beta": beta}
    terms = terms_of(student, teacher, proposals=proposals, temperature=temperature, **settings)
    rows = rows_of(student if proposals == "student" else teacher)
    expected = naive_terms(student, teacher, rows, temperature, mode, beta)
    assert all(value > 0.01 for value in expected.values())
    compare(terms, expected)


@pytest.mark.parametrize("agnostic", [(True, True), (True, False), (False, True)])
def test_deltas_that_classes_share(agnostic):
    """By the student, by the teacher, or by both."""
    student, teacher = Head(1, agnostic=agnostic[0]), Head(2, agnostic=agnostic[1])
    compare(terms_of(student, teacher), naive_terms(student, teacher, rows_of(student)))


def test_by_hand():
    """Teacher (3/4, 1/4) and student (1/2, 1/2) of an object, equal of the background."""
    student, teacher = (Head(0, [([[0.0, 0, 8, 8], [8, 8, 16, 16]], [0, 1])]) for _ in range(2))
    of_student = [[0.0, 0.0], [5.0, 1.0]], [[1.0, 2, -3, 4], [9, 9, 9, 9]]
    of_teacher = [[math.log(3), 0.0], [5.0, 1.0]], [[0.0, 0, 0, 0], [-9, -9, -9, -9]]
    for head, (logits, deltas) in ((student, of_student), (teacher, of_teacher)):
        head.box_head = lambda *_, logits=logits, deltas=deltas: Predictions(
            logit_levels=[torch.tensor(logits, requires_grad=True)[None, :, None]],
            delta_levels=[torch.tensor(deltas, requires_grad=True)[None, :, None]],
            anchors=None,
            decode=None,
            match=None,
            background=True,
            valid=torch.ones(1, 2, dtype=torch.bool),
            classes=torch.tensor([[0, 1]]),
        )
    divergence = 0.75 * math.log(1.5) - 0.25 * math.log(2)  # 0.1308
    compare(terms_of(student, teacher), {CLS: divergence / 2, REG: 10.0})
    l2 = terms_of(student, teacher, reg_mode="L2", weight=5.0)  # WEIGHT is the Distiller's affair
    compare(l2, {CLS: divergence / 2, REG: 30.0})
    smooth = terms_of(student, teacher, reg_smooth_l1_beta=2.0)[REG]
    assert smooth.item() == pytest.approx(0.25 + 1 + 2 + 3)
    # With T = 2 the teacher's ratio is the root of 3.
    q = math.sqrt(3) / (1 + math.sqrt(3))
    soft = 4 * (q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q)))
    assert terms_of(student, teacher, temperature=2.0)[CLS].item() == pytest.approx(soft / 2, rel=1e-5)


def test_weights_of_the_terms():
    student, teacher = Head(1), Head(2)
    plain = terms_of(student, teacher)
    weighted = terms_of(student, teacher, cls_weight=0.5, reg_weight=3.0)
    compare(weighted, {CLS: 0.5 * plain[CLS].item(), REG: 3 * plain[REG].item()})


# Settings.


def test_both_terms_off():
    message = r"HEAD_KD\.CLS_WEIGHT is 0\.0; expected CLS_WEIGHT or REG_WEIGHT above 0"
    with pytest.raises(ValueError, match=message):
        HeadKD(cls_weight=0.0, reg_weight=0.0)


# What it refuses of two detectors.


def configured(*options):
    cfg = tiny_config("faster")
    cfg.merge_from_list(list(options))
    return build_model(cfg)


OTHERS = {
    "retinanet": (lambda: tiny_detector("retinanet"), "a RetinaNet, which has no box_head()"),
    "fcos": (lambda: tiny_detector("fcos"), "a FCOS, which has no box_head()"),
    "cascade": (
        lambda: configured(
            *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
            *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        ),
        "which has no box_head()",
    ),
    "c4": (lambda: build_model(c4_config()), "which has no box_head()"),
}


def bind(student, teacher, **settings):
    student, teacher = build_view(student, "student"), build_view(teacher, "teacher")
    HeadKD(**settings).bind(student, teacher)
    return student, teacher


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("other", list(OTHERS))
def test_detectors_without_such_a_head(other, role):
    build, message = OTHERS[other]
    models = {"student": detector("faster"), "teacher": detector("mask"), role: build()}
    with pytest.raises(TypeError) as caught:
        bind(**models)
    text = str(caught.value)
    assert text.startswith("MODEL.DISTILLER.HEAD_KD: ") and f"the {role} is " in text and message in text
    assert "Faster and Mask R-CNN with FPN, not C4 or cascade" in text


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_sigmoids(role):
    options = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    models = {"student": detector("faster"), "teacher": detector("faster"), role: configured(*options)}
    with pytest.raises(ValueError, match=rf"the {role}'s box head .*USE_SIGMOID_CE is True"):
        bind(**models)


def test_other_coding_of_boxes():
    """Of no concern where boxes are not compared."""
    student, teacher = (
        detector("faster"),
        configured("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", [20.0, 20.0, 10.0, 10.0]),
    )
    message = r"HEAD_KD compares the box_head .* their box parametrizations differ.*BBOX_REG_WEIGHTS"
    with pytest.raises(ValueError, match=message):
        bind(student, teacher)
    bind(student, teacher, reg_weight=0.0)


@pytest.mark.parametrize("proposals, own", [("student", False), ("teacher", True)])
def test_what_it_requires(proposals, own):
    student, teacher = bind(detector("faster"), detector("mask"), proposals=proposals)
    assert student.required == {"box_head"}
    assert teacher.required == {"box_head"} | ({"own_proposals"} if own else set())


def test_teacher_that_cannot_propose():
    precomputed = configured("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    bind(detector("faster"), precomputed)
    with pytest.raises(TypeError, match=r"HEAD_KD: the teacher is a .* has no own_proposals\(\)"):
        bind(detector("faster"), precomputed, proposals="teacher")
