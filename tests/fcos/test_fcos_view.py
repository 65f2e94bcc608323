"""FCOS in the Distiller: its view, and what losses make of it, as a student and as a teacher."""

import copy

import naive_fcos as naive
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from distill_d2.projects.fcos import OneStageDetectorView
from fcos_case import fcos, fcos_config, without_objects
from recorded import detector

from distill_d2.distiller import Distiller
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.gid import GID
from distill_d2.losses.head_kd import HeadKD
from distill_d2.losses.icd.loss import InstanceConditionalDistillation
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing.synchronization import no_synchronization
from distill_d2.testing.tiny import tiny_batch
from distill_d2.views import Batch, build_view, require_same_boxes

STRIDES = (4, 8, 16)
PADDED = (64, 80)  # of ``tiny_batch``


def observed(images, prepare=True):
    """A recording teacher that saw them, and the model that it was made of."""
    model = fcos(NORM="BN")
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    teacher = Teacher(copy.deepcopy(model), prepare=prepare)
    for capability in ("dense", "anchors"):
        teacher.view.require(capability)
    teacher.view.taps.start()
    teacher.observe([image.float() for image in images], PADDED)
    return teacher.view, model.eval()


# The view


def test_kind():
    view = build_view(fcos(), "student")
    assert type(view) is OneStageDetectorView and view.num_classes == 3
    assert view.has_centerness and not view.has_background
    assert view.offers == ("dense", "anchors") and view.anchor_levels == ["p2", "p3", "p4"]
    assert {"p2": 4, "p3": 8, "p4": 16}.items() <= view.strides.items()
    for capability in ("rpn", "box_head", "score_boxes", "own_proposals"):
        with pytest.raises(TypeError, match=f"is a OneStageDetector, which has no {capability}"):
            view.require(capability)


def test_of_other_proposal_generators_the_features_only():
    cfg = fcos_config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32]]
    view = build_view(build_model(cfg), "teacher")
    assert view.offers == () and view.num_classes is None
    assert view.require_level("p3").stride == 8


@pytest.mark.parametrize("prepare", [False, True])
def test_dense(prepare):
    """The teacher's: its head runs here; folded norms compute the same."""
    images = [item["image"] for item in tiny_batch()]
    view, model = observed(images, prepare)
    found = view.dense()
    with torch.no_grad():
        x = torch.zeros(2, 3, *PADDED)
        for canvas, image in zip(x, images):
            canvas[:, : image.shape[1], : image.shape[2]] = (image - model.pixel_mean) / model.pixel_std
        levels = [model.backbone(x)[name] for name in ("p2", "p3", "p4")]
        outputs = model.proposal_generator.fcos_head(levels)
    parts = (found.logits, found.deltas, [level.flatten(1, 2) for level in found.centerness_levels])
    parts = (*parts[:2], torch.cat(parts[2], dim=1))
    for ours, expected in zip(parts, outputs):
        rows = torch.cat([level.flatten(2).transpose(1, 2) for level in expected], dim=1)
        torch.testing.assert_close(ours, rows, rtol=1e-3, atol=1e-3)
    assert found.level_sizes == [320, 80, 20] and not found.background and found.num_classes == 3


def test_boxes_are_those_of_the_detections():
    view, model = observed([item["image"] for item in tiny_batch()])
    found = view.dense()
    boxes = found.boxes()
    row = 320 + 3 * 10 + 5  # on p3: x 5, y 3
    x, y = 5 * 8 + 4, 3 * 8 + 4
    left, top, right, bottom = (8 * found.deltas[1, row]).tolist()
    np.testing.assert_allclose(boxes[1, row], [x - left, y - top, x + right, y + bottom], rtol=1e-5)
    assert found.anchors[row].tolist() == [x - 4, y - 4, x + 4, y + 4]
    positive = (found.deltas > 0).all(-1)
    back = found.encode(boxes, found.anchors.expand_as(boxes))
    torch.testing.assert_close(back[positive], found.deltas[positive], rtol=1e-3, atol=1e-3)


def test_the_students_head_runs_once():
    model, calls = fcos().train(), []
    view = build_view(model, "student")
    view.require("dense")
    model.proposal_generator.fcos_head.register_forward_hook(lambda *call: calls.append(call[2]))
    with view.recording(), EventStorage(0):
        model(tiny_batch())
        found = view.dense()
        assert view.anchors()["p3"].shape == (8, 10, 1, 4)
    assert len(calls) == 1 and found.logits.requires_grad
    expected = calls[0][0][0].flatten(2).transpose(1, 2)
    assert torch.equal(found.logits[:, :320], expected)


def test_anchors_are_squares_of_eight_strides():
    view, _ = observed([tiny_batch()[0]["image"]])
    anchors = view.anchors()
    assert {name: tuple(a.shape) for name, a in anchors.items()} == {
        "p2": (16, 20, 1, 4), "p3": (8, 10, 1, 4), "p4": (4, 5, 1, 4),
    }  # fmt: skip
    x, y = 5 * 8 + 4, 2 * 8 + 4
    assert anchors["p3"][2, 5, 0].tolist() == [x - 32, y - 32, x + 32, y + 32]


def test_match_and_assign_are_the_detectors_own():
    inputs = [*tiny_batch(1, objects=5), *without_objects(tiny_batch(1)), *tiny_batch(1, objects=2)]
    view, model = observed([item["image"] for item in inputs])
    truth = Batch(inputs, PADDED, 0, 1).truth
    boxes, valid = truth.boxes, truth.valid
    predictions = view.dense()
    with no_synchronization():
        labels, index = predictions.match(boxes, valid), predictions.assign(boxes, valid)
    generator = model.proposal_generator.anchor_generator
    levels = [view.level(name) for name in ("p2", "p3", "p4")]
    gt = [item["instances"] for item in inputs]
    _, targets = model.proposal_generator.targets(generator(levels), gt)
    assert labels.dtype == torch.int8 and torch.equal(labels == 1, targets.positive)
    assert not (labels < 0).any() and labels.any(dim=1).tolist() == [True, False, True]
    assert torch.equal(index[targets.positive], targets.objects[targets.positive])
    points = [
        (x, y, stride, level)
        for level, stride in enumerate(STRIDES)
        for x, y in naive.locations(64 // stride, 80 // stride, stride)
    ]
    bounds = [(-1, 16), (16, 32), (32, 1e8)]
    expected = naive.assign(points, gt[0].gt_boxes.tensor.tolist(), bounds, 1.5)
    assert labels[0].bool().tolist() == [found is not None for found in expected]


def test_rows_pair_with_those_of_detectron2s_own():
    views = [build_view(model, "student") for model in (fcos(), detector("fcos"), fcos(width=16))]
    for ours, theirs in ((views[0], views[1]), (views[1], views[2])):
        require_same_boxes(ours, theirs, "dense", "KD")
    for_others = build_view(detector("retinanet"), "teacher")
    with pytest.raises(ValueError, match="their anchors differ"):
        require_same_boxes(views[0], for_others, "dense", "KD")


# Losses


def distiller(*losses, teacher=None, **options):
    teacher = Teacher(teacher or fcos(width=16))
    return Distiller(student=fcos(), teacher=teacher, losses=losses, max_iter=10, **options).train()


def step(model, inputs=None):
    """The terms of a step; afterwards there are gradients, of all that is trained."""
    terms = model(inputs or tiny_batch())
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    return terms


OWN = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
LOSSES = {
    "FeatureMimic": (FeatureMimic, {"feature_mimic"}),
    "PKD": (PKD, {"pkd"}),
    "GID": (GID, {"gid_feature", "gid_relation", "gid_response_cls", "gid_response_reg"}),
    "DeFeat": (DeFeat, {"defeat_neck", "defeat_neck_back"}),
    "FGFI": (FGFI, {"fgfi"}),
    "ICD": (InstanceConditionalDistillation, {"icd_conf_0", "icd_reg_0", "icd_value"}),
}


# A teacher of its own kind, detectron2's own FCOS, and others, whose predictions GID cannot compare.
PAIRS = [(name, teacher) for name in LOSSES for teacher in (None, "fcos", "faster", "retinanet")]
PAIRS = [pair for pair in PAIRS if pair not in (("GID", "faster"), ("GID", "retinanet"))]


@pytest.mark.parametrize("name, teacher", PAIRS)
def test_losses_that_work(name, teacher):
    kind, terms = LOSSES[name]
    model = distiller(kind(), teacher=teacher and detector(teacher))
    found = step(model)
    assert set(found) == OWN | {f"loss_{term}" for term in terms}
    assert all(found[f"loss_{term}"] > 0 for term in terms)


@pytest.mark.parametrize("name", LOSSES)
def test_images_without_objects(name):
    step(distiller(LOSSES[name][0]()), without_objects(tiny_batch()))


def test_a_teacher_of_another_kind():
    """FCOS teaches a RetinaNet by its features."""
    model = Distiller(student=detector("retinanet"), teacher=Teacher(fcos()), losses=[PKD(), DeFeat()])
    with EventStorage(0):
        terms = model.train()(tiny_batch())
    assert terms["loss_pkd"] > 0 and terms["loss_defeat_neck"] > 0


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda: HeadKD(), r"HEAD_KD: the student is a OneStageDetector, which has no box_head\(\)"),
        (lambda: DeFeat(mask="roi", head_cls_w=1.0, head_cls_back_w=1.0), None),
    ],
)
def test_losses_of_two_stage_heads(loss, message):
    if message is None:
        terms = step(distiller(loss()))
        assert terms["loss_defeat_hcls"] > 0
        return
    with pytest.raises((TypeError, ValueError), match=message):
        distiller(loss())


def test_with_weight_zero_the_student_is_untouched():
    plain, model = fcos().train(), distiller(PKD(weight=0.0), GID(weight=0.0))
    plain.load_state_dict(model.student.state_dict())
    expected, found = plain(tiny_batch()), model(tiny_batch())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inference_is_the_students():
    model, inputs = distiller(PKD()).eval(), tiny_batch(1)
    with torch.no_grad():
        (found,), (alone,) = model(inputs), model.student(inputs)
    assert torch.equal(found["instances"].scores, alone["instances"].scores)


def test_the_student_may_start_from_the_teachers_head():
    teacher = fcos(width=16)
    model = distiller(PKD(), teacher=teacher, preload_fpn=True, preload_head=True)
    before = {name: tensor.clone() for name, tensor in model.student.state_dict().items()}
    model.preload_student()
    theirs = teacher.state_dict()
    for name, tensor in model.student.state_dict().items():
        if name.startswith("proposal_generator.fcos_head."):
            assert torch.equal(tensor, theirs[name]), name
        elif theirs[name].shape != tensor.shape or name.startswith("backbone.bottom_up."):
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, theirs[name]), name
    head = model.student.proposal_generator.fcos_head
    assert not torch.equal(before["proposal_generator.fcos_head.ctrness.weight"], head.ctrness.weight)
