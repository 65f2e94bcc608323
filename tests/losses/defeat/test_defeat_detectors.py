"""DeFeat, FGFI and HeadKD in a Distiller of real detectors: whole steps, numbers from what the heads
computed, what runs, and which detectors they refuse."""

import contextlib
import functools
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from recorded import detector
from test_distiller import count_calls, step
from test_gid_response import as_on_a_gpu  # noqa: F401  a fixture
from test_head_kd import c4_config

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.distiller import Distiller
from distill_d2.losses import head_kd
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.defeat import loss as defeat_loss
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.gid import GID
from distill_d2.losses.head_kd import HeadKD
from distill_d2.teacher import Teacher
from distill_d2.testing.synchronization import no_synchronization
from distill_d2.testing.tiny import tiny_batch, tiny_config, tiny_detector

ROOT = Path(__file__).resolve().parents[3]
RPN, BOX_HEAD, MASK_HEAD = "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"
NO_NECK = {"hint_neck_w": 0.0, "hint_neck_back_w": 0.0}
STAGES = {"hint_bb_w": 1.0, "hint_bb_back_w": 4.0, "bb_features": ["res3", "res4"]}
CLASSES = {"head_cls_w": 2.0, "head_cls_back_w": 3.0}
NECK_TERMS = {"loss_defeat_neck", "loss_defeat_neck_back"}
STAGE_TERMS = {"loss_defeat_bb", "loss_defeat_bb_back"}
CLASS_TERMS = {"loss_defeat_hcls", "loss_defeat_hcls_back"}
BOTH_TERMS = CLASS_TERMS | {f"{name}_teacher" for name in CLASS_TERMS}
HEAD_KD_TERMS = {"loss_head_kd_cls", "loss_head_kd_reg"}

# Losses of features alone, for all pairs; of dense heads; and of box heads: the names of their terms.
FEATURES = {
    "neck": (functools.partial(DeFeat), NECK_TERMS),
    "stages": (functools.partial(DeFeat, **STAGES, bb_adapt=True), NECK_TERMS | STAGE_TERMS),
    "roi": (functools.partial(DeFeat, mask="roi", neck_adapt=False), NECK_TERMS),
    "gaussian": (functools.partial(DeFeat, mask="gaussian", level_assign="all"), NECK_TERMS),
    "fgfi": (functools.partial(FGFI), {"loss_fgfi"}),
}
DENSE = {
    "dense": (functools.partial(DeFeat, **CLASSES), NECK_TERMS | CLASS_TERMS),
    "all": (
        functools.partial(DeFeat, **NO_NECK, head_cls_w=1.0, head_cls_rows="all"),
        {"loss_defeat_hcls"},
    ),
}
HEADS = {
    "student": (functools.partial(DeFeat, **CLASSES), NECK_TERMS | CLASS_TERMS),
    "teacher": (functools.partial(DeFeat, **NO_NECK, **CLASSES, proposals="teacher"), CLASS_TERMS),
    "both": (functools.partial(DeFeat, **NO_NECK, **CLASSES, proposals="both"), BOTH_TERMS),
    "headkd": (functools.partial(HeadKD), HEAD_KD_TERMS),
    "headkd_teacher": (functools.partial(HeadKD, proposals="teacher"), HEAD_KD_TERMS),
}
# Student, teacher, and width and channels of the teacher.
SAME = [("retinanet", "retinanet"), ("fcos", "fcos"), ("faster", "faster"), ("mask", "mask")]
SIZES = [(8, 16), (16, 24)]
MIXED = [
    ("retinanet", "fcos", 16, 24),
    ("fcos", "retinanet", 8, 16),
    ("retinanet", "faster", 16, 24),
    ("fcos", "mask", 8, 16),
    ("faster", "retinanet", 8, 16),
]
ONE_STAGE = [(*pair, *size) for pair in SAME[:2] for size in SIZES]
TWO_STAGE = [(*pair, *size) for pair in [*SAME[2:], ("faster", "mask")] for size in SIZES]
CASES = [
    *((name, *pair) for name in FEATURES for pair in [*ONE_STAGE[1::2], *TWO_STAGE[1::4], *MIXED]),
    *((name, *pair) for name in DENSE for pair in ONE_STAGE),
    *((name, *pair) for name in HEADS for pair in TWO_STAGE),
]
LOSSES = {**FEATURES, **DENSE, **HEADS}
FAMILIES = {
    **dict.fromkeys(FEATURES, ["retinanet", "fcos", "faster"]),
    **dict.fromkeys(DENSE, ["retinanet", "fcos"]),
    **dict.fromkeys(HEADS, ["faster", "mask"]),
}
KINDS = [(name, family) for name, families in FAMILIES.items() for family in families]


def distiller(loss, student="faster", teacher=None, **of_teacher):
    teacher = teacher or student
    model = tiny_detector(teacher, **of_teacher) if of_teacher else detector(teacher)
    return Distiller(student=detector(student), teacher=Teacher(model), losses=[loss]).train()


def batch_for(family, objects=2):
    return tiny_batch(masks=family == "mask", objects=objects)


def terms_in(losses):
    return {name for name in losses if "defeat" in name or "fgfi" in name or "head_kd" in name}


@contextlib.contextmanager
def spied(model, spy):
    """``spy(loss's own forward, student, teacher, batch)`` in the place of the loss's forward."""
    (loss,) = model.losses.values()
    loss.forward = functools.partial(spy, loss.forward)
    yield
    del loss.forward


# A whole step.


@pytest.mark.parametrize("name, student, teacher, width, channels", CASES)
def test_step_of_every_pair(name, student, teacher, width, channels):
    make, terms = LOSSES[name]
    model = distiller(make(), student, teacher, width=width, channels=channels)
    losses = step(model, batch_for(student))
    assert terms_in(losses) == terms
    assert all(losses[term].isfinite() and losses[term] > 0 for term in terms)
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    found = [p.grad for p in model.losses.parameters()]
    assert all(gradient.isfinite().all() for gradient in found)
    # Objects are small: FGFI has something to adapt on the finest level alone.
    assert (any if name == "fgfi" else all)(gradient.any() for gradient in found)
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("channels, adapted", [(16, False), (24, True), (16, True)])
def test_adapters_fit_the_teacher(channels, adapted):
    settings = {"neck_adapt": adapted, "bb_adapt": adapted}
    model = distiller(DeFeat(**STAGES, **settings), "faster", "mask", width=16, channels=channels)
    shapes = {name: tuple(p.shape) for name, p in model.losses.named_parameters() if "weight" in name}
    stages = {
        "DeFeat.backbone.adapters.res3.0.weight": (32, 16, 3, 3),
        "DeFeat.backbone.adapters.res4.0.weight": (64, 32, 3, 3),
    }
    neck = {f"DeFeat.neck.adapters.p{level}.weight": (channels, 16, 3, 3) for level in range(2, 7)}
    assert shapes == {**(neck if adapted else {}), **stages}


def test_levels_of_different_channels_are_always_adapted():
    settings = {"neck_adapt": False, "adapter": False}
    for make, key in ((DeFeat, "neck_adapt"), (FGFI, "adapter")):
        loss = make(**{key: settings[key]})
        distiller(loss, "retinanet", "faster", width=8, channels=24)
        names = {name.split(".")[-2] for name, _ in loss.named_parameters()}
        assert names == {"p2", "p3", "p4"}  # those that both have


REACHED = {
    "neck": ["backbone.fpn_output2.weight", "backbone.bottom_up.stem.conv1.weight"],
    "fgfi": ["backbone.fpn_output2.weight", "backbone.bottom_up.stem.conv1.weight"],
    "student": ["roi_heads.box_predictor.cls_score.weight", "roi_heads.box_head.fc1.weight"],
    "both": ["roi_heads.box_predictor.cls_score.weight", "roi_heads.box_head.fc1.weight"],
    "headkd_teacher": [
        *("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.bbox_pred.weight"),
        *("roi_heads.box_head.fc1.weight", "backbone.bottom_up.stem.conv1.weight"),
    ],
}


@pytest.mark.parametrize("name", list(REACHED))
def test_gradients_reach_the_part_that_is_compared(name):
    make, terms = LOSSES[name]
    model = distiller(make(), "faster", "mask", width=8, channels=16)
    with EventStorage(0):
        losses = model(batch_for("faster"))
    sum(losses[term] for term in terms).backward()
    gradients = {path: p.grad for path, p in model.student.named_parameters()}
    reached = {path for path, found in gradients.items() if found is not None and found.any()}
    assert set(REACHED[name]) <= reached
    assert not any(path.startswith("proposal_generator.") for path in reached)
    if name in ("neck", "fgfi"):
        assert all(path.startswith("backbone.") for path in reached)


def test_student_equal_to_teacher_has_no_loss():
    """FrozenBN does the same in training; a teacher as it was built rounds as its student does."""
    for family, settings in (("retinanet", CLASSES), ("faster", {**CLASSES, "proposals": "both"})):
        cfg = tiny_config(family)
        cfg.MODEL.SMALL_RESNET.NORM = "FrozenBN"
        student, teacher = build_model(cfg), build_model(cfg)
        student.load_state_dict(teacher.state_dict())
        losses = [DeFeat(neck_adapt=False, **STAGES, **settings), FGFI(adapter=False)]
        losses += [HeadKD()] if family == "faster" else []
        teacher = Teacher(teacher, prepare=False)
        model = Distiller(student=student, teacher=teacher, losses=losses).train()
        found = step(model, batch_for(family))
        assert len(terms_in(found)) == (11 if family == "faster" else 7)
        assert all(found[name].abs() < 1e-6 for name in terms_in(found))


# Against plain formulas.


def divergence(student, teacher, temperature, background):
    """T^2 KL of one row, number by number."""
    s, t = ([x / temperature for x in row] for row in (student, teacher))
    if background:
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (s, t))
        parts = [b * math.log(b / a) for a, b in zip(p, q)]
    else:
        p, q = ([1 / (1 + math.exp(-x)) for x in row] for row in (s, t))
        parts = [b * math.log(b / a) + (1 - b) * math.log((1 - b) / (1 - a)) for a, b in zip(p, q)]
    return temperature**2 * sum(parts)


def mean_divergence(rows, temperature, background):
    values = [divergence(ours, theirs, temperature, background) for ours, theirs in rows]
    return sum(values) / max(1, len(values))


def labels_by_matcher(truth, boxes, matcher, background):
    """The class of each box by detectron2's matcher; -1 where it is ignored."""
    found, labels = matcher(pairwise_iou(truth.gt_boxes, boxes))
    classes = truth.gt_classes[found] if len(truth) else torch.zeros_like(found)
    classes = torch.where(labels == 0, background, classes)
    return torch.where(labels == -1, -1, classes).tolist()


def rows_of_levels(levels, count):
    """(N, R, count) of a head's outputs (N, A count, H, W)."""
    images, rows = len(levels[0]), []
    for level in levels:
        split = level.view(images, -1, count, *level.shape[-2:]).permute(0, 3, 4, 1, 2)
        rows.append(split.reshape(images, -1, count))
    return torch.cat(rows, dim=1)


def dense_rows(student, teacher, batch):
    """(label, student's logits, teacher's logits) of all rows."""
    model, count = student.model, student.num_classes
    levels = [student.level(name) for name in model.head_in_features]
    theirs = teacher.model.head([teacher.level(name) for name in model.head_in_features])[0]
    ours = rows_of_levels(student.tap("head", 0), count)
    anchors = model.anchor_generator(levels)
    truth = [item["instances"] for item in batch.inputs]
    if type(model).__name__ == "FCOS":
        labels = [per_image.tolist() for per_image in model.label_anchors(anchors, truth)[0]]
    else:
        matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        boxes = Boxes.cat(anchors)
        labels = [labels_by_matcher(per_image, boxes, matcher, count) for per_image in truth]
    return joined(labels, ours.tolist(), rows_of_levels(theirs, count).tolist())


def joined(labels, ours, theirs):
    return [row for image in zip(labels, ours, theirs) for row in zip(*image)]


def box_head_rows(student, teacher, batch, proposals):
    """The same of these proposals, scored by detectron2's own parts."""
    matcher, scores = Matcher([0.5], [0, 1]), []
    for view in (student, teacher):
        heads = view.model.roi_heads
        features = [view.level(name) for name in heads.box_in_features]
        logits, _ = heads.box_predictor(heads.box_head(heads.box_pooler(features, proposals)))
        scores.append([part.tolist() for part in logits.split([len(boxes) for boxes in proposals])])
    truth = [item["instances"] for item in batch.inputs]
    labels = [labels_by_matcher(*each, matcher, 3) for each in zip(truth, proposals)]
    return joined(labels, *scores)


def decoupled(rows, settings, background):
    """DeFeat's two class terms."""
    temperatures = [settings.get(key, 1.0) for key in ("head_cls_t", "head_cls_back_t")]
    parts = [
        [row for label, *row in rows if 0 <= label < 3],
        [row for label, *row in rows if label == 3],
    ]
    assert all(parts)
    return [
        weight * mean_divergence(part, temperature, background)
        for weight, part, temperature in zip((2.0, 3.0), parts, temperatures)
    ]


def compare(terms, expected, prefix="loss_defeat_"):
    assert terms.keys() == {prefix + name for name in expected}
    for name, value in expected.items():
        assert terms[prefix + name].item() == pytest.approx(value, rel=1e-4), name


def checked_step(model, check, batch):
    """A step on the batch in which ``check(terms, student, teacher, batch)`` is called once."""
    found = []

    def spy(forward, student, teacher, batch):
        terms = forward(student, teacher, batch)
        with torch.no_grad():
            check(terms, student, teacher, batch)
        found.append(terms)
        return terms

    with spied(model, spy):
        step(model, batch)
    assert len(found) == 1


TEMPERATURES = [{}, {"head_cls_t": 2.0, "head_cls_back_t": 0.5}]


@pytest.mark.parametrize("settings", TEMPERATURES, ids=["1", "other"])
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_classes(family, settings):
    model = distiller(DeFeat(**NO_NECK, **CLASSES, **settings), family)

    def check(terms, *step):
        rows = dense_rows(*step)
        ignored = sum(label == -1 for label, *_ in rows)
        assert ignored > 0 if family == "retinanet" else ignored == 0
        compare(terms, dict(zip(("hcls", "hcls_back"), decoupled(rows, settings, background=False))))

    checked_step(model, check, batch_for(family))


def test_dense_classes_of_all_rows_but_ignored_ones():
    model = distiller(DeFeat(**NO_NECK, head_cls_w=1.5, head_cls_rows="all"), "retinanet")

    def check(terms, *step):
        rows = [row for label, *row in dense_rows(*step) if label >= 0]
        compare(terms, {"hcls": 1.5 * mean_divergence(rows, 1.0, background=False)})

    checked_step(model, check, batch_for("retinanet"))


@contextlib.contextmanager
def noted_proposals(view):
    """The proposals that the teacher's view returns, appended to a list."""
    noted, own_proposals = [], view.own_proposals

    def noting(batch):
        noted.append(own_proposals(batch))
        return noted[-1]

    view.own_proposals = noting
    yield noted
    del view.own_proposals


@pytest.mark.parametrize("settings", TEMPERATURES, ids=["1", "other"])
@pytest.mark.parametrize("source", ["student", "teacher", "both"])
@pytest.mark.parametrize("student, teacher", [("faster", "mask"), ("mask", "mask")])
def test_box_head_classes(student, teacher, source, settings):
    """Of images with different numbers of proposals: both heads sample all that there are."""
    batch = batch_for(student)
    batch[1]["instances"] = batch[1]["instances"][:1]
    loss = DeFeat(**NO_NECK, **CLASSES, **settings, proposals=source)
    model = distiller(loss, student, teacher)
    for each in (model.student, model.teacher.model):
        each.roi_heads.batch_size_per_image = 100

    def check(terms, student, teacher, batch):
        sampled = [each.proposal_boxes for each in student.taps.output("roi_heads")[0]]
        sources = {
            "student": {"": sampled},
            "teacher": {"": noted and noted[0][0]},
            "both": {"": sampled, "_teacher": noted and noted[0][0]},
        }
        expected = {}
        for suffix, proposals in sources[source].items():
            assert len(proposals[0]) != len(proposals[1])
            rows = box_head_rows(student, teacher, batch, proposals)
            pair = decoupled(rows, settings, background=True)
            expected.update(zip((f"hcls{suffix}", f"hcls_back{suffix}"), pair))
        compare(terms, expected)
        assert len(noted) == (source != "student")

    with noted_proposals(model.teacher.view) as noted:
        checked_step(model, check, batch)


def best(logits):
    return logits.index(max(logits))


CHOSEN = {
    "all": lambda label, theirs: True,
    "correct": lambda label, theirs: best(theirs) == label,
    "cfore": lambda label, theirs: best(theirs) == label < 3,
}


@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize("kind", list(CHOSEN))
def test_other_rows_of_box_heads(kind, source):
    settings = {"head_cls_w": 1.5, "head_cls_rows": kind, "head_cls_t": 2.0, "proposals": source}
    model = distiller(DeFeat(**NO_NECK, **settings))
    batch = batch_for("faster", objects=6)
    for item in batch:
        item["instances"].gt_classes.zero_()
    # The teacher finds the class 0 or the background, each in some of the objects and of the others.
    bias = model.teacher.model.roi_heads.box_predictor.cls_score.bias
    bias.data += torch.tensor([1.5, -20, -20, 0])

    def check(terms, student, teacher, batch):
        sampled = [each.proposal_boxes for each in student.taps.output("roi_heads")[0]]
        proposals = noted[0][0] if noted else sampled
        rows = box_head_rows(student, teacher, batch, proposals)
        assert {(label, best(theirs)) for label, _, theirs in rows} == {(0, 0), (0, 3), (3, 0), (3, 3)}
        chosen = [(ours, theirs) for label, ours, theirs in rows if CHOSEN[kind](label, theirs)]
        compare(terms, {"hcls": 1.5 * mean_divergence(chosen, 2.0, background=True)})

    with noted_proposals(model.teacher.view) as noted:
        checked_step(model, check, batch)


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_head_kd_of_detectors(source):
    model = distiller(HeadKD(proposals=source, temperature=2.0, reg_weight=0.5), "faster", "mask")

    def check(terms, student, teacher, batch):
        sampled = [each.proposal_boxes for each in student.taps.output("roi_heads")[0]]
        proposals = noted[0][0] if noted else sampled
        assert len(noted) == (source == "teacher")
        rows = box_head_rows(student, teacher, batch, proposals)
        deltas = [torch.cat(view.score_boxes(proposals)[1]) for view in (student, teacher)]
        gaps = [
            (ours - theirs)[4 * label : 4 * label + 4].abs().sum().item()
            for (label, *_), ours, theirs in zip(rows, *deltas)
            if label < 3
        ]
        expected = {
            "cls": mean_divergence([row[1:] for row in rows], 2.0, background=True),
            "reg": 0.5 * sum(gaps) / len(gaps),
        }
        compare(terms, expected, "loss_head_kd_")

    with noted_proposals(model.teacher.view) as noted:
        checked_step(model, check, batch_for("faster"))


def covered(boxes, shape, stride, levels, index):
    """1 in the cells of the boxes of this level, cell by cell."""
    mask = torch.zeros(shape)
    for x1, y1, x2, y2 in boxes:
        scale = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
        if min(max(math.floor(math.log2(scale / 56 + 1e-6)), 0), levels - 1) != index:
            continue
        for row in range(int(y1 / stride), int(y2 / stride)):
            for column in range(int(x1 / stride), int(x2 / stride)):
                mask[row, column] = 1
    return mask


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_neck_terms(family):
    loss = DeFeat()
    model = distiller(loss, family, width=16, channels=24)

    def check(terms, student, teacher, batch):
        objects, background = [], []
        for index, (name, stride) in enumerate(student.strides.items()):
            ours, theirs = loss.neck.adapters[name](student.level(name)), teacher.level(name)
            mask = torch.stack(
                [
                    covered(truth.gt_boxes.tensor.tolist(), ours.shape[-2:], stride, 3, index)
                    for truth in batch.instances()
                ]
            )[:, None]
            squares = (ours - theirs) ** 2
            for means, region in ((objects, mask), (background, 1 - mask)):
                total = (squares * region).sum() / max(1, 2 * 24 * float(region.sum()))
                means.append(float(total))
        assert objects[0] > 0 and not any(objects[1:])  # all are small
        expected = {
            "neck": 3 * sum(objects) / len(objects),
            "neck_back": 12 * sum(background) / len(background),
        }
        compare(terms, expected)

    checked_step(model, check, batch_for(family))


# What runs.


@pytest.mark.parametrize(
    "family, loss, teacher, student",
    [
        ("faster", lambda: DeFeat(**STAGES), {}, {RPN: 1, BOX_HEAD: 1}),
        ("faster", lambda: DeFeat(mask="roi"), {}, {RPN: 1, BOX_HEAD: 1}),
        ("faster", FGFI, {}, {RPN: 1, BOX_HEAD: 1}),
        ("faster", lambda: DeFeat(**CLASSES), {BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 1}),
        ("faster", LOSSES["teacher"][0], {RPN: 1, BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 2}),
        ("faster", LOSSES["both"][0], {RPN: 1, BOX_HEAD: 2}, {RPN: 1, BOX_HEAD: 2}),
        ("mask", HeadKD, {BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 1, MASK_HEAD: 1}),
        (
            *("mask", LOSSES["headkd_teacher"][0]),
            *({RPN: 1, BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 2, MASK_HEAD: 1}),
        ),
        ("retinanet", DeFeat, {}, {"head": 1}),
        ("retinanet", FGFI, {}, {"head": 1}),
        ("retinanet", lambda: DeFeat(**CLASSES), {"head": 1}, {"head": 1}),
    ],
)
def test_heads_run_once_where_they_are_asked(family, loss, teacher, student):
    """Law 4."""
    model = distiller(loss(), family)
    parts = {"head", RPN, BOX_HEAD, MASK_HEAD}
    theirs, ours = (
        {name: count_calls(module) for name, module in each.named_modules() if name in parts}
        for each in (model.teacher.model, model.student)
    )
    backbones = count_calls(model.teacher.model.backbone)
    for steps in (1, 2):
        step(model, batch_for(family))
        assert {name: len(calls) / steps for name, calls in theirs.items() if calls} == teacher
        assert {name: len(calls) / steps for name, calls in ours.items() if calls} == student
        assert len(backbones) == steps


def test_features_alone_require_no_head():
    model = distiller(DeFeat(**STAGES), "retinanet", "mask")
    assert not model.student_view.required and not model.teacher.view.required
    model = distiller(FGFI(), "retinanet", "mask")
    assert model.student_view.required == {"anchors"} and not model.teacher.view.required


def test_the_teachers_counts_are_not_logged():
    """What its head samples is no news of the student's."""
    model = distiller(LOSSES["teacher"][0]())
    model.teacher.model.roi_heads.batch_size_per_image = 5
    with EventStorage(0) as storage:
        model(batch_for("faster"))
    counts = [storage.latest()[f"roi_head/num_{kind}_samples"][0] for kind in ("fg", "bg")]
    assert sum(counts) > 5


NOT_WAITING = [
    *((name, family) for name in FEATURES for family in ("retinanet", "faster")),
    *(("dense", family) for family in ("retinanet", "fcos")),
    *(("student", "faster"), ("headkd", "mask")),
]


@pytest.mark.parametrize("name, family", NOT_WAITING)
def test_a_step_does_not_synchronise(as_on_a_gpu, monkeypatch, name, family):
    model = distiller(LOSSES[name][0](), family)

    def guarded(forward, student, teacher, batch):
        if name in HEADS:  # detectron2's own pooling of the proposals waits: before, and not once more
            module, heads = head_kd if name == "headkd" else defeat_loss, []
            read = module.common_predictions
            once = lambda *args: heads or heads.extend(read(*args)) or heads  # noqa: E731
            monkeypatch.setattr(module, "common_predictions", once)
            forward(student, teacher, batch)
        with as_on_a_gpu(), no_synchronization():
            return forward(student, teacher, batch)

    with spied(model, guarded):
        losses = step(model, batch_for(family))
    assert LOSSES[name][1] <= losses.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, family", KINDS)
def test_terms_are_float32_under_autocast(name, family, dtype):
    make, terms = LOSSES[name]
    model, seen, rounded = distiller(make(), family), [], []
    model.student.backbone.register_forward_hook(lambda *args: rounded.extend(args[-1].values()))
    for module in model.losses.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *args: seen.append(args[-1]))
    if family == "fcos":  # detectron2's own loss cannot be computed in half precision
        model.student.losses = lambda *_: {}
    with torch.autocast("cpu", dtype=dtype), EventStorage(0):
        losses = model(batch_for(family))
    sum(losses.values()).backward()
    seen += [losses[term] for term in terms]
    assert {level.dtype for level in rounded} == {dtype}
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert all(losses[term].isfinite() and losses[term] > 0 for term in terms)
    assert all(p.grad.isfinite().all() for p in model.losses.parameters())


@pytest.mark.parametrize("name, family", [("neck", "faster"), ("teacher", "mask"), ("dense", "fcos")])
def test_teacher_in_half_precision(name, family):
    make, terms = LOSSES[name]
    teacher = Teacher(detector(family), autocast="float16")
    model = Distiller(student=detector(family), teacher=teacher, losses=[make()]).train()
    losses = step(model, batch_for(family))
    assert {losses[term].dtype for term in terms} == {torch.float32}
    assert all(losses[term].isfinite() and losses[term] > 0 for term in terms)


# Without objects, without proposals.

# Terms of objects, which are 0 without.
OF_OBJECTS = {
    *("loss_defeat_neck", "loss_defeat_bb", "loss_defeat_hcls", "loss_defeat_hcls_teacher"),
    *("loss_fgfi", "loss_head_kd_reg"),
}


@pytest.mark.parametrize("name, family", KINDS)
def test_images_without_objects(name, family):
    make, terms = LOSSES[name]
    model = distiller(make(), family)
    losses = step(model, batch_for(family, objects=0))
    assert all(loss.isfinite() for loss in losses.values())
    of_objects = OF_OBJECTS - ({"loss_defeat_hcls"} if name == "all" else set())
    assert {term for term in terms if losses[term] == 0} == terms & of_objects
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in found)
    assert all(p.grad is not None for p in model.losses.parameters())


@pytest.mark.parametrize("name, family", KINDS)
def test_one_image_without_objects(name, family):
    make, terms = LOSSES[name]
    batch = batch_for(family)
    batch[1]["instances"] = batch[1]["instances"][:0]
    losses = step(distiller(make(), family), batch)
    assert all(losses[term].isfinite() and losses[term] > 0 for term in terms)


@pytest.mark.parametrize("name", list(HEADS))
def test_no_proposals_at_all(name):
    make, terms = LOSSES[name]
    model = distiller(make(), "faster")
    for each in (model.student, model.teacher.model):
        each.roi_heads.proposal_append_gt = False
        each.proposal_generator.register_forward_hook(
            lambda _, __, output: ([proposals[:0] for proposals in output[0]], output[1])
        )
    losses = step(model, batch_for("faster"))
    assert all(losses[term] == 0 for term in terms - NECK_TERMS)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in found)


# Detectors that they refuse.


def with_c4(role, loss):
    models = {
        each: build_model(c4_config()) if each in role.split() else detector("faster")
        for each in ("student", "teacher")
    }
    teacher = Teacher(models["teacher"])
    return Distiller(student=models["student"], teacher=teacher, losses=[loss]).train()


@pytest.mark.parametrize("role", ["student", "teacher", "student teacher"])
@pytest.mark.parametrize("loss, key", [(DeFeat, "DEFEAT.HEAD_CLS_W"), (HeadKD, "HEAD_KD")])
def test_heads_of_c4(loss, key, role):
    loss = DeFeat(**NO_NECK, **CLASSES) if loss is DeFeat else loss()
    who = role.split()[0]
    with pytest.raises(TypeError) as caught:
        with_c4(role, loss)
    message = str(caught.value)
    assert f"MODEL.DISTILLER.{key}: the {who} is a GeneralizedRCNN" in message
    assert "no box_head()" in message and "with FPN, not C4 or cascade" in message


@pytest.mark.parametrize("loss", [DeFeat, FGFI])
@pytest.mark.parametrize("role, other", [("teacher", "student"), ("student", "teacher")])
def test_necks_of_c4_and_fpn(loss, role, other):
    with pytest.raises(ValueError) as caught:
        with_c4(role, loss())
    message = str(caught.value)
    assert "IN_FEATURES" in message and "no neck level of one name and stride" in message
    assert "p2: 4, p3: 8, p4: 16" in message and "res4: 16" in message


def test_features_of_two_c4_models():
    """Their one level is compared as a neck's is."""
    for loss in (DeFeat(), DeFeat(mask="roi"), FGFI()):
        losses = step(with_c4("student teacher", loss), batch_for("faster"))
        assert all(losses[name] > 0 for name in terms_in(losses))
        assert {name.split(".")[-2] for name, _ in loss.named_parameters()} == {"res4"}


def test_stages_of_a_shorter_backbone():
    cfg = tiny_config()
    cfg.MODEL.SMALL_RESNET.OUT_FEATURES = ["res2", "res3"]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16.0], [32.0]]
    for role in ("student", "teacher"):
        models = {"student": detector("faster"), "teacher": detector("faster"), role: build_model(cfg)}
        teacher = Teacher(models["teacher"])
        message = rf"DEFEAT.BB_FEATURES: the {role} \(RetinaNet\) has no level 'res4'.*'res3'"
        with pytest.raises(KeyError, match=message):
            Distiller(student=models["student"], teacher=teacher, losses=[DeFeat(hint_bb_w=1.0)])


@pytest.mark.parametrize(
    "student, teacher, settings, messages",
    [
        ("retinanet", "fcos", {}, ["compares the dense predictions", "their anchors differ"]),
        ("retinanet", "faster", {}, ["HEAD_CLS_W: the teacher is", "no dense()"]),
        ("faster", "retinanet", {}, ["HEAD_CLS_W: the teacher is", "no box_head()"]),
        ("faster", "faster", {"predictions": "dense"}, ["HEAD_CLS_W: the student is", "no dense()"]),
        ("retinanet", "retinanet", {"head_cls_rows": "cfore"}, ["HEAD_CLS_ROWS is 'cfore'", "dense"]),
        ("retinanet", "retinanet", {"proposals": "both"}, ["PROPOSALS is 'both'", "dense"]),
    ],
)
def test_heads_that_cannot_be_compared(student, teacher, settings, messages):
    weights = {"head_cls_w": 1.0}
    with pytest.raises((TypeError, ValueError)) as caught:
        distiller(DeFeat(**weights, **settings), student, teacher)
    assert "MODEL.DISTILLER.DEFEAT" in str(caught.value)
    assert all(message in str(caught.value) for message in messages)


def test_teacher_of_other_classes():
    cfg = tiny_config("faster")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    make = lambda loss: Distiller(  # noqa: E731
        student=detector("faster"), teacher=Teacher(build_model(cfg)), losses=[loss]
    )
    message = r"DEFEAT\.HEAD_CLS_W .*student has 3 classes and the teacher 5"
    with pytest.raises(ValueError, match=message):
        make(DeFeat(**CLASSES))
    losses = step(make(DeFeat()).train(), batch_for("faster"))  # features know of no classes
    assert losses["loss_defeat_neck"] > 0


# detectron2's own ResNets.


def resnet_fpn(depth):
    """A Faster R-CNN as COCO's, of this depth, for small images."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, str(ROOT / "configs" / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth == 18:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    return build_model(cfg)


def test_r101_to_r18():
    settings = {"hint_bb_w": 1.0, "hint_bb_back_w": 1.0, "bb_adapt": True, **CLASSES}
    model = Distiller(
        student=resnet_fpn(18), teacher=Teacher(resnet_fpn(101)), losses=[DeFeat(**settings)]
    ).train()
    shapes = {name: tuple(p.shape) for name, p in model.losses.named_parameters() if "weight" in name}
    stages = {"res3": (512, 128), "res4": (1024, 256), "res5": (2048, 512)}
    expected = {f"DeFeat.neck.adapters.p{level}.weight": (256, 256, 3, 3) for level in range(2, 7)}
    expected.update(
        {f"DeFeat.backbone.adapters.{name}.0.weight": (*pair, 3, 3) for name, pair in stages.items()}
    )
    assert shapes == expected
    losses = step(model, tiny_batch(2))
    terms = NECK_TERMS | STAGE_TERMS | CLASS_TERMS
    assert terms_in(losses) == terms and all(losses[name].isfinite() for name in terms)
    assert all(losses[name] > 0 for name in NECK_TERMS | STAGE_TERMS)
    assert all(p.grad is not None for p in model.losses.parameters())


def test_losses_share_the_teachers_proposals_and_scores():
    """One pass of its RPN for its own proposals, and one of its box head for each set of proposals."""
    losses = [
        DeFeat(hint_neck_w=0.0, hint_neck_back_w=0.0, head_cls_w=1.0, proposals="both"),
        HeadKD(proposals="teacher"),
        GID(predictions="box_head"),
    ]
    teacher = Teacher(detector("faster"))
    student = Distiller(student=detector("faster"), teacher=teacher, losses=losses).train()
    rpn = count_calls(teacher.model.proposal_generator)
    head = count_calls(teacher.model.roi_heads.box_predictor)
    with EventStorage(0):
        terms = student(tiny_batch())
    assert (len(rpn), len(head)) == (1, 2)
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("first", ["rpn", "own_proposals"])
def test_own_proposals_leave_the_rpns_predictions_as_they_are(first):
    losses = [GID(predictions="rpn"), HeadKD(proposals="teacher")]
    losses = losses if first == "rpn" else losses[::-1]
    teacher = Teacher(detector("faster"))
    student = Distiller(student=detector("faster"), teacher=teacher, losses=losses).train()
    with EventStorage(0):
        terms = student(tiny_batch())
    assert {"loss_gid_feature", "loss_head_kd_cls"} < set(terms)
