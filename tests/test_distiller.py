"""The Distiller's step: what is computed, weighted and returned; and its use without our trainer."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill_d2.distiller import Distiller
from distill_d2.losses import DistillLoss
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
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


def step(model, batch):
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_teacher_moves_with_the_model():
    model = build().to(torch.float64)
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.float64}


class Dense(DistillLoss):
    NODE = "DENSE_TEST"

    def bind(self, student, teacher):
        student.require("dense")
        teacher.require("dense")

    def forward(self, student, teacher, batch):
        distance = (student.dense().logits - teacher.dense().logits).pow(2).mean()
        return {"loss_dense": distance}


@pytest.mark.parametrize("losses, heads_run", [([PKD], 0), ([PKD, Dense], 1)])
def test_teacher_head_runs_only_when_asked(losses, heads_run):
    """Law 4."""
    model = build(*(loss() for loss in losses))
    backbones = count_calls(model.teacher.model.backbone)
    heads = count_calls(model.teacher.model.head)
    step(model, tiny_batch())
    assert (len(backbones), len(heads)) == (1, heads_run)


def test_no_teacher_pass_while_all_losses_are_off():
    model = build(PKD(start_iter=5), FeatureMimic(weight=0.0), channels=24)
    backbones = count_calls(model.teacher.model.backbone)
    losses = step(model, tiny_batch())
    assert not backbones
    assert losses["loss_pkd"] == 0 and losses["loss_feature_mimic"] == 0
    # DDP needs a gradient for each adapter in each step.
    assert all(p.grad is not None for p in model.losses.parameters())


def test_state_dict_is_the_students_with_adapters_apart():
    model = build(FeatureMimic(), channels=24)
    state = model.state_dict()
    own = [name for name in state if name.startswith("distiller.")]
    assert own == [
        f"distiller.FeatureMimic.pairs.adapters.p{level}.{kind}"
        for level in (2, 3, 4)
        for kind in ("weight", "bias")
    ]
    assert set(state) - set(own) == set(model.student.state_dict())
    other = build(FeatureMimic(), channels=24)
    other.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: state[name] for name in own})


def test_evaluation_is_the_students():
    model = build().eval()
    backbones = count_calls(model.teacher.model.backbone)
    with torch.no_grad():
        outputs, plain = model(tiny_batch()), model.student(tiny_batch())
    assert torch.equal(outputs[0]["instances"].scores, plain[0]["instances"].scores)
    assert not backbones


@pytest.mark.parametrize("task_loss_weight, levels", [(1.0, ["p2"]), (0.0, ["res2"])])
def test_nothing_is_remembered_after_a_step(task_loss_weight, levels):
    model = build(PKD(in_features=levels), task_loss_weight=task_loss_weight)
    step(model, tiny_batch())
    for view in (model.student_view, model.teacher.view):
        assert not view.taps.recorded and not view._of_step


def test_task_loss_weight():
    model = build()
    torch.manual_seed(0)
    plain = step(model, tiny_batch())
    model.task_loss_weight = 0.5
    model.student.loss_normalizer = 100
    torch.manual_seed(0)
    halved = step(model, tiny_batch())
    torch.testing.assert_close(halved["loss_cls"], plain["loss_cls"] * 0.5)
    torch.testing.assert_close(halved["loss_pkd"], plain["loss_pkd"])


def test_weights_that_losses_give_the_students_own_losses():
    """While they are on; one of 1 and one of a term that does not exist change nothing."""
    losses, student = {}, tiny_detector()
    for start in (0, 5):
        pkd = PKD(start_iter=start)
        pkd.task_weights = {"loss_cls": 3.0, "loss_box_reg": 1.0, "loss_other": 2.0}
        student.loss_normalizer = 100
        model = Distiller(student=student, teacher=Teacher(tiny_detector()), losses=[pkd])
        torch.manual_seed(0)
        losses[start] = step(model, tiny_batch())
    torch.testing.assert_close(losses[0]["loss_cls"], losses[5]["loss_cls"] * 3)
    torch.testing.assert_close(losses[0]["loss_box_reg"], losses[5]["loss_box_reg"])


# Distillation alone: TASK_LOSS_WEIGHT 0.

ICD = "InstanceConditionalDistillation"
SMALL_ICD = ["INS.HIDDEN_DIM", 16, "INS.ATT_HEADS", 4]
GID_ON_FEATURES = ["GID.GI_MODE", "gt", "GID.RESPONSE_CLS_WEIGHT", 0.0, "GID.RESPONSE_REG_WEIGHT", 0.0]


def build_alone(tmp_path, types, family="retinanet", opts=()):
    """With these keys below MODEL.DISTILLER, in training mode."""
    teacher = save_teacher(tiny_config(family, width=16), tmp_path)
    cfg = distiller_config(tiny_config(family), teacher, types)
    cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT = 0.0
    keys = [f"MODEL.DISTILLER.{key}" for key in opts[::2]]
    cfg.merge_from_list([item for pair in zip(keys, opts[1::2]) for item in pair])
    return build_model(cfg).train()


def own_terms(losses):
    return {name for name in losses if name.startswith(("loss_cls", "loss_box", "loss_rpn"))}


@pytest.mark.parametrize(
    "family, types, opts, heads_run",
    [
        ("retinanet", ["PKD"], ["PKD.IN_FEATURES", ["res2"]], False),
        ("retinanet", ["PKD", "FeatureMimic"], [], False),
        ("retinanet", ["GID"], GID_ON_FEATURES, False),
        ("faster", ["DeFeat"], [], False),
        ("retinanet", ["GID"], [], True),
        ("retinanet", ["FGFI"], [], True),
        ("faster", ["HeadKD"], [], True),
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
    assert bool(own_terms(losses)) is heads_run and all(losses[name] == 0 for name in own_terms(losses))
    assert any(loss > 0 for loss in losses.values())


def test_student_runs_whole_with_any_weight():
    assert build(task_loss_weight=0.0).features_only and not build(task_loss_weight=0.1).features_only


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


ALL = [
    ("retinanet", ["PKD"], ["PKD.IN_FEATURES", ["res2", "res3"]]),
    ("faster", ["DeFeat"], ["DEFEAT.BB_FEATURES", ["res3"], "DEFEAT.HINT_BB_W", 1.0]),
    ("retinanet", [ICD], SMALL_ICD),
    ("retinanet", [ICD], [*SMALL_ICD, "BYPASS_DISTILL", 0, "INS_ATT_MIMIC.WEIGHT_VALUE", 0.0]),
    ("retinanet", ["PKD", "GHND"], ["GHND.IN_FEATURES", ["res4"], "GHND.START_ITER", 1]),
    ("retinanet", ["GID"], []),
]


@pytest.mark.parametrize("family, types, opts", ALL)
def test_everything_that_is_trained_alone_gets_a_gradient(tmp_path, family, types, opts):
    """As DDP needs it in each step without find_unused_parameters, whatever losses reach or are off."""
    model = build_alone(tmp_path, types, family, opts)
    step(model, tiny_batch())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None]


def test_a_loss_that_is_off_gives_a_zero(tmp_path):
    opts = ["PKD.IN_FEATURES", ["res2"], "PKD.START_ITER", 5]
    model = build_alone(tmp_path, ["PKD"], opts=opts)
    backbones = count_calls(model.teacher.model.backbone.bottom_up.stem)
    losses = step(model, tiny_batch())
    assert losses and sum(losses.values()) == 0 and not backbones
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_one_of_two_losses_is_off(tmp_path):
    opts = ["PKD.IN_FEATURES", ["res3"], "PKD.START_ITER", 5, "FEATURE_MIMIC.IN_FEATURES", ["res2"]]
    model = build_alone(tmp_path, ["PKD", "FeatureMimic"], opts=opts)
    losses = step(model, tiny_batch())
    assert losses["loss_feature_mimic"] > 0
    res3 = list(model.student.backbone.bottom_up.res3.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in res3)
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.any()


def test_no_ground_truth_is_needed(tmp_path):
    model = build_alone(tmp_path, ["PKD"], "faster", ["PKD.IN_FEATURES", ["res2"]])
    losses = step(model, [{"image": item["image"]} for item in tiny_batch()])
    assert losses["loss_pkd"] > 0


# Messages.


def test_table_and_teacher_line_at_start(caplog):
    with caplog.at_level("INFO"):
        build(channels=24)
    assert "1x1 convolution" in caplog.text and "| PKD" in caplog.text
    assert "runs backbone and neck" in caplog.text


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
