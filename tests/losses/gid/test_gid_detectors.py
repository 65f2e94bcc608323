"""GID in a Distiller of each kind of detector: a whole step against the naive version, and what runs."""

import functools

import naive_gid as naive
import pytest
import torch
from detectron2.modeling.matcher import Matcher
from gid_case import (
    BOX_HEAD_MATCHER,
    DENSE_MATCHER,
    EVEN,
    Heads,
    Rows,
    close,
    compare_terms,
    dense_rows,
    naive_step,
    only,
    or_zero,
)
from recorded import count_calls, detector
from torch.nn.utils.rnn import pad_sequence

from distill_d2.distiller import Distiller
from distill_d2.losses.gid import GID
from distill_d2.teacher import Teacher
from distill_d2.testing import intercepted, step, tiny_batch

RPN, PREDICTOR = "proposal_generator.rpn_head", "roi_heads.box_predictor"
RPN_MATCHER = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
# Kinds of predictions by family.
KINDS = [
    ("retinanet", "dense"),
    ("fcos", "dense"),
    ("faster", "rpn"),
    ("faster", "box_head"),
    ("mask", "box_head"),
    ("mask", "rpn"),
]


def made(family):
    """A detector with boxes that are large enough, and different from row to row."""
    model = detector(family)
    if family == "fcos":
        torch.nn.init.constant_(model.head.bbox_pred.bias, 1.5)
    return model


def distiller(student, teacher=None, **settings):
    teacher, loss = Teacher(made(teacher or student)), GID(**{**EVEN, **settings})
    return Distiller(student=made(student), teacher=teacher, losses=[loss]).train()


def batch_for(family, objects=2):
    return tiny_batch(masks=family == "mask", objects=objects)


# Against the naive version


class Seen:
    """What both detectors computed, read from their modules' outputs: the inputs of the naive version.

    Attributes:
        heads: the student's tensors that the responses depend on; maps: its levels, by name.
        as_rows: makes rows (N, R, X) of a list like one of ``heads``.
    """

    def __init__(self, student, teacher, predictions):
        self.names = list(student.strides)
        self.maps = {name: student.level(name, contiguous=False) for name in self.names}
        build = self._of_boxes if predictions == "box_head" else self._of_anchors
        build(student, teacher, predictions)

    def _model(self, view, logits, deltas, centerness=None):
        maps = {name: view.level(name, contiguous=False).detach() for name in self.names}
        return Heads(logits.detach(), deltas.detach(), maps, centerness)

    def _of_anchors(self, student, teacher, predictions):
        path, count = (RPN, 1) if predictions == "rpn" else ("head", 3)
        getattr(teacher, predictions)()  # runs its head
        models = []
        for view in (student, teacher):
            logits, deltas, *others = view.tap(path)
            centerness = dense_rows(others[0], 1)[..., 0] if others else None
            models.append(
                self._model(view, dense_rows(logits, count), dense_rows(deltas, 4), centerness)
            )
        self.student, self.teacher = models
        self.heads = dict(zip(("logits", "deltas"), student.tap(path)))
        self.as_rows = {
            "logits": functools.partial(dense_rows, length=count),
            "deltas": functools.partial(dense_rows, length=4),
        }
        module = student.model.proposal_generator if predictions == "rpn" else student.model
        names = module.in_features if predictions == "rpn" else module.head_in_features
        anchors = module.anchor_generator([self.maps[name] for name in names])
        sizes = [len(boxes) for boxes in anchors]
        anchors = torch.cat([boxes.tensor for boxes in anchors]).expand(2, sum(sizes), 4)
        if self.student.centerness is not None:
            strides = [student.strides[name] for name in names]
            label = naive.fcos_labels(strides, sizes, student.model.center_sampling_radius)
            self.rows = Rows(anchors, [sum(sizes)] * 2, False, naive.decode_ltrb, label)
            return
        label = naive.labels_by(RPN_MATCHER if predictions == "rpn" else DENSE_MATCHER)
        self.rows = Rows(anchors, [sum(sizes)] * 2, False, naive.decode_deltas, label)

    def _of_boxes(self, student, teacher, _):
        boxes = [found.proposal_boxes for found in student.taps.output("roi_heads")[0]]
        counts = [len(per_image) for per_image in boxes]
        heads = teacher.model.roi_heads
        features = [teacher.level(name) for name in heads.box_in_features]
        with torch.no_grad():
            teacher_outputs = heads.box_predictor(heads.box_head(heads.box_pooler(features, boxes)))
        padded = lambda x: pad_sequence(x.split(counts), batch_first=True)  # noqa: E731
        student_outputs = student.tap(PREDICTOR)
        self.student, self.teacher = (
            self._model(view, *map(padded, outputs))
            for view, outputs in ((student, student_outputs), (teacher, teacher_outputs))
        )
        self.heads = {name: [found] for name, found in zip(("logits", "deltas"), student_outputs)}
        self.as_rows = dict.fromkeys(self.heads, lambda found: padded(found[0]))
        anchors = pad_sequence([per_image.tensor for per_image in boxes], batch_first=True)
        decode = functools.partial(naive.decode_deltas, weights=(10, 10, 5, 5))
        self.rows = Rows(anchors, counts, True, decode, naive.labels_by(BOX_HEAD_MATCHER))


def gradients(term, tensors):
    tensors = list(tensors)
    found = torch.autograd.grad(term, tensors, retain_graph=True, allow_unused=True)
    return [or_zero(tensor, gradient) for tensor, gradient in zip(tensors, found)]


def compare_with_naive(family, predictions, objects=2, **settings):
    """Terms, and gradients of all that the heads and the neck gave; the number of instances."""
    model, found = distiller(family, predictions=predictions, **settings), []

    def compared(forward, student, teacher, batch):
        seen = Seen(student, teacher, predictions)
        terms = forward(student, teacher, batch)
        truth = [item["instances"].gt_boxes.tensor for item in batch.inputs]
        options = batch.image_sizes, truth, student.strides, {**EVEN, **settings}
        expected, leaves = naive_step(seen.teacher, seen.student, seen.rows, *options)
        compare_terms(terms, expected)
        feature, relation, cls, reg = terms.values()
        for name, gradient in zip(seen.names, gradients(feature + relation, seen.maps.values())):
            close(gradient, or_zero(gradient, leaves.maps[name].grad), name)
        for name, term in (("logits", cls), ("deltas", reg)):
            actual = seen.as_rows[name](gradients(term, seen.heads[name]))
            close(actual, or_zero(actual, getattr(leaves, name).grad), name)
        found.append(terms)
        return terms

    with intercepted(model.losses["GID"], compared):
        losses = step(model, batch_for(family, objects))
    assert all(torch.isfinite(loss) for loss in losses.values()) and len(found) == 1
    return found[0]


@pytest.mark.parametrize("family, predictions", KINDS)
def test_naive_step(family, predictions):
    assert all(term > 0 for term in compare_with_naive(family, predictions).values())


OTHERWISE = {
    "max_first": {"gi_score": "max_first", "response_reg_mode": "GIoU", "response_mask": "inside"},
    "kinds": {"gi_mode": "neg", "response_reg_mask": "gi_pos", "relation_scope": "image"},
    "semi_pos": {"gi_mode": "semi_pos", "feature_mode": "norm"},
}


@pytest.mark.parametrize("settings", OTHERWISE)
@pytest.mark.parametrize("family, predictions", KINDS[:4])
def test_naive_step_otherwise(family, predictions, settings):
    compare_with_naive(family, predictions, **OTHERWISE[settings])


def test_naive_step_with_centerness():
    compare_with_naive("fcos", "dense", gi_centerness=True)


@pytest.mark.parametrize("family, predictions", [kind for kind in KINDS[:4] if kind[0] != "fcos"])
def test_centerness_where_there_is_none(family, predictions):
    with pytest.raises(
        ValueError, match=r"GID\.GI_CENTERNESS is True, but the student, .* no centerness"
    ):
        distiller(family, predictions=predictions, gi_centerness=True)


@pytest.mark.parametrize("mode", ["all", "pos"])
@pytest.mark.parametrize("family, predictions", KINDS[:4])
def test_naive_step_without_ground_truth(family, predictions, mode):
    terms = compare_with_naive(family, predictions, objects=0, gi_mode=mode)
    if predictions != "box_head":  # whose proposals are few then, and small
        assert (terms["loss_gid_feature"] > 0) == (mode == "all")


# What runs


@pytest.mark.parametrize(
    "settings, calls",
    [
        ({}, 1),
        ({"gi_mode": "gt"}, 1),
        ({"gi_mode": "gt", **only("cls")}, 1),
        ({"gi_mode": "gt", **only("feature", "relation")}, 0),
        (only("feature"), 1),
    ],
    ids=str,
)
def test_teachers_head_runs_where_it_is_needed(settings, calls):
    model = distiller("retinanet", **settings)
    heads = count_calls(model.teacher.model.head)
    step(model, tiny_batch())
    assert len(heads) == calls


def test_ground_truth_alone_needs_no_head_of_any_kind():
    model = distiller("retinanet", "faster", gi_mode="gt", **only("feature", "relation"))
    rpn = count_calls(model.teacher.model.proposal_generator)
    losses = step(model, tiny_batch())
    assert losses["loss_gid_feature"] > 0 and not rpn
    assert not model.student_view.required and not model.teacher.view.required
