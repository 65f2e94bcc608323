"""What all losses share: config node, schedule, idling, and building them by name."""

import inspect

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill_d2 import DISTILL_LOSS_REGISTRY, DistillLoss, add_distill_config
from distill_d2.losses import FeaturePairs, build_losses
from distill_d2.testing.tiny import distiller_config, save_teacher, tiny_batch, tiny_config


class Scaled(DistillLoss):
    NODE = "SCALED"

    def __init__(self, *, levels=("p3",), weight=2.0, tau=0.5, **schedule):
        super().__init__(weight=weight, **schedule)
        self.levels, self.tau = levels, tau


class Finer(Scaled):
    NODE = "FINER"

    def __init__(self, *, extra=True, **others):
        super().__init__(**others)
        self.extra = extra


@pytest.fixture
def register():
    """Registers a loss for the length of a test."""
    names = []

    def add(loss):
        DISTILL_LOSS_REGISTRY.register(loss)
        names.append(loss.__name__)

    yield add
    for name in names:
        DISTILL_LOSS_REGISTRY._obj_map.pop(name)


def node_of(*types):
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.MODEL.DISTILLER.TYPES = list(types)
    return cfg.MODEL.DISTILLER


def test_node_has_the_arguments_and_their_defaults():
    distiller = CfgNode()
    Scaled.add_config(distiller)
    assert dict(distiller.SCALED) == {
        "WEIGHT": 2.0,
        "START_ITER": 0,
        "STOP_ITER": -1,
        "WARMUP_ITERS": 0,
        "LEVELS": ["p3"],
        "TAU": 0.5,
    }


def test_node_of_a_subclass_has_its_bases_arguments_too():
    distiller = CfgNode()
    Finer.add_config(distiller)
    assert distiller.FINER.EXTRA is True and distiller.FINER.TAU == 0.5
    assert distiller.FINER.WEIGHT == 2.0


def test_from_config_passes_every_key():
    distiller = CfgNode()
    Finer.add_config(distiller)
    options = ["WEIGHT", 3.0, "START_ITER", 4, "STOP_ITER", 9, "WARMUP_ITERS", 2]
    distiller.FINER.merge_from_list([*options, "LEVELS", ["p4", "p5"], "TAU", 0.1, "EXTRA", False])
    loss = Finer.from_config(distiller)
    assert (loss.weight, loss.start_iter, loss.stop_iter, loss.warmup_iters) == (3.0, 4, 9, 2)
    assert (loss.levels, loss.tau, loss.extra) == (["p4", "p5"], 0.1, False)


def test_every_registered_loss_is_built_from_its_defaults():
    names = [name for name, _ in DISTILL_LOSS_REGISTRY]
    losses = build_losses(node_of(*names))
    assert list(losses) == names and {"PKD", "FeatureMimic"} <= set(names)
    assert all(type(loss).__name__ == name for name, loss in losses.items())


def test_nodes_come_with_registration(register):
    register(Scaled)
    assert node_of().SCALED.TAU == 0.5


def factors(iterations, **schedule):
    loss = DistillLoss(**schedule)
    return [loss.factor(iteration) for iteration in iterations]


def test_always_on_by_default():
    assert factors([0, 1, 10**6]) == [1.0, 1.0, 1.0]


def test_start_and_stop_are_sharp():
    assert factors([2, 3, 5, 6], weight=2.0, start_iter=3, stop_iter=6) == [0.0, 2.0, 2.0, 0.0]


def test_warmup_is_linear_and_starts_above_zero():
    expected = [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert factors(range(4, 10), weight=4.0, start_iter=5, warmup_iters=3) == expected


def test_stop_within_warmup():
    assert factors([0, 1, 2], weight=4.0, stop_iter=2, warmup_iters=3) == [1.0, 2.0, 0.0]


def test_zero_weight_is_off():
    assert factors([0, 5], weight=0.0, warmup_iters=3) == [0.0, 0.0]


@pytest.mark.parametrize(
    "schedule",
    [
        {"weight": -0.1},
        {"warmup_iters": -1},
        {"start_iter": 5, "stop_iter": 5},
        {"start_iter": 5, "stop_iter": 3},
        {"stop_iter": 0},
    ],
)
def test_bad_schedule(schedule):
    key, value = list(schedule.items())[-1]
    with pytest.raises(ValueError, match=rf"MODEL.DISTILLER.SCALED: expected .*{key.upper()} {value}"):
        Scaled(**schedule)


def test_idle_reaches_every_parameter():
    loss = Scaled()
    loss.a = torch.nn.Conv2d(2, 3, 1)
    loss.b = torch.nn.ModuleDict({"p3": torch.nn.Linear(2, 2)})
    terms = loss.idle()
    assert list(terms) == ["loss_scaled"] and terms["loss_scaled"] == 0
    terms["loss_scaled"].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in loss.parameters())


def test_idle_skips_frozen_parameters():
    loss = Scaled()
    loss.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    assert loss.idle() == {}


def test_forward_must_be_implemented():
    with pytest.raises(NotImplementedError, match="Scaled.forward"):
        Scaled()(None, None, None)


def test_no_types():
    with pytest.raises(ValueError, match=r"TYPES is \[\]; expected one or more .*'FeatureMimic'.*'PKD'"):
        build_losses(node_of())


def test_unknown_type_lists_the_known():
    with pytest.raises(ValueError, match=r"'FeatureMimic'.*'PKD'.*; unknown: \['PDK'\]"):
        build_losses(node_of("PKD", "PDK"))


def test_repeated_type():
    with pytest.raises(ValueError, match=r"TYPES is \['PKD', 'PKD'\]; expected one or more different"):
        build_losses(node_of("PKD", "PKD"))


class MeanFeature(DistillLoss):
    NODE = "MEAN_FEATURE"

    def __init__(self, *, in_features=("p3", "p4"), weight=2.0, **schedule):
        super().__init__(weight=weight, **schedule)
        self.pairs = FeaturePairs(in_features)

    def forward(self, student, teacher, batch):
        self.seen = (student.features, teacher.features)
        pairs = self.pairs(student, teacher).values()
        return {"loss_mean_feature": sum((s.mean() - t.mean()) ** 2 for s, t in pairs)}


def test_a_users_loss_in_under_20_lines(tmp_path, register):
    assert len(inspect.getsource(MeanFeature).splitlines()) < 20
    register(MeanFeature)
    teacher = save_teacher(tiny_config(width=16), tmp_path)
    cfg = distiller_config(tiny_config(), teacher, ["MeanFeature"])
    cfg.merge_from_list(["MODEL.DISTILLER.MEAN_FEATURE.WEIGHT", "3.0"])
    model = build_model(cfg)
    with EventStorage(0):
        losses = model(tiny_batch())
    student, teacher = model.losses["MeanFeature"].seen
    expected = 3 * sum((student[p].mean() - teacher[p].mean()) ** 2 for p in ("p3", "p4"))
    assert expected > 0
    torch.testing.assert_close(losses["loss_mean_feature"], expected)


def test_a_users_loss_follows_its_schedule(tmp_path, register):
    register(MeanFeature)
    cfg = distiller_config(tiny_config(), save_teacher(tiny_config(), tmp_path), ["MeanFeature"])
    cfg.merge_from_list(["MODEL.DISTILLER.MEAN_FEATURE.START_ITER", "1"])
    model = build_model(cfg)
    with EventStorage(0):
        assert "loss_mean_feature" not in model(tiny_batch())  # without parameters nothing idles
    with EventStorage(1):
        assert "loss_mean_feature" in model(tiny_batch())
