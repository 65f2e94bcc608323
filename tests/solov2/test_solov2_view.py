"""SOLOv2 in the Distiller: its view, what losses on the neck make of it as a student and a teacher."""

import functools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from distill_d2.projects.solov2 import SOLOv2View
from recorded import detector
from solov2_case import batch, config, solov2

from distill_d2.distiller import Distiller
from distill_d2.initialize_student import initialize_student
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.gid import GID
from distill_d2.losses.head_kd import HeadKD
from distill_d2.losses.icd import InstanceConditionalDistillation
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing.tiny import distiller_config, save_teacher
from distill_d2.views import build_view

NECK = ["p2", "p3", "p4", "p5", "p6"]
OWN = {"loss_ins", "loss_cate"}
ICD = functools.partial(InstanceConditionalDistillation, hidden_dim=16, att_heads=4, bypass_distill=0)


def test_kind():
    view = build_view(solov2(), "student")
    assert type(view) is SOLOv2View and view.num_classes == 3
    assert view.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert view.anchor_levels == NECK and set(view.stage_shapes) >= {"res2", "res5"}
    for capability in ("dense", "rpn", "box_head", "score_boxes", "own_proposals"):
        with pytest.raises(TypeError, match=f"the student is a SOLOv2, which has no {capability}"):
            view.require(capability)


def test_levels_are_what_the_heads_read():
    model, inputs = solov2().train(), batch(2, 1)
    view, seen = build_view(model, "student"), []
    model.ins_head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with view.recording(), EventStorage(0):
        model(inputs)
        features = view.features
        assert list(features) == NECK
        for level, read in zip(features.values(), seen[0]):
            assert torch.equal(level, read) and level.requires_grad


def test_anchors_by_hand():
    """Squares of 8 strides around the center of each cell."""
    model = solov2().train()
    view = build_view(model, "student")
    with view.recording():
        model.backbone(torch.zeros(1, 3, 64, 128))
        anchors = view.anchors()
    assert list(anchors) == NECK
    for name, stride in view.strides.items():
        assert anchors[name].shape == (64 // stride, 128 // stride, 1, 4)
    assert anchors["p2"][0, 0, 0].tolist() == [2 - 16, 2 - 16, 2 + 16, 2 + 16]
    assert anchors["p4"][1, 3, 0].tolist() == [56 - 64, 24 - 64, 56 + 64, 24 + 64]


# Losses


def distiller(*losses, student=None, teacher=None, **options):
    teacher = Teacher(teacher or solov2(seed=1, width=16, channels=32))
    return Distiller(student=student or solov2(), teacher=teacher, losses=losses, **options).train()


def step(model, inputs=None):
    """The terms of a step; afterwards there are gradients, of the student and the losses alone."""
    with EventStorage(0):
        terms = model(inputs or batch(3, 2))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    teacher = model.teacher.model
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    return terms


@pytest.mark.parametrize(
    "loss, terms",
    [
        (ICD, {"icd_conf_0", "icd_reg_0", "icd_value"}),
        (FeatureMimic, {"feature_mimic"}),
        (PKD, {"pkd"}),
        (functools.partial(FGFI, finest_scale=16.0), {"fgfi"}),
        (functools.partial(DeFeat, finest_scale=16.0), {"defeat_neck", "defeat_neck_back"}),
        (functools.partial(DeFeat, mask="roi"), {"defeat_neck", "defeat_neck_back"}),
        (functools.partial(DeFeat, mask="gaussian"), {"defeat_neck", "defeat_neck_back"}),
    ],
)
def test_losses_that_work(loss, terms):
    """A wider teacher; what they are of does reach the student's neck."""
    model = distiller(loss())
    found = step(model)
    assert set(found) == OWN | {f"loss_{name}" for name in terms}
    assert all(found[f"loss_{name}"] > 0 for name in terms)
    model.zero_grad()
    with EventStorage(0):
        again = model(batch(3, 2))
    sum(again[f"loss_{name}"] for name in terms).backward()
    assert model.student.backbone.fpn_lateral2.weight.grad.any()


@pytest.mark.parametrize("loss", [ICD, FeatureMimic, PKD, FGFI, DeFeat])
def test_no_objects(loss):
    terms = step(distiller(loss()), batch(0, 0))
    assert terms["loss_ins"] == 0 and terms["loss_cate"] > 0


def test_neck_of_another_kind():
    step(distiller(PKD(), FeatureMimic(), teacher=detector("mask")))
    model = distiller(PKD(), student=detector("faster"), teacher=solov2())
    assert "loss_pkd" in step(model) and model.losses["PKD"].pairs.in_features == NECK


def test_teachers_heads_do_not_run():
    model, calls = distiller(PKD(), ICD()), []
    for head in (model.teacher.model.ins_head, model.teacher.model.mask_head):
        head.register_forward_hook(lambda *_: calls.append(1))
    step(model)
    assert calls == []


def test_features_alone():
    """Without the student's own losses its heads do not run, and are not trained."""
    model = distiller(PKD(), task_loss_weight=0.0)
    assert set(step(model)) == {"loss_pkd"}
    assert not any(p.requires_grad for p in model.student.ins_head.parameters())


@pytest.mark.parametrize(
    "loss, message",
    [
        (HeadKD, r"the student is a SOLOv2, which has no box_head\(\); it offers features, .*anchors"),
        (GID, r"SOLOv2, which has no "),
        (functools.partial(DeFeat, head_cls_w=1.0), r"SOLOv2, which has no "),
    ],
)
def test_losses_that_are_refused(loss, message):
    """When the Distiller is built: masks have neither boxes nor rows that could be compared."""
    with pytest.raises((TypeError, ValueError), match=message):
        distiller(loss())


def test_heads_of_the_teacher_are_a_start(caplog):
    """PRELOAD_HEAD copies both heads; the first convolutions fit where the necks have one width."""
    student, teacher = solov2(), solov2(seed=1, width=16)
    with torch.no_grad():
        for tensor in teacher.state_dict().values():
            tensor.add_(torch.rand(tensor.shape).to(tensor.dtype))
    heads = {n for n in student.state_dict() if n.startswith(("ins_head.", "mask_head."))}
    assert initialize_student(student, teacher, head=True) == len(heads) > 20
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert {n for n in heads if torch.equal(ours[n], theirs[n])} == heads
    assert not torch.equal(ours["backbone.fpn_output2.weight"], theirs["backbone.fpn_output2.weight"])
    wide = solov2(seed=2, channels=32)
    with caplog.at_level("INFO"):
        count = initialize_student(student, wide, head=True)
    assert count == len(heads) - caplog.text.count(": teacher (") < len(heads)
    line = "ins_head.kernel_tower.0.weight: teacher (32, 34, 3, 3), student (32, 18, 3, 3)"
    assert line in caplog.text


def test_from_a_config(tmp_path):
    """A teacher from its yaml and weights; the student starts from its heads."""
    cfg = distiller_config(config(), save_teacher(config(width=16), tmp_path), ["PKD"])
    cfg.MODEL.DISTILLER.PRELOAD_HEAD = True
    model = build_model(cfg).train()
    model.preload_student()
    theirs = model.teacher.model.ins_head.state_dict()
    assert all(torch.equal(x, theirs[n]) for n, x in model.student.ins_head.state_dict().items())
    assert set(step(model)) == OWN | {"loss_pkd"}


def test_inference_is_the_students():
    model, inputs = distiller(PKD()), batch(1)
    with torch.no_grad():
        (found,), (alone,) = model.eval()(inputs), model.student(inputs)
    assert torch.equal(found["instances"].scores, alone["instances"].scores)
    assert torch.equal(found["instances"].pred_masks, alone["instances"].pred_masks)
