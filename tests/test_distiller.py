"""The Distiller's step: what is computed, weighted and returned; and its use without our trainer."""

import pytest
import torch
from detectron2.modeling import build_model
from recorded import count_calls

from distill_d2.distiller import Distiller
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing import step
from distill_d2.testing.tiny import (
    distiller_config,
    save_teacher,
    tiny_batch,
    tiny_config,
    tiny_detector,
)


def build(*losses, student="retinanet", teacher="retinanet", channels=16, **options):
    """A Distiller of tiny detectors, in training mode."""
    model = Distiller(
        student=tiny_detector(student),
        teacher=Teacher(tiny_detector(teacher, width=16, channels=channels)),
        losses=losses or [PKD()],
        **options,
    )
    return model.train()


def test_teacher_moves_with_the_model():
    model = build().to(torch.float64)
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.float64}


def test_state_is_loaded_whole():
    model = build(FeatureMimic(), channels=24)
    state = model.state_dict()
    other = build(FeatureMimic(), channels=24)
    other.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    own = {name: value for name, value in state.items() if name.startswith("distiller.")}
    assert len(own) == 6
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(own)


@pytest.mark.parametrize("task_loss_weight, levels", [(1.0, ["p2"]), (0.0, ["res2"])])
def test_nothing_is_remembered_after_a_step(task_loss_weight, levels):
    model = build(PKD(in_features=levels), task_loss_weight=task_loss_weight)
    step(model, tiny_batch())
    for view in (model.student_view, model.teacher.view):
        assert not view.taps.recorded and not view._of_step


@pytest.mark.parametrize(
    "weight, start, factors",
    [
        (0.5, 5, {"loss_cls": 0.5, "loss_box_reg": 0.5}),
        (1.0, 0, {"loss_cls": 3.0, "loss_box_reg": 1.0, "loss_pkd": 1.0}),
        (0.5, 0, {"loss_cls": 1.5, "loss_box_reg": 0.5, "loss_pkd": 1.0}),
    ],
)
def test_weights_of_the_students_own_losses(weight, start, factors):
    """TASK_LOSS_WEIGHT, and those that losses ask for while they are on; a term may not exist."""
    student, teacher = tiny_detector(), Teacher(tiny_detector(width=16))
    plain, weighted = PKD(), PKD(start_iter=start)
    weighted.task_weights = {"loss_cls": 3.0, "loss_box_reg": 1.0, "loss_other": 2.0}
    losses = []
    for loss, task_weight in ((plain, 1.0), (weighted, weight)):
        student.loss_normalizer = 100
        model = Distiller(student=student, teacher=teacher, losses=[loss], task_loss_weight=task_weight)
        losses.append(step(model, tiny_batch()))
    for name, factor in factors.items():
        torch.testing.assert_close(losses[1][name], losses[0][name] * factor)


# Distillation alone: TASK_LOSS_WEIGHT 0.

GID_ON_FEATURES = ["GID.GI_MODE", "gt", "GID.RESPONSE_CLS_WEIGHT", 0.0, "GID.RESPONSE_REG_WEIGHT", 0.0]


def build_alone(tmp_path, types, family="retinanet", opts=()):
    """With these keys below MODEL.DISTILLER, in training mode."""
    teacher = save_teacher(tiny_config(family, width=16), tmp_path)
    cfg = distiller_config(tiny_config(family), teacher, types)
    cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT = 0.0
    keys = [f"MODEL.DISTILLER.{key}" for key in opts[::2]]
    cfg.merge_from_list([item for pair in zip(keys, opts[1::2]) for item in pair])
    return build_model(cfg).train()


@pytest.mark.parametrize(
    "family, types, opts, heads_run",
    [
        ("retinanet", ["PKD"], ["PKD.IN_FEATURES", ["res2"]], False),
        ("retinanet", ["GID"], GID_ON_FEATURES, False),
        ("faster", ["DeFeat"], [], False),
        ("retinanet", ["FGFI"], [], True),
        ("faster", ["PKD", "HeadKD"], ["PKD.IN_FEATURES", ["res2"]], True),
        ("faster", ["DeFeat"], ["DEFEAT.HEAD_CLS_W", 1.0], True),
    ],
)
def test_student_runs_as_far_as_losses_read_it(tmp_path, family, types, opts, heads_run):
    """Its own losses, where they are computed, count nothing."""
    model = build_alone(tmp_path, types, family, opts)
    student = model.student
    head = student.head if family == "retinanet" else student.roi_heads.box_head
    heads = count_calls(head)
    losses = step(model, tiny_batch())
    assert model.features_only is not heads_run and bool(heads) is heads_run
    own = [name for name in losses if name.startswith(("loss_cls", "loss_box", "loss_rpn"))]
    assert bool(own) is heads_run and all(losses[name] == 0 for name in own)
    assert any(loss > 0 for loss in losses.values())
    assert not build(task_loss_weight=0.1).features_only


def test_losses_on_features_are_those_of_a_whole_step(tmp_path):
    """The same features, whether the rest of both detectors is computed or not."""
    model = build_alone(tmp_path, ["PKD", "FeatureMimic"], opts=["PKD.IN_FEATURES", ["res3", "res2"]])
    alone = step(model, tiny_batch())
    model.features_only = False
    model.student_view.require("dense")
    model.teacher.view.require("dense")
    whole = step(model, tiny_batch())
    for name in ("loss_pkd", "loss_feature_mimic"):
        torch.testing.assert_close(alone[name], whole[name])


@pytest.mark.parametrize("other_starts", [0, 5])
def test_losses_that_are_off(tmp_path, other_starts):
    """One of two, or both; DDP needs a gradient of all that is trained. Ground truth is not needed."""
    opts = ["PKD.IN_FEATURES", ["res3"], "PKD.START_ITER", 5, "FEATURE_MIMIC.IN_FEATURES", ["res2"]]
    opts += ["FEATURE_MIMIC.START_ITER", other_starts]
    model = build_alone(tmp_path, ["PKD", "FeatureMimic"], opts=opts)
    stems = count_calls(model.teacher.model.backbone.bottom_up.stem)
    images, on = [{"image": item["image"]} for item in tiny_batch()], other_starts == 0
    losses = step(model, images)
    assert losses and (sum(losses.values()) > 0) == (losses["loss_feature_mimic"] > 0) == on
    assert bool(stems) is on
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    res3 = model.student.backbone.bottom_up.res3
    assert not any(p.grad.any() for p in res3.parameters())
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.any() == on
    assert model(images) and model.iteration == 2  # without a trainer it counts its steps


# Messages.


def test_table_and_teacher_line_at_start(caplog):
    with caplog.at_level("INFO"):
        build(channels=24)
    assert "1x1 convolution" in caplog.text and "| PKD" in caplog.text
    assert "runs backbone and neck" in caplog.text


@pytest.mark.parametrize(
    "terms, found",
    [
        (torch.zeros(()), "{'Tensor': ()}"),
        (None, "{'NoneType': ('NoneType',)}"),
        ({"loss_x": 0}, "{'loss_x': ('int',)}"),
        ({"loss_x": torch.zeros(2)}, "{'loss_x': (2,)}"),
    ],
)
def test_a_loss_returns_a_dict_of_scalars(terms, found):
    model = build()
    model.losses["PKD"].forward = lambda *_: terms
    with pytest.raises(TypeError) as caught:
        step(model, tiny_batch())
    assert (
        str(caught.value) == f"PKD.forward returned {found}; expected a dict of scalar tensors by name"
    )


def test_terms_without_gradients_are_told(caplog):
    model = build()
    model.losses["PKD"].forward = lambda *_: {"loss_x": torch.zeros(())}
    step(model, tiny_batch())
    assert "the terms ['loss_x'], none with a gradient" in caplog.text


def test_colliding_terms_are_an_error():
    model = build()
    model.losses["PKD"].forward = lambda *_: {"loss_cls": torch.zeros((), requires_grad=True)}
    with pytest.raises(ValueError, match="the loss PKD returns terms .'loss_cls'., which exist already"):
        step(model, tiny_batch())


def test_compiled_teacher_cannot_be_tapped_inside(tmp_path):
    cfg = distiller_config(tiny_config(), save_teacher(tiny_config(), tmp_path))
    cfg.MODEL.DISTILLER.TEACHER_COMPILE = True
    cfg.MODEL.DISTILLER.PKD.IN_FEATURES = ["res3"]
    with pytest.raises(ValueError, match="TEACHER_COMPILE is True, but losses read"):
        build_model(cfg)


@pytest.mark.slow
def test_compiled_teacher_gives_the_same_losses(tmp_path):
    cfg = distiller_config(tiny_config(), save_teacher(tiny_config(width=16), tmp_path))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        cfg.MODEL.DISTILLER.TEACHER_COMPILE = compiled
        losses.append(step(build_model(cfg), tiny_batch())["loss_pkd"])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
