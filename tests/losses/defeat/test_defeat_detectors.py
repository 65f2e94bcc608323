"""DeFeat, FGFI and HeadKD in a Distiller of real detectors: whole steps against the naive versions, from what
the heads computed, what runs, and which detectors they refuse."""

import contextlib

import naive_defeat as naive
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from recorded import c4_config, count_calls, detector

from distill_d2.distiller import Distiller
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.gid import GID
from distill_d2.losses.head_kd import HeadKD
from distill_d2.teacher import Teacher
from distill_d2.testing import intercepted, step, tiny_batch, tiny_detector

RPN, BOX_HEAD, MASK_HEAD = "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"
NO_NECK = {"hint_neck_w": 0.0, "hint_neck_back_w": 0.0}
STAGES = {"hint_bb_w": 1.0, "hint_bb_back_w": 4.0, "bb_features": ["res3", "res4"]}
CLASSES = {"head_cls_w": 2.0, "head_cls_back_w": 3.0}


def distiller(loss, student="faster", teacher=None, **of_teacher):
    teacher = teacher or student
    model = tiny_detector(teacher, **of_teacher) if of_teacher else detector(teacher)
    return Distiller(student=detector(student), teacher=Teacher(model), losses=[loss]).train()


def batch_for(family, objects=2):
    return tiny_batch(masks=family == "mask", objects=objects)


MIXED = [("retinanet", "fcos"), ("retinanet", "faster"), ("fcos", "mask"), ("faster", "retinanet")]


@pytest.mark.parametrize("student, teacher", MIXED)
@pytest.mark.parametrize("loss, settings", [(DeFeat, STAGES), (DeFeat, {"mask": "roi"}), (FGFI, {})])
def test_features_of_detectors_of_different_kinds(loss, settings, student, teacher):
    model = distiller(loss(**settings), student, teacher, width=16, channels=24)
    assert "dense" not in model.student_view.required and not model.teacher.view.required
    losses = step(model, batch_for(student))
    terms = [term for name, term in losses.items() if "defeat" in name or "fgfi" in name]
    assert len(terms) == {DeFeat: 4 if settings == STAGES else 2, FGFI: 1}[loss]
    assert all(term.isfinite() and term > 0 for term in terms)


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


# Against the naive versions.


def labels_by_matcher(truth, boxes, matcher, background):
    """The class of each box by detectron2's matcher; -1 where it is ignored."""
    found, labels = matcher(pairwise_iou(truth.gt_boxes, boxes))
    classes = truth.gt_classes[found] if len(truth) else torch.zeros_like(found)
    classes = torch.where(labels == 0, background, classes)
    return torch.where(labels == -1, -1, classes)


def row_set(labels, student, teacher, background=3):
    labels = torch.cat(labels)
    objects = (labels >= 0) & (labels < background)
    return naive.RowSet(student, teacher, objects, labels == background, labels)


def rows_of_levels(levels, count):
    """(N R, count) of a head's outputs (N, A count, H, W)."""
    rows = []
    for level in levels:
        split = level.view(len(level), -1, count, *level.shape[-2:]).permute(0, 3, 4, 1, 2)
        rows.append(split.reshape(len(level), -1, count))
    return torch.cat(rows, dim=1).flatten(0, 1)


def dense_rows(student, teacher, batch):
    model, count = student.model, student.num_classes
    levels = [student.level(name) for name in model.head_in_features]
    teacher_logits = teacher.model.head([teacher.level(name) for name in model.head_in_features])[0]
    anchors = model.anchor_generator(levels)
    truth = [item["instances"] for item in batch.inputs]
    if type(model).__name__ == "FCOS":
        labels = model.label_anchors(anchors, truth)[0]
    else:
        matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        boxes = Boxes.cat(anchors)
        labels = [labels_by_matcher(per_image, boxes, matcher, count) for per_image in truth]
    student_rows = rows_of_levels(student.tap("head", 0), count)
    return row_set(labels, student_rows, rows_of_levels(teacher_logits, count))


def box_head_rows(student, teacher, batch, proposals):
    """Of these proposals, scored by detectron2's own parts."""
    matcher, scores = Matcher([0.5], [0, 1]), []
    for view in (student, teacher):
        heads = view.model.roi_heads
        features = [view.level(name) for name in heads.box_in_features]
        with view.taps.paused():
            found = heads.box_predictor(heads.box_head(heads.box_pooler(features, proposals)))
        scores.append(found[0])
    truth = [item["instances"] for item in batch.inputs]
    return row_set([labels_by_matcher(*each, matcher, 3) for each in zip(truth, proposals)], *scores)


def compare(terms, expected, prefix="loss_defeat_"):
    assert terms.keys() == {prefix + name for name in expected}
    for name, value in expected.items():
        assert value > 0 and terms[prefix + name].item() == pytest.approx(float(value), rel=1e-4), name


def checked_step(model, check, batch):
    """A step on the batch in which ``check(terms, student, teacher, batch)`` is called once."""
    found = []

    def spy(forward, student, teacher, batch):
        terms = forward(student, teacher, batch)
        with torch.no_grad():
            check(terms, student, teacher, batch)
        found.append(terms)
        return terms

    (loss,) = model.losses.values()
    with intercepted(loss, spy):
        step(model, batch)
    assert len(found) == 1


TEMPERATURES = [{}, {"head_cls_t": 2.0, "head_cls_back_t": 0.5}]


@pytest.mark.parametrize("settings", [*TEMPERATURES, {"head_cls_rows": "all"}], ids=str)
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_classes(family, settings):
    loss = DeFeat(**NO_NECK, **CLASSES, **settings)

    def check(terms, *step):
        rows = dense_rows(*step)
        assert (rows.labels == -1).any() == (family == "retinanet")  # those that it ignores
        compare(terms, naive.class_losses(rows, False, loss.settings))

    checked_step(distiller(loss, family), check, batch_for(family))


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
        own = noted and noted[0][0]
        sources = {"student": {"": sampled}, "teacher": {"": own}}
        sources["both"] = {"": sampled, "_teacher": own}
        expected = {}
        for suffix, proposals in sources[source].items():
            assert len(proposals[0]) != len(proposals[1])
            rows = box_head_rows(student, teacher, batch, proposals)
            found = naive.class_losses(rows, True, loss.settings)
            expected.update({f"{name}{suffix}": value for name, value in found.items()})
        compare(terms, expected)
        assert len(noted) == (source != "student")

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
        student_logits, teacher_logits = (
            torch.cat(view.score_boxes(proposals)[1]) for view in (student, teacher)
        )
        gaps = [
            gap[4 * label : 4 * label + 4].abs().sum()
            for gap, label in zip(student_logits - teacher_logits, rows.labels.tolist())
            if label < 3
        ]
        expected = {
            "cls": naive.divergence(rows.student, rows.teacher, 2.0, True),
            "reg": 0.5 * sum(gaps) / len(gaps),
        }
        compare(terms, expected, "loss_head_kd_")

    with noted_proposals(model.teacher.view) as noted:
        checked_step(model, check, batch_for("faster"))


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_neck_terms(family):
    loss = DeFeat(finest_scale=13.0)

    def check(terms, student, teacher, batch):
        truth = [item["instances"].gt_boxes.tensor for item in batch.inputs]
        strides = {name: student.strides[name] for name in loss.neck.adapters}
        pairs = {
            name: (adapter(student.level(name)), teacher.level(name))
            for name, adapter in loss.neck.adapters.items()
        }
        sizes = {name: tuple(level.shape[-2:]) for name, (_, level) in pairs.items()}
        masks = naive.object_masks("gt", truth, sizes, strides, finest_scale=13.0)
        assert sum(bool(mask.any()) for mask in masks.values()) > 1  # objects are on several levels
        objects, background = naive.region_losses(pairs, masks)
        compare(terms, {"neck": 3 * objects, "neck_back": 12 * background})

    checked_step(distiller(loss, family, width=16, channels=24), check, batch_for(family))


# What runs.


@pytest.mark.parametrize(
    "family, loss, settings, teacher, student",
    [
        ("faster", DeFeat, STAGES, {}, {RPN: 1, BOX_HEAD: 1}),
        ("faster", FGFI, {}, {}, {RPN: 1, BOX_HEAD: 1}),
        ("faster", DeFeat, CLASSES, {BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 1}),
        (
            *("faster", DeFeat, {**NO_NECK, **CLASSES, "proposals": "teacher"}),
            *({RPN: 1, BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 2}),
        ),
        (
            *("faster", DeFeat, {**NO_NECK, **CLASSES, "proposals": "both"}),
            *({RPN: 1, BOX_HEAD: 2}, {RPN: 1, BOX_HEAD: 2}),
        ),
        ("mask", HeadKD, {}, {BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 1, MASK_HEAD: 1}),
        (
            *("mask", HeadKD, {"proposals": "teacher"}),
            *({RPN: 1, BOX_HEAD: 1}, {RPN: 1, BOX_HEAD: 2, MASK_HEAD: 1}),
        ),
        ("retinanet", FGFI, {}, {}, {"head": 1}),
        ("retinanet", DeFeat, CLASSES, {"head": 1}, {"head": 1}),
    ],
)
def test_heads_run_once_where_they_are_asked(family, loss, settings, teacher, student):
    """Law 4."""
    model = distiller(loss(**settings), family)
    parts = {"head", RPN, BOX_HEAD, MASK_HEAD}
    teacher_calls, student_calls = (
        {name: count_calls(module) for name, module in each.named_modules() if name in parts}
        for each in (model.teacher.model, model.student)
    )
    backbones = count_calls(model.teacher.model.backbone)
    for steps in (1, 2):
        step(model, batch_for(family))
        assert {name: len(calls) / steps for name, calls in teacher_calls.items() if calls} == teacher
        assert {name: len(calls) / steps for name, calls in student_calls.items() if calls} == student
        assert len(backbones) == steps


def test_the_teachers_counts_are_not_logged():
    """What its head samples is no news of the student's."""
    model = distiller(DeFeat(**NO_NECK, **CLASSES, proposals="teacher"))
    model.teacher.model.roi_heads.batch_size_per_image = 5
    with EventStorage(0) as storage:
        model(batch_for("faster"))
    counts = [storage.latest()[f"roi_head/num_{kind}_samples"][0] for kind in ("fg", "bg")]
    assert sum(counts) > 5


@pytest.mark.parametrize("proposals", ["student", "teacher"])
@pytest.mark.parametrize("loss", [DeFeat, HeadKD])
def test_no_proposals_at_all(loss, proposals):
    settings = {**NO_NECK, **CLASSES} if loss is DeFeat else {}
    model = distiller(loss(**settings, proposals=proposals))
    for each in (model.student, model.teacher.model):
        each.roi_heads.proposal_append_gt = False
        each.proposal_generator.register_forward_hook(
            lambda _, __, output: ([proposals[:0] for proposals in output[0]], output[1])
        )
    losses = step(model, batch_for("faster"))
    terms = [term for name, term in losses.items() if "defeat" in name or "head_kd" in name]
    assert len(terms) == 2 and all(term == 0 for term in terms)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in found)


def test_losses_share_the_teachers_proposals_and_scores():
    """One pass of its RPN for its own proposals, and one of its box head for each set of proposals."""
    losses = [
        DeFeat(**NO_NECK, head_cls_w=1.0, proposals="both"),
        HeadKD(proposals="teacher"),
        GID(predictions="box_head"),
    ]
    teacher = Teacher(detector("faster"))
    model = Distiller(student=detector("faster"), teacher=teacher, losses=losses).train()
    rpn = count_calls(teacher.model.proposal_generator)
    head = count_calls(teacher.model.roi_heads.box_predictor)
    terms = step(model, tiny_batch())
    assert (len(rpn), len(head)) == (1, 2)
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("first", ["rpn", "own_proposals"])
def test_own_proposals_leave_the_rpns_predictions_as_they_are(first):
    losses = [GID(predictions="rpn"), HeadKD(proposals="teacher")]
    losses = losses if first == "rpn" else losses[::-1]
    teacher = Teacher(detector("faster"))
    model = Distiller(student=detector("faster"), teacher=teacher, losses=losses).train()
    assert {"loss_gid_feature", "loss_head_kd_cls"} < set(step(model, tiny_batch()))


# Detectors that they refuse.


def with_c4(role, loss):
    models = {
        each: build_model(c4_config()) if each in role.split() else detector("faster")
        for each in ("student", "teacher")
    }
    teacher = Teacher(models["teacher"])
    return Distiller(student=models["student"], teacher=teacher, losses=[loss]).train()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_heads_of_c4(role):
    with pytest.raises(TypeError) as caught:
        with_c4(role, DeFeat(**NO_NECK, **CLASSES))
    message = str(caught.value)
    assert f"MODEL.DISTILLER.DEFEAT.HEAD_CLS_W: the {role} is a GeneralizedRCNN" in message
    assert "no box_head()" in message and "with FPN, not C4 or cascade" in message


@pytest.mark.parametrize("loss", [DeFeat, FGFI])
def test_necks_of_c4_and_fpn(loss):
    with pytest.raises(ValueError) as caught:
        with_c4("teacher", loss())
    message = str(caught.value)
    assert "IN_FEATURES" in message and "no neck level with the same name and stride" in message
    assert "p2: 4, p3: 8, p4: 16" in message and "res4: 16" in message


def test_features_of_two_c4_models():
    """Their one level is compared as a neck's is."""
    for loss in (DeFeat(mask="roi"), FGFI()):
        losses = step(with_c4("student teacher", loss), batch_for("faster"))
        assert all(term > 0 for name, term in losses.items() if "defeat" in name or "fgfi" in name)
        assert {name.split(".")[-2] for name, _ in loss.named_parameters()} == {"res4"}
