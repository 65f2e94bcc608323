"""Parts of a student that are not trained: by name, and what no loss reaches."""

import pytest
import torch
from detectron2.modeling import build_model

from distill_d2.distiller import Distiller
from distill_d2.freeze import freeze, matching_names, summary
from distill_d2.losses import DistillLoss
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.ghnd import GHND
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing import step
from distill_d2.testing.tiny import tiny_batch, tiny_config, tiny_detector, use_ghnd

KEY = "MODEL.DISTILLER.FREEZE"
RES3_NORMS = {f"backbone.bottom_up.res3.0.{layer}.norm" for layer in ("conv1", "conv2", "shortcut")}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_of(model, modules):
    """The dotted names of these modules."""
    known = {module: name for name, module in model.named_modules()}
    return {known[module] for module in modules}


def inside(model, *prefixes):
    """Names of the parameters below these modules."""
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


# By name.


@pytest.mark.parametrize(
    "patterns, prefixes, line",
    [
        ([], [], ""),
        (
            [r"bottom_up\.res[34]\.", "^head.cls_score.bias$"],
            ["backbone.bottom_up.res3.", "backbone.bottom_up.res4.", "head.cls_score.bias"],
            "19 parameters are not trained: backbone.bottom_up.res3 (9), backbone.bottom_up.res4 (9), head",
        ),
    ],
)
def test_parameters_whose_names_match(caplog, patterns, prefixes, line):
    model = tiny_detector()
    with caplog.at_level("INFO"):
        assert bool(freeze(model, patterns, KEY)) is bool(patterns)
    frozen = inside(model, *prefixes) if prefixes else set()
    assert trained(model) == inside(model, "") - frozen
    assert f"{KEY}: {line}" in caplog.text if line else not caplog.text


@pytest.mark.parametrize(
    "patterns, messages",
    [
        (["res3", "res7"], [f"{KEY}: 'res7' matches no name", "'backbone.", "'head."]),
        (["^res3"], ["'^res3' matches no name"]),
        (["res3", "res[3"], [f"{KEY}: 'res[3' is not a valid regular expression: unterminated"]),
    ],
)
def test_wrong_patterns(patterns, messages):
    model = tiny_detector()
    with pytest.raises(ValueError) as caught:
        freeze(model, patterns, KEY)
    assert all(message in str(caught.value) for message in messages)
    assert trained(model) == inside(model, "")


def test_matching_names_keep_their_order():
    names = ["b.weight", "a.weight", "a.bias", "c.bias"]
    assert matching_names(names, ["^a", r"c\."], KEY) == ["a.weight", "a.bias", "c.bias"]
    assert matching_names(names, ["bias", "^b"], KEY) == ["b.weight", "a.bias", "c.bias"]
    assert matching_names(names, [], KEY) == []
    with pytest.raises(ValueError, match=r"'d' matches no name; names are, for example, \[\]"):
        matching_names([], ["d"], KEY)


def test_summary():
    names = ["a.b.c.weight", "a.b.c.bias", "a.b.d.e.weight", "a.b.d.f.weight", "x.weight", "a.b.c.x.y"]
    assert summary(names) == "a.b.c (3), a.b.d (2), x (1)"
    assert summary(names, depth=1) == "a (5), x (1)"
    assert summary([]) == "none"


# Running statistics of norms.


@pytest.mark.parametrize(
    "pattern, still, fixed",
    [
        ("res3", RES3_NORMS, {"weight", "bias"}),
        (r"res3.*running_(mean|var)$", RES3_NORMS, set()),
        (r"res3.*(weight|bias)$", set(), {"weight", "bias"}),
        (r"res3.0.conv1.norm", {"backbone.bottom_up.res3.0.conv1.norm"}, {"weight", "bias"}),
    ],
)
def test_norms_whose_statistics_match(pattern, still, fixed):
    model = tiny_detector()
    assert names_of(model, freeze(model, [pattern], KEY)) == still
    norm = "backbone.bottom_up.res3.0.conv1.norm"
    assert inside(model, norm) - trained(model) == {f"{norm}.{kind}" for kind in fixed}


def distiller(family="retinanet", losses=None, width=8, **options):
    """A Distiller of a detector and one of its kind; by default of FeatureMimic on the neck."""
    teacher = Teacher(tiny_detector(family, width=width))
    losses = losses or [FeatureMimic()]
    return Distiller(student=tiny_detector(family), teacher=teacher, losses=losses, **options)


def statistics(model):
    state = model.student.state_dict()
    return {name: value.clone() for name, value in state.items() if "running" in name}


def moved(model, before):
    """Names of the norms whose statistics changed."""
    after = statistics(model)
    return {name.rpartition(".")[0] for name in after if not torch.equal(before[name], after[name])}


def test_frozen_norms_stay_in_eval_mode_and_keep_their_statistics():
    """Unless only their weights are frozen."""
    model = distiller(freeze_names=["res3", r"res2.*\.(weight|bias)$"])
    norms = {name for name, m in model.student.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    model.train()
    before = statistics(model)
    for _ in range(2):
        step(model, tiny_batch())
        modes = {name: module.training for name, module in model.student.named_modules()}
        assert {name for name in norms if not modes[name]} == RES3_NORMS
        assert {name for name in modes if not modes[name]} == RES3_NORMS
        assert model.eval().training is False and not any(m.training for m in model.student.modules())
        assert model.train() is model and model.training
    assert moved(model, before) == norms - RES3_NORMS
    prefix = "backbone.bottom_up."
    assert not inside(model.student, f"{prefix}res2.", f"{prefix}res3.") & trained(model.student)


# What no loss reaches.

ALL_STAGES = [f"backbone.bottom_up.{part}" for part in ("stem", "res2", "res3", "res4", "res5")]


@pytest.mark.parametrize(
    "family, levels, reached",
    [
        ("retinanet", ["res2"], ALL_STAGES[:2]),
        ("retinanet", ["res3", "res2"], ALL_STAGES[:3]),
        ("retinanet", ["p2", "p3", "p4"], ["backbone."]),
        ("retinanet", ["p2", "res3"], [*ALL_STAGES, "backbone.fpn_lateral", "backbone.fpn_output2"]),
        (
            *("retinanet", ["p3"]),
            [*ALL_STAGES, "backbone.fpn_lateral3", "backbone.fpn_lateral4", "backbone.fpn_output3"],
        ),
        ("faster", ["res2", "res5"], ALL_STAGES),
        ("fcos", ["res3"], ALL_STAGES[:3]),
    ],
)
def test_only_what_the_losses_reach_is_trained(family, levels, reached):
    """A pyramid's level has what lies above it; a loss on p3 does not reach p2's own convolutions."""
    model = distiller(family, [FeatureMimic(in_features=levels)], task_loss_weight=0.0)
    assert trained(model.student) == inside(model.student, *reached)
    step(model.train(), tiny_batch())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model = distiller(family, [FeatureMimic(in_features=levels)], task_loss_weight=1e-3)
    assert trained(model.student) == inside(model.student, "")


def test_what_is_not_reached_is_logged(caplog):
    with caplog.at_level("INFO"):
        distiller(losses=[FeatureMimic(in_features=["res3"])], task_loss_weight=0.0)
    line = next(line for line in caplog.text.splitlines() if "TASK_LOSS_WEIGHT is 0" in line)
    assert "29 parameters that no loss reaches are not trained: " in line
    assert "backbone.fpn_lateral2 (2)" in line and "backbone.bottom_up.res4 (9)" in line
    assert "head.cls_score (2)" in line and "res3" not in line


def test_a_bottleneck_that_rounds_is_trained_whole():
    """It rounds in evaluation alone; rounding has no gradient."""
    cfg = tiny_config()
    use_ghnd(cfg)
    cfg.MODEL.BOTTLENECK.QUANT_BITS = 8
    student, teacher = build_model(cfg), Teacher(tiny_detector())
    losses = [GHND(in_features=["res2", "res3"])]
    Distiller(student=student, teacher=teacher, losses=losses, task_loss_weight=0.0)
    assert trained(student) == inside(student, *ALL_STAGES[:3])


# Nothing is left.


@pytest.mark.parametrize(
    "loss, weight, names",
    [
        (PKD, 1.0, ["."]),
        (PKD, 0.0, [r"bottom_up\.(stem|res2)"]),
        (PKD, 0.0, ["bottom_up", "head"]),
        (FeatureMimic, 1.0, ["."]),  # its adapters are not enough
    ],
)
def test_nothing_is_left_to_train(loss, weight, names):
    losses = [loss(in_features=["res2"])]
    with pytest.raises(ValueError) as caught:
        distiller(losses=losses, width=16, task_loss_weight=weight, freeze_names=names)
    kinds = [loss.__name__]
    message = (
        f"{KEY} is {names}, TASK_LOSS_WEIGHT {weight} and TYPES {kinds}: no parameter of the student"
    )
    assert message in str(caught.value)


class MeanFeature(DistillLoss):
    """Of all levels of the neck, about which it states nothing."""

    NODE = "MEAN_FEATURE"

    def forward(self, student, teacher, batch):
        pairs = zip(student.features.values(), teacher.features.values())
        return {"loss_mean_feature": sum((s.mean() - t.mean()).square() for s, t in pairs)}


def test_a_loss_that_states_nothing_reads_all_features():
    """Beside one that only needs the first stage of both."""
    model = distiller(losses=[PKD(in_features=["res2"]), MeanFeature()], task_loss_weight=0.0)
    assert model.features_only and trained(model.student) == inside(model.student, "backbone.")
    assert step(model.train(), tiny_batch())["loss_mean_feature"] > 0
