"""The two-stage view's predictions: of the RPN's anchors, of the sampled proposals, and of the teacher's
own."""

import contextlib
import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from recorded import count_calls, detector, trained_on

from distill_d2.teacher import Teacher
from distill_d2.testing.tiny import tiny_batch, tiny_config
from distill_d2.views import Batch, build_view

FAMILIES = ["faster", "mask"]
BOXES = [
    torch.tensor([[2.0, 3.0, 40.0, 50.0], [0.0, 0.0, 64.0, 56.0], [5.0, 5.0, 9.0, 12.0]]),
    torch.tensor([[10.0, 8.0, 30.0, 33.0]]),
]


def configured(*options, family="faster"):
    cfg = tiny_config(family)
    cfg.merge_from_list(list(options))
    return build_model(cfg)


PADDED = (64, 96)  # of ``tiny_batch``: multiples of 32


def student_of(family, capability):
    view = build_view(detector(family), "student")
    view.require(capability)
    return view


def uneven_batch(family, count=2):
    """Images with 2, 1 and 0 objects; the more an image has, the more proposals it has if all are sampled."""
    batch = tiny_batch(count, masks=family == "mask")
    for index, item in enumerate(batch):
        item["instances"] = item["instances"][: 2 - index]
    return batch


def sampling_all(family):
    view = student_of(family, "box_head")
    view.model.roi_heads.batch_size_per_image = 100
    return view


def last_output(module):
    seen = []
    module.register_forward_hook(lambda *args: seen.append(args[-1]))
    return seen


# The RPN's anchors.


def test_rpn_matches_with_its_own_matcher(observed):
    view, _ = observed("faster", "rpn")
    predictions = view.rpn()
    boxes = torch.stack([boxes[:1] for boxes in BOXES] + [torch.tensor([[60.0, 20.0, 90.0, 60.0]])])
    valid = torch.tensor([[True], [True], [False]])
    labels = predictions.match(boxes, valid)
    for found, per_image, there in zip(labels, boxes, valid):
        iou = pairwise_iou(Boxes(per_image[there]), Boxes(predictions.anchors))
        assert torch.equal(found, view.model.proposal_generator.anchor_matcher(iou)[1])
    assert set(labels[0].tolist()) == {-1, 0, 1} and not labels[2].any()


# The box head of the student.


@pytest.mark.parametrize("family", FAMILIES)
def test_box_head_of_the_student_is_what_it_computed(family):
    view = sampling_all(family)
    heads = view.model.roi_heads
    outputs, sampled = last_output(heads.box_predictor), last_output(heads)
    calls = count_calls(heads.box_head)
    with trained_on(view, uneven_batch(family)):
        predictions = view.box_head()
        view.box_head()
        assert len(outputs) == len(calls) == 1
        (logits, deltas), (proposals, _) = outputs[0], sampled[0]
        counts = [len(per_image) for per_image in proposals]
        assert counts[0] > counts[1] > 1
        assert predictions.valid.sum(dim=1).tolist() == counts
        assert predictions.logits.shape == (2, counts[0], 4)
        assert predictions.deltas.shape == (2, counts[0], 12)
        assert torch.equal(predictions.logits[predictions.valid], logits)
        assert torch.equal(predictions.deltas[predictions.valid], deltas)
        boxes = [per_image.proposal_boxes.tensor for per_image in proposals]
        assert torch.equal(predictions.anchors[predictions.valid], torch.cat(boxes))
        assert all(torch.equal(b.tensor, a) for b, a in zip(view.sampled_proposals(), boxes))
    assert predictions.background and predictions.class_specific and predictions.num_classes == 3
    valid, expected = predictions.valid, torch.cat([each.gt_classes for each in proposals])
    assert predictions.classes.shape == valid.shape and predictions.classes.dtype == torch.int64
    assert torch.equal(predictions.classes[valid], expected) and {3} < set(expected.tolist())
    # Rows that fill up come last, are zero, and of the background.
    assert torch.equal(valid, valid.sort(dim=1, descending=True).values)
    assert (predictions.classes[~valid] == 3).all() and predictions.boxes().isfinite().all()
    for values in (predictions.logits, predictions.deltas, predictions.anchors):
        assert not values[~valid].any() and values[valid].any(dim=1).all()
    assert predictions.level_sizes == [counts[0]]


def test_given_proposals_and_an_image_without_any():
    view = student_of("faster", "box_head")
    with view.recording():
        view.model.backbone(torch.randn(2, 3, 64, 96))
        boxes = [Boxes(per_image) for per_image in BOXES]
        given = view.box_head(boxes, [torch.tensor([2, 3, 0]), torch.tensor([1])])
        assert view.box_head(boxes).classes is None
        assert view.box_head([Boxes(BOXES[0][:0])] * 2).num_classes == 3
        some = view.box_head([boxes[0], Boxes(torch.zeros(0, 4))])
        some.logits.sum().backward()
    assert given.classes.tolist() == [[2, 3, 0], [1, 3, 3]]
    assert some.valid.tolist() == [[True] * 3, [False] * 3] and some.boxes().isfinite().all()


@pytest.mark.parametrize("agnostic", [False, True])
def test_boxes_of_the_best_class(agnostic):
    model = configured("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    view = build_view(model, "student")
    view.require("box_head")
    batch = tiny_batch()
    with trained_on(view, batch):
        predictions = view.box_head()
        proposals = [
            Instances(item["image"].shape[1:], proposal_boxes=b)
            for item, b in zip(batch, view.sampled_proposals())
        ]
        predictor = model.roi_heads.box_predictor
        boxes = torch.cat(predictor.predict_boxes(view.tap("roi_heads.box_predictor"), proposals))
    assert predictions.class_specific is not agnostic
    best = predictions.best_class()[predictions.valid]
    assert best.unique().numel() > 1
    expected = boxes if agnostic else boxes.view(-1, 3, 4)[torch.arange(len(boxes)), best]
    torch.testing.assert_close(predictions.boxes()[predictions.valid], expected)


def test_proposals_match_with_the_heads_own_matcher():
    view = sampling_all("faster")
    batch = uneven_batch("faster")
    truth = [item["instances"].gt_boxes.tensor for item in batch]
    padded = torch.nn.utils.rnn.pad_sequence(truth, batch_first=True)
    with trained_on(view, batch):
        predictions, proposals = view.box_head(), view.sampled_proposals()
        labels = predictions.match(padded, torch.tensor([[True, True], [True, False]]))
    for image, boxes in enumerate(proposals):
        _, expected = view.model.roi_heads.proposal_matcher(pairwise_iou(Boxes(truth[image]), boxes))
        assert torch.equal(labels[image, : len(boxes)], expected)
        assert not labels[image, len(boxes) :].any()
        assert set(expected.tolist()) == {0, 1}  # ground truth is among the proposals


# The box head of the teacher.


def pair(family):
    """A student, and a teacher of the same weights: both with fixed norms, so that they compute the
    same."""
    student = configured("MODEL.SMALL_RESNET.NORM", "FrozenBN", family=family)
    teacher = configured("MODEL.SMALL_RESNET.NORM", "FrozenBN", family=family)
    teacher.load_state_dict(student.state_dict())
    view, teacher = build_view(student, "student"), Teacher(teacher, prepare=False)
    view.require("box_head")
    teacher.view.require("box_head")
    student.roi_heads.batch_size_per_image = 100
    return view, teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_scores_the_students_proposals(family):
    view, teacher = pair(family)
    batch = uneven_batch(family)
    calls = count_calls(teacher.model.roi_heads.box_predictor)
    with trained_on(view, batch), teacher.view.recording():
        teacher.observe([item["image"].float() for item in batch], PADDED)
        own = view.box_head()
        scored = teacher.view.box_head(view.sampled_proposals())
    assert len(calls) == 1
    assert torch.equal(scored.anchors, own.anchors) and torch.equal(scored.valid, own.valid)
    assert not own.valid.all()
    torch.testing.assert_close(scored.logits, own.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored.deltas, own.deltas, rtol=1e-4, atol=1e-5)
    assert own.logits.requires_grad and own.deltas.requires_grad
    assert not scored.logits.requires_grad and not scored.deltas.requires_grad


# The teacher's own proposals.


@contextlib.contextmanager
def seeing(batch, family="faster", options=(), **teacher):
    """The view of a teacher that saw this batch, and the batch as losses get it."""
    model = configured(*options, family=family)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.anchor_deltas.weight, std=0.1)
    model.roi_heads.batch_size_per_image = 100  # all of them
    teacher = Teacher(model, prepare=False, **teacher)
    for name in ("own_proposals", "box_head"):
        teacher.view.require(name)
    with teacher.view.recording():
        teacher.observe([item["image"].float() for item in batch], PADDED)
        yield teacher.view, Batch(batch, PADDED, 0, 4)


def proposals_in_evaluation(view, batch):
    """What detectron2 proposes for each image in an evaluation."""
    model, padded = copy.deepcopy(view.model), torch.zeros(len(batch), 3, *PADDED)
    for module in model.modules():
        module._forward_hooks.clear()  # this run is not recorded
    for plane, item in zip(padded, batch):
        image = (item["image"] - model.pixel_mean) / model.pixel_std
        plane[:, : image.shape[1], : image.shape[2]] = image
    images = ImageList(padded, [tuple(item["image"].shape[1:]) for item in batch])
    with torch.no_grad():
        found, _ = model.proposal_generator(images, model.backbone(padded))
    return [per_image.proposal_boxes.tensor for per_image in found]


def classes_by_iou(boxes, truth, threshold, background=3):
    """The class of the object that each box overlaps most, if it does so enough."""
    if not len(truth):
        return [background] * len(boxes)
    overlaps, best = pairwise_iou(truth.gt_boxes, boxes).max(dim=0)
    return torch.where(overlaps >= threshold, truth.gt_classes[best], background).tolist()


def in_order(boxes):
    return torch.tensor(sorted(boxes.tolist())).reshape(-1, 4)


def with_objects_near(batch, proposals):
    """The batch, each image's objects moved next to some of these boxes."""
    for item, boxes in zip(batch, proposals):
        truth = item["instances"]
        near = boxes[torch.arange(len(truth)) * 3]
        shift = 0.25 * (near[:, 2:] - near[:, :2])
        truth.gt_boxes = Boxes(torch.cat([near[:, :2] + shift, near[:, 2:]], dim=1))
    return batch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_own_proposals_are_those_of_an_evaluation_and_the_truth(family, threshold):
    batch = uneven_batch(family, 3)
    with seeing(batch, family, ["MODEL.ROI_HEADS.IOU_THRESHOLDS", [threshold]]) as (view, seen):
        expected = proposals_in_evaluation(view, batch)
        with_objects_near(batch, expected)
        boxes, classes = view.own_proposals(seen)
    for item, own, kinds, proposed in zip(batch, boxes, classes, expected):
        truth = item["instances"]
        both = torch.cat([proposed, truth.gt_boxes.tensor])
        assert len(proposed) > 5 and len(own) == len(both)
        torch.testing.assert_close(in_order(own.tensor), in_order(both))
        assert kinds.tolist() == classes_by_iou(own, truth, threshold)
        found = (kinds < 3).sum() - len(truth)  # the truth itself is among them
        assert found >= (1 if threshold == 0.5 else 2) if len(truth) else found == 0
        assert (kinds == 3).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_own_proposals_are_sampled_as_its_head_does_and_leave_no_trace(family):
    batch = tiny_batch(masks=family == "mask")
    with seeing(batch, family) as (view, seen), EventStorage(7) as storage:
        before = {name: value.clone() for name, value in view.model.state_dict().items()}
        view.model.roi_heads.batch_size_per_image = 6
        view.model.roi_heads.positive_fraction = 1 / 6
        boxes, classes = view.own_proposals(seen)
        assert not storage.latest()
        assert all(torch.equal(before[name], v) for name, v in view.model.state_dict().items())
        assert not any(module.training for module in view.model.modules())
    assert [len(per_image) for per_image in boxes] == [6, 6] == [len(kinds) for kinds in classes]
    assert all((kinds < 3).sum() == 1 for kinds in classes)
    assert not any(per_image.tensor.requires_grad for per_image in boxes)
    fields = set(batch[0]["instances"].get_fields())
    assert fields == {"gt_boxes", "gt_classes"} | ({"gt_masks"} if family == "mask" else set())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_own_proposals_of_a_teacher_of_half_precision(monkeypatch, dtype):
    monkeypatch.setattr("distill_d2.teacher.running.native_bfloat16", lambda device: True)
    with seeing(tiny_batch(), autocast=dtype) as (view, seen):
        outputs = last_output(view.model.proposal_generator.rpn_head)
        boxes, _ = view.own_proposals(seen)
        predictions = view.box_head(boxes)
    assert outputs[0][0][0].dtype == getattr(torch, dtype)
    assert {per_image.tensor.dtype for per_image in boxes} == {torch.float32}
    assert predictions.anchors.dtype == predictions.logits.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_student_scores_the_teachers_proposals(family):
    batch = uneven_batch(family)
    student = sampling_all(family)
    outputs = last_output(student.model.roi_heads.box_predictor)
    with seeing(batch, family) as (view, seen), trained_on(student, batch):
        boxes, classes = view.own_proposals(seen)
        of_student, of_teacher = student.box_head(boxes, classes), view.box_head(boxes)
        own = student.box_head()
        (logits, _), (student_logits, _) = outputs
        assert torch.equal(own.logits[own.valid], logits)
        assert torch.equal(of_student.logits[of_student.valid], student_logits)
        (of_student.logits.sum() + of_student.deltas.sum()).backward()
    for predictions in (of_student, of_teacher):
        assert torch.equal(predictions.anchors[predictions.valid], Boxes.cat(boxes).tensor)
    assert torch.equal(of_student.classes[of_student.valid], torch.cat(classes))
    assert of_teacher.classes is None and not of_student.valid.all()
    model, heads = student.model, student.model.roi_heads
    stem = model.backbone.bottom_up.stem.conv1
    for layer in (
        heads.box_predictor.cls_score,
        heads.box_predictor.bbox_pred,
        heads.box_head.fc1,
        stem,
    ):
        assert layer.weight.grad.any()
    assert model.proposal_generator.rpn_head.anchor_deltas.weight.grad is None
    assert not of_teacher.logits.requires_grad


# What cannot be required.


@pytest.mark.parametrize(
    "role, key, message",
    [
        ("student", "USE_SIGMOID_CE", "the student's box head .*USE_SIGMOID_CE is True.* softmax"),
        ("teacher", "USE_SIGMOID_CE", "the teacher's box head .*USE_SIGMOID_CE is True.* softmax"),
        ("student", "TRAIN_ON_PRED_BOXES", "TRAIN_ON_PRED_BOXES is True.*set it to False"),
        ("teacher", "TRAIN_ON_PRED_BOXES", ""),  # its own proposals are not used
    ],
)
def test_box_heads_of_another_kind(role, key, message):
    key = f"MODEL.ROI_BOX_HEAD.{key}"
    view = build_view(configured(key, True, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", False), role)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        view.require("box_head")
    view.require("rpn")


def test_precomputed_proposals_have_a_box_head_only():
    model = configured("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    view = build_view(model, "teacher")
    message = r"the teacher .* has no rpn\(\); it offers .*, tap, score_boxes, box_head$"
    with pytest.raises(TypeError, match=message):
        view.require("rpn")
    with pytest.raises(TypeError, match=r"no own_proposals\(\); it offers"):
        view.require("own_proposals")
    view.require("box_head")
    batch = tiny_batch()
    for item, boxes in zip(batch, BOXES):
        item["proposals"] = Instances(item["image"].shape[1:], proposal_boxes=Boxes(boxes))
        item["proposals"].objectness_logits = torch.zeros(len(boxes))
    with trained_on(view, batch):
        predictions = view.box_head()
    assert predictions.valid.sum(dim=1).tolist() == [5, 3]  # with the ground truth
