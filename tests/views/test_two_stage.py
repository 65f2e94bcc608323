"""The two-stage view's predictions: of the RPN's anchors, and of the sampled proposals."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from no_synchronisation import no_synchronisation
from recorded import count_calls, detector, trained_on
from tiny import tiny_batch, tiny_config

from distill_d2.teacher import Teacher
from distill_d2.views import build_view

FAMILIES = ["faster", "mask"]
BOXES = [
    torch.tensor([[2.0, 3.0, 40.0, 50.0], [0.0, 0.0, 64.0, 56.0], [5.0, 5.0, 9.0, 12.0]]),
    torch.tensor([[10.0, 8.0, 30.0, 33.0]]),
]


def configured(*options, family="faster"):
    cfg = tiny_config(family)
    cfg.merge_from_list(list(options))
    return build_model(cfg)


def student_of(family, capability):
    view = build_view(detector(family), "student")
    view.require(capability)
    return view


def uneven_batch(family):
    """Two images of which one has more proposals, since it has more objects and both sample all."""
    batch = tiny_batch(masks=family == "mask")
    batch[1]["instances"] = batch[1]["instances"][:1]
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


def check_rpn(predictions, model, features):
    """Against the RPN's own anchors, layout, decoding and matcher."""
    rpn = model.proposal_generator
    levels = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(levels)
    anchors = rpn.anchor_generator(levels)
    # The layout and the decoding of RPN.forward.
    logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
    deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
    torch.testing.assert_close(predictions.logits, torch.cat(logits, dim=1)[..., None])
    torch.testing.assert_close(predictions.deltas, torch.cat(deltas, dim=1))
    assert torch.equal(predictions.anchors, Boxes.cat(anchors).tensor)
    boxes = torch.cat(rpn._decode_proposals(anchors, deltas), dim=1)
    torch.testing.assert_close(predictions.boxes(), boxes)
    assert predictions.level_sizes == [level.shape[1] for level in logits]
    assert not predictions.background and predictions.valid is None
    assert not predictions.centerness_levels and not predictions.class_specific


@pytest.mark.parametrize("family", FAMILIES)
def test_rpn_of_the_student_is_what_it_computed(family):
    view = student_of(family, "rpn")
    rpn_head = view.model.proposal_generator.rpn_head
    calls = count_calls(rpn_head)
    with trained_on(view, tiny_batch(masks=family == "mask")):
        predictions = view.rpn()
        view.rpn()
        assert len(calls) == 1
        rows = 3 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1)
        assert predictions.logits.shape == (2, rows, 1) and predictions.deltas.shape == (2, rows, 4)
        check_rpn(predictions, view.model, view.features)
        predictions.logits.sum().backward()
    assert rpn_head.objectness_logits.weight.grad.abs().sum() > 0
    assert view.model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rpn_of_the_teacher_runs_its_head_on_demand(family, observed):
    view, features = observed(family, "rpn")
    calls = count_calls(view.model.proposal_generator.rpn_head)
    assert not calls
    predictions, again = view.rpn(), view.rpn()
    assert len(calls) == 1
    assert torch.equal(predictions.logits, again.logits)
    assert not predictions.logits.requires_grad and not predictions.deltas.requires_grad
    check_rpn(predictions, view.model, features)


def test_rpn_matches_with_its_own_matcher(observed):
    view, _ = observed("faster", "rpn")
    predictions = view.rpn()
    boxes = torch.stack([boxes[:1] for boxes in BOXES] + [torch.tensor([[60.0, 20.0, 90.0, 60.0]])])
    valid = torch.tensor([[True], [True], [False]])
    labels = predictions.match(boxes, valid)
    for ours, per_image, there in zip(labels, boxes, valid):
        iou = pairwise_iou(Boxes(per_image[there]), Boxes(predictions.anchors))
        assert torch.equal(ours, view.model.proposal_generator.anchor_matcher(iou)[1])
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
    assert predictions.background and predictions.class_specific
    assert predictions.level_sizes == [counts[0]]


def test_rows_that_fill_up_come_last_and_are_zero():
    view = sampling_all("faster")
    with trained_on(view, uneven_batch("faster")):
        predictions = view.box_head()
    valid = predictions.valid
    assert valid[0].all() and not valid[1].all()
    assert torch.equal(valid, valid.sort(dim=1, descending=True).values)
    for values in (predictions.logits, predictions.deltas, predictions.anchors):
        assert not values[~valid].any() and values[valid].any(dim=1).all()
    assert predictions.boxes().isfinite().all()


@pytest.mark.parametrize("part, layer", [("logits", "cls_score"), ("deltas", "bbox_pred")])
def test_gradients_reach_the_students_box_head(part, layer):
    view = student_of("faster", "box_head")
    with trained_on(view, tiny_batch()):
        getattr(view.box_head(), part).pow(2).sum().backward()
    predictor = view.model.roi_heads.box_predictor
    for parameter in (
        predictor.get_submodule(layer).weight,
        view.model.roi_heads.box_head.fc1.weight,
        view.model.backbone.bottom_up.stem.conv1.weight,
    ):
        assert parameter.grad.abs().sum() > 0
    assert view.model.proposal_generator.rpn_head.anchor_deltas.weight.grad is None


@pytest.mark.parametrize("agnostic", [False, True])
def test_boxes_of_the_best_class(agnostic):
    model = configured("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)
    view = build_view(model, "student")
    view.require("box_head")
    with trained_on(view, tiny_batch()):
        predictions = view.box_head()
        proposals = [Instances((64, 64), proposal_boxes=b) for b in view.sampled_proposals()]
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


def test_an_image_without_proposals():
    view = student_of("faster", "box_head")
    with view.recording():
        view.model.backbone(torch.randn(2, 3, 64, 64))
        predictions = view.box_head([Boxes(BOXES[0]), Boxes(torch.zeros(0, 4))])
        assert predictions.valid.tolist() == [[True] * 3, [False] * 3]
        predictions.logits.sum().backward()
    assert predictions.boxes().isfinite().all()


def test_other_boxes_scored_in_the_step_do_not_change_the_students_own():
    view = student_of("faster", "box_head")
    outputs = last_output(view.model.roi_heads.box_predictor)
    with trained_on(view, tiny_batch()):
        view.score_boxes([Boxes(boxes) for boxes in BOXES])
        predictions = view.box_head()
        assert torch.equal(predictions.logits[predictions.valid], outputs[0][0])


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
        teacher.observe([item["image"].float() for item in batch], (64, 64))
        ours = view.box_head()
        theirs = teacher.view.box_head(view.sampled_proposals())
    assert len(calls) == 1
    assert torch.equal(theirs.anchors, ours.anchors) and torch.equal(theirs.valid, ours.valid)
    assert not ours.valid.all()
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.deltas, ours.deltas, rtol=1e-4, atol=1e-5)
    assert ours.logits.requires_grad and ours.deltas.requires_grad
    assert not theirs.logits.requires_grad and not theirs.deltas.requires_grad


def test_teachers_box_head_is_its_scores_filled_up(observed):
    view, _ = observed("faster", "box_head")
    boxes = [Boxes(BOXES[0])]
    (logits,), (deltas,) = view.score_boxes(boxes)
    predictions = view.box_head(boxes)
    assert torch.equal(predictions.logits[0], logits) and torch.equal(predictions.deltas[0], deltas)
    assert torch.equal(predictions.anchors[0], BOXES[0]) and predictions.valid.all()


def test_teacher_samples_no_proposals(observed):
    view, _ = observed("faster", "box_head")
    with pytest.raises(RuntimeError, match="'roi_heads' did not run"):
        view.box_head()


def test_reading_does_not_synchronise():
    view, teacher = pair("faster")
    batch = uneven_batch("faster")
    for each in (view, teacher.view):
        each.require("rpn")
    with trained_on(view, batch), teacher.view.recording():
        teacher.observe([item["image"].float() for item in batch], (64, 64))
        theirs = teacher.view.box_head(view.sampled_proposals())  # its pooler is detectron2's
        boxes, there = torch.stack([boxes[:1] for boxes in BOXES]), torch.ones(2, 1, dtype=torch.bool)
        with no_synchronisation():
            for predictions in (view.box_head(), view.rpn(), teacher.view.rpn(), theirs):
                predictions.boxes()
                predictions.match(boxes, there)


# What cannot be required.


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_box_head_with_sigmoids(role):
    options = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", False)
    view = build_view(configured(*options), role)
    message = rf"the {role}'s box head .*MODEL\.ROI_BOX_HEAD\.USE_SIGMOID_CE is True.* softmax"
    with pytest.raises(ValueError, match=message):
        view.require("box_head")
    view.require("rpn")
    view.require("score_boxes")


def test_box_head_trained_on_its_own_boxes():
    model = configured("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    message = r"MODEL\.ROI_BOX_HEAD\.TRAIN_ON_PRED_BOXES is True.*set it to False"
    with pytest.raises(ValueError, match=message):
        build_view(model, "student").require("box_head")
    build_view(model, "teacher").require("box_head")  # its own proposals are not used
    build_view(model, "student").require("rpn")


def test_cascade_has_an_rpn_only():
    options = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    model = configured(*options, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    view = build_view(model, "student")
    message = r"the student is a GeneralizedRCNN, which has no box_head\(\); it offers .*, tap, rpn$"
    with pytest.raises(TypeError, match=message):
        view.require("box_head")
    view.require("rpn")
    with trained_on(view, tiny_batch()):
        check_rpn(view.rpn(), model, view.features)


def test_precomputed_proposals_have_a_box_head_only():
    model = configured("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    view = build_view(model, "teacher")
    message = r"the teacher .* has no rpn\(\); it offers .*, tap, score_boxes, box_head$"
    with pytest.raises(TypeError, match=message):
        view.require("rpn")
    view.require("box_head")
    batch = tiny_batch()
    for item, boxes in zip(batch, BOXES):
        item["proposals"] = Instances(item["image"].shape[1:], proposal_boxes=Boxes(boxes))
        item["proposals"].objectness_logits = torch.zeros(len(boxes))
    with trained_on(view, batch):
        predictions = view.box_head()
    assert predictions.valid.sum(dim=1).tolist() == [5, 3]  # with the ground truth


def test_box_head_of_a_detector_that_did_not_run():
    view = student_of("faster", "box_head")
    with view.recording(), pytest.raises(RuntimeError, match="'roi_heads' did not run"):
        view.box_head()
