"""What all losses share: config node, schedule, idling, and building them by name."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill_d2 import DISTILL_LOSS_REGISTRY, DistillLoss, add_distill_config
from distill_d2.config import dump
from distill_d2.losses import FeaturePairs, LossSettings, build_losses, key, key_comments
from distill_d2.testing.tiny import distiller_config, save_teacher, tiny_batch, tiny_config


@dataclass(frozen=True)
class ScaledSettings(LossSettings):
    levels: Sequence[str] = key(("p3",), "Levels by name.")
    weight: float = key(2.0, "Twice as much.", at_least=0)
    tau: float = key(0.5, "Temperature.", above=0, at_most=4)
    side: int = key(3, "Of the kernel.", at_least=1, odd=True)
    mode: str = key("mean", "Over all cells.", choices=("mean", "sum"))
    plain: bool = True


class Scaled(DistillLoss):
    NODE = "SCALED"
    Settings = ScaledSettings


@dataclass(frozen=True)
class FinerSettings(ScaledSettings):
    extra: int = key(1, "In another node.", node="OTHER", at_least=1)
    root: int = key(7, "In no node.", node="")


class Finer(Scaled):
    NODE = "FINER"
    Settings = FinerSettings


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
        "GRADIENT_RATIO": 0.0,
        "GRADIENT_RATIO_ITERS": -1,
        "START_ITER": 0,
        "STOP_ITER": -1,
        "WARMUP_ITERS": 0,
        "LEVELS": ["p3"],
        "TAU": 0.5,
        "SIDE": 3,
        "MODE": "mean",
        "PLAIN": True,
    }


def test_from_config_passes_every_key_of_all_nodes():
    distiller = CfgNode()
    Finer.add_config(distiller)
    distiller.FINER.merge_from_list(["WEIGHT", 3.0, "START_ITER", 4, "STOP_ITER", 9, "WARMUP_ITERS", 2])
    distiller.merge_from_list(["FINER.LEVELS", ["p4", "p5"], "FINER.TAU", 0.1, "FINER.SIDE", 5])
    distiller.merge_from_list(["FINER.MODE", "sum", "FINER.PLAIN", False, "OTHER.EXTRA", 2, "ROOT", 8])
    distiller.FINER.merge_from_list(["GRADIENT_RATIO", 0.5, "GRADIENT_RATIO_ITERS", 7])
    schedule = {"weight": 3.0, "start_iter": 4, "stop_iter": 9, "warmup_iters": 2}
    own = {"levels": ["p4", "p5"], "tau": 0.1, "side": 5, "mode": "sum", "plain": False}
    found = vars(Finer.from_config(distiller).settings)
    ratio = {"gradient_ratio": 0.5, "gradient_ratio_iters": 7}
    assert found == {**schedule, **ratio, **own, "extra": 2, "root": 8}


WRONG = [
    ("weight", -0.1, "SCALED.WEIGHT is -0.1; expected a finite number, at least 0"),
    ("weight", math.nan, "SCALED.WEIGHT is nan; expected a finite number, at least 0"),
    ("weight", None, "SCALED.WEIGHT is None; expected a finite number, at least 0"),
    ("warmup_iters", -1, "SCALED.WARMUP_ITERS is -1; expected an integer, at least 0"),
    ("stop_iter", 0, "SCALED.STOP_ITER is 0; expected -1 or above START_ITER, which is 0"),
    ("start_iter", math.inf, "SCALED.START_ITER is inf; expected an integer, at least 0"),
    ("start_iter", -1, "SCALED.START_ITER is -1; expected an integer, at least 0"),
    ("stop_iter", -2, "SCALED.STOP_ITER is -2; expected an integer, at least -1"),
    ("plain", "yes", "SCALED.PLAIN is 'yes'; expected True or False"),
    ("levels", "p3", "SCALED.LEVELS is 'p3'; expected a list"),
    ("tau", 0.0, "SCALED.TAU is 0.0; expected a finite number, above 0 and at most 4"),
    ("tau", 4.1, "SCALED.TAU is 4.1; expected a finite number, above 0 and at most 4"),
    ("side", 2, "SCALED.SIDE is 2; expected an odd number, at least 1"),
    ("side", -1, "SCALED.SIDE is -1; expected an odd number, at least 1"),
    ("mode", "max", "SCALED.MODE is 'max'; expected one of ['mean', 'sum']"),
    ("extra", 0, "OTHER.EXTRA is 0; expected an integer, at least 1"),
    ("root", "x", "ROOT is 'x'; expected an integer"),
]


@pytest.mark.parametrize("name, value, message", WRONG)
def test_wrong_value_is_named_with_its_key(name, value, message):
    loss = Finer if name in ("extra", "root") else Scaled
    with pytest.raises(ValueError) as error:
        loss(**{name: value})
    assert str(error.value) == f"MODEL.DISTILLER.{message}"


@pytest.mark.parametrize("start", [3, 5])
def test_a_loss_stops_after_it_starts(start):
    with pytest.raises(ValueError, match=f"SCALED.STOP_ITER is 3; .* START_ITER, which is {start}"):
        Scaled(start_iter=start, stop_iter=3)
    assert Scaled(start_iter=2, stop_iter=3).settings.stop_iter == 3


def test_numbers_of_numpy():
    settings = Scaled(weight=np.float32(0.5), side=np.int64(5)).settings
    assert settings.weight == 0.5 and settings.side == 5


def test_a_loss_needs_a_node_of_its_own():
    with pytest.raises(ValueError, match="DistillLoss has no NODE, the name of its config node"):
        DistillLoss.add_config(CfgNode())
    distiller = CfgNode()
    Scaled.add_config(distiller)
    with pytest.raises(
        ValueError, match="Scaled adds the key MODEL.DISTILLER.SCALED.WEIGHT, which exists"
    ):
        Scaled.add_config(distiller)


def test_unknown_setting():
    with pytest.raises(TypeError, match=r"Scaled has no settings \['taus'\]; it has .*'tau'"):
        Scaled(taus=0.5)


def test_every_key_has_a_comment_that_a_dump_shows(register):
    register(Finer)
    comments = key_comments()
    assert comments["MODEL.DISTILLER.OTHER.EXTRA"] == "In another node."
    assert all(comments[name] for name in comments if name != "MODEL.DISTILLER.FINER.PLAIN")
    cfg = get_cfg()
    add_distill_config(cfg)
    text = dump(cfg)
    assert yaml.safe_load(text) == yaml.safe_load(cfg.dump())
    assert "\n      # Levels by name.\n      LEVELS:\n      - p3\n      # Over all cells.\n" in text


def test_every_registered_loss_is_built_from_its_defaults():
    names = [name for name, _ in DISTILL_LOSS_REGISTRY]
    losses = build_losses(node_of(*names))
    assert list(losses) == names and {"PKD", "FeatureMimic"} <= set(names)
    assert all(type(loss).__name__ == name for name, loss in losses.items())


def test_nodes_come_with_registration(register):
    register(Scaled)
    assert node_of().SCALED.TAU == 0.5


@pytest.mark.parametrize(
    "schedule, iterations, expected",
    [
        ({}, [0, 1, 10**6], [1.0, 1.0, 1.0]),
        ({"weight": 2.0, "start_iter": 3, "stop_iter": 6}, [2, 3, 5, 6], [0.0, 2.0, 2.0, 0.0]),
        ({"weight": 4.0, "start_iter": 5, "warmup_iters": 3}, range(4, 10), [0.0, 1, 2, 3, 4, 4]),
        ({"weight": 4.0, "stop_iter": 2, "warmup_iters": 3}, [0, 1, 2], [1.0, 2.0, 0.0]),
        ({"weight": 0.0, "warmup_iters": 3}, [0, 5], [0.0, 0.0]),
    ],
)
def test_schedule(schedule, iterations, expected):
    """Start and stop are sharp; warm-up is linear and starts above zero."""
    loss = DistillLoss(**schedule)
    assert [loss.factor(iteration) for iteration in iterations] == expected


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

    @dataclass(frozen=True)
    class Settings(LossSettings):
        in_features: Sequence[str] = key(("p3", "p4"), "Neck levels by name.")

    def __init__(self, **keys):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features)

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
