"""Fixtures of GHND: a bottleneck alone, the 8-bit quantizer, and one step of training on a ResNet-50.

Names of tensors are torchvision's; weights that a fixture does not store follow from them by
``_by_recipe``. Of a large array there are every n-th number ("<name>@stride97"), sum, norm and shape
("@sum", "@l2", "@shape"). The networks run in float64, as they did for the fixture: among the many ReLUs
some input, close to 0, often has the other sign in float32, and gradients differ by a hundredth.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Callable

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from distill_d2 import Distiller, Teacher, add_distill_config
from distill_d2.config import load_yaml
from distill_d2.engine.optimizer import build_optimizer
from distill_d2.losses.base import build_losses
from distill_d2.losses.ghnd import GHND
from distill_d2.model_zoo import get_config_file
from distill_d2.projects.ghnd import BottleneckStage
from distill_d2.projects.ghnd.quantizer import quantize
from distill_d2.taps import Taps
from distill_d2.testing import compare, intercepted, step
from distill_d2.views import Batch, DetectorView

from . import Comparison, Fixture, FixtureError, golden_kind

Tensors = dict[str, torch.Tensor]

_CONFIG = "Distillation-GHND/Base-GHND.yaml"
_STAGES = ("res2", "res3", "res4", "res5")
_PRECISION = 1e-4  # of an array's largest number
_EXACT = {"rtol": 0, "atol": 0}
# The next norm removes what they add: their gradients are rounding errors.
_WITHOUT_GRADIENT = ("decoder.3.bias", "decoder.8.bias")


@golden_kind(
    holds=["recipe/*", "large/eval.z", "small/train.z", "quant/*/q", "full/img*"], rtol=0, atol=0
)
def ghnd(fixture: Fixture) -> None:
    _compare_large(fixture)
    _compare_small(fixture)
    for name in fixture.names("quant/*/x"):
        _compare_quantizer(fixture, name.rpartition("/")[0])
    _compare_step(fixture)


# A bottleneck alone.


def _compare_large(fixture: Fixture) -> None:
    stage = _stage(fixture, "large")
    weights = {name: fixture.tensor(f"large/w/layer1.{name}") for name in stage.state_dict()}
    stage.load_state_dict(weights)
    x, teacher = fixture.tensor("large/x").double().requires_grad_(), fixture.tensor("large/teacher")
    _compare_sent(fixture, stage, x)
    sent = _compare_stage(fixture, "large", stage, x, teacher)
    for name, leaf in {"x": x, "z": sent, **dict(stage.named_parameters())}.items():
        if name not in _WITHOUT_GRADIENT:
            _compare(fixture, f"large/grad.{name}", leaf.grad)
    for name, buffer in stage.named_buffers():
        _compare(fixture, f"large/after.{name}", buffer)


def _compare_small(fixture: Fixture) -> None:
    stage, shape = _stage(fixture, "small"), fixture["small/eval.out"].shape
    _fill(stage, lambda name: f"layer1.{name}")
    numbers = _random(f"input:layer1.teacher.{shape[1]}").standard_normal(shape)
    teacher = torch.from_numpy(numbers).float().relu()
    _compare_stage(fixture, "small", stage, fixture.tensor("large/x").double(), teacher)


def _stage(fixture: Fixture, folder: str) -> BottleneckStage:
    arrays = ("large/x", f"{folder}/eval.out", f"{folder}/train.z")
    return BottleneckStage(*(fixture[name].shape[1] for name in arrays)).double()


def _compare_stage(
    fixture: Fixture, folder: str, stage: BottleneckStage, x: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    """Returns what is sent in training; afterwards there are gradients."""
    with torch.no_grad():
        _compare(fixture, f"{folder}/eval.out", stage.eval()(x))
    taps = Taps(stage)
    taps.add("encoder")
    taps.start()
    out = stage.train()(x)
    sent = taps.output("encoder")
    sent.retain_grad()
    maps = {"res2": out}, {"res2": teacher}
    loss = compare(GHND(in_features=["res2"]), *maps, strides={"res2": 4})["loss_ghnd_res2"]
    loss.backward()
    for name, tensor in {"z": sent, "out": out, "loss": loss}.items():
        _compare(fixture, f"{folder}/train.{name}", tensor)
    return sent


# The quantizer of the reference, with its bugs.


def _compare_quantizer(fixture: Fixture, folder: str) -> None:
    found = quantize(fixture.tensor(f"{folder}/x"), reference_bugs=True)
    fixture.compare(f"{folder}/q", found.values, **_EXACT)
    fixture.compare(f"{folder}/zero_point", found.zero_point.squeeze(), **_EXACT)
    _compare(fixture, f"{folder}/scale", found.scale.squeeze())
    _compare(fixture, f"{folder}/deq", found.dequantize())


@torch.no_grad()
def _compare_sent(fixture: Fixture, stage: BottleneckStage, x: torch.Tensor) -> None:
    """What is sent in evaluation. Rounding errors may bring a number that is half-way between two levels
    to the other one; what follows in 8 bits is computed from the fixture's levels."""
    sent = stage.eval().encoder(x)
    _compare(fixture, "large/eval.z", sent)
    found = quantize(sent, reference_bugs=True)
    fixture.compare("large/q8.tensor", found.values, rtol=0, atol=1)
    fixture.compare("large/q8.zero_point", found.zero_point.squeeze(), **_EXACT)
    _compare(fixture, "large/q8.scale", found.scale.squeeze())
    arrived = found._replace(values=fixture.tensor("large/q8.tensor")).dequantize()
    _compare(fixture, "large/q8.dequant", arrived)
    _compare(fixture, "large/q8.out", stage.decoder(arrived.double()))


# One step of the whole backbone, by the Distiller.


def _compare_step(fixture: Fixture) -> None:
    run = _Step(fixture)
    for name, tensor in _of_folder(fixture, "recipe", run.weights):
        _compare(fixture, name, tensor.flatten()[: fixture[name].size])
    losses = run.run()
    _compare(fixture, "full/x", run.padded)
    _compare(fixture, "full/loss", sum(losses.values()))
    for stage in _STAGES:
        layer = _torchvision_name(stage)
        _compare(fixture, f"full/loss/{layer}", losses[f"loss_ghnd_{stage}"])
        for role, maps in run.maps.items():
            _compare(fixture, f"full/{role}/{layer}", maps[stage])
    _compare_gradients(fixture, run.parameters)
    for name, buffer in run.stage.named_buffers():
        _compare(fixture, f"full/after/layer1.{name}", buffer)
    build_optimizer(run.cfg, run.distiller).step()
    for name, parameter in _of_folder(fixture, "full/adam1", run.parameters):
        fixture.compare(name, parameter, rtol=0, atol=1e-6)


def _compare_gradients(fixture: Fixture, parameters: Tensors) -> None:
    """Those of the trained parameters; there are no others."""
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    _compare_names(fixture, "full/trainable", set(fixture["full/trainable"].tolist()), trained)
    stored = [name[len("full/grad/") :].partition("@")[0] for name in fixture.names("full/grad/*")]
    found = [name for name, parameter in parameters.items() if parameter.grad is not None]
    stored, found = (
        {name for name in names if not name.endswith(_WITHOUT_GRADIENT)} for names in (stored, found)
    )
    _compare_names(fixture, "full/grad", stored, found)
    for name in sorted(stored & found):
        _compare(fixture, f"full/grad/{name}", parameters[name].grad)


class _Step:
    """Teacher and student of a fixture in a Distiller, by the config of GHND's own experiments, but for
    detectors without a box head, which GHND does not need.

    Attributes:
        weights: of both, before the step.
        parameters: of the student.
        maps: what the loss reads, the outputs of _STAGES by role.
        padded: the batch that the student's backbone gets.
    """

    def __init__(self, fixture: Fixture):
        count = len(fixture.names("full/img*"))
        self.batch = [{"image": fixture.tensor(f"full/img{index}")} for index in range(count)]
        self.cfg = _config(channels=len(fixture["full/grad/layer1.decoder.0.weight"]))
        plain = self.cfg.clone()
        plain.MODEL.BACKBONE.NAME = self.cfg.MODEL.BOTTLENECK.BACKBONE
        self.student, teacher = build_model(self.cfg), build_model(plain)
        self.parameters = {_torchvision_name(n): p for n, p in self.student.named_parameters()}
        self.weights = _fill(teacher.backbone.bottom_up, _torchvision_name)
        self.distiller = self._distiller(teacher)
        self.distiller.preload_student()
        self.weights.update(_fill(self.stage, lambda name: f"layer1.{name}"))
        self.distiller.double()
        self.student.backbone.register_forward_pre_hook(self._remember)

    def _distiller(self, teacher: nn.Module) -> Distiller:
        node = self.cfg.MODEL.DISTILLER
        return Distiller(
            student=self.student,
            teacher=Teacher(teacher, input_format="RGB", prepare=node.TEACHER_PREPARE),
            losses=build_losses(node),
            input_format="RGB",
            task_loss_weight=node.TASK_LOSS_WEIGHT,
            preload_names=node.PRELOAD_NAMES,
            freeze_names=node.FREEZE,
        )

    @property
    def stage(self) -> BottleneckStage:
        return self.student.backbone.bottom_up.res2

    def _remember(self, _backbone: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.padded = inputs[0]

    def run(self) -> Tensors:
        """Forward and backward; the terms."""
        (loss,) = self.distiller.losses.values()
        with intercepted(loss, self._note):
            return step(self.distiller.train(), self.batch)

    def _note(
        self, forward: Callable, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> Tensors:
        views = {"student": student, "teacher": teacher}
        self.maps = {role: {n: view.level(n) for n in _STAGES} for role, view in views.items()}
        return forward(student, teacher, batch)


def _config(channels: int) -> CfgNode:
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    cfg.MODEL.BOTTLENECK.CHANNELS = channels
    return cfg


def _torchvision_name(name: str) -> str:
    """Of "res2", "res2.0.conv1.norm.bias" or "backbone.bottom_up.res2.0.conv1.norm.bias", for example,
    "layer1" or "layer1.0.bn1.bias"."""
    name = re.sub(r"^(backbone\.bottom_up\.)?(stem\.)?", "", name)
    name = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


# The weights.


def _fill(network: nn.Module, key_of: Callable[[str], str]) -> Tensors:
    """Fill parameters and buffers by their torchvision names; they, by these names."""
    tensors = {key_of(name): tensor for name, tensor in network.state_dict().items()}
    for key, tensor in tensors.items():
        tensor.copy_(torch.as_tensor(_by_recipe(key, tuple(tensor.shape))).float())
    return tensors


def _by_recipe(key: str, shape: tuple[int, ...]) -> np.ndarray:
    random = _random(key)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if key.endswith("running_var"):
        return 0.5 + random.random_sample(shape)
    if len(shape) == 4:
        return random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    if key.endswith("weight"):
        return 0.5 + 0.5 * random.random_sample(shape)
    return 0.1 * random.standard_normal(shape)  # biases and running means


def _random(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()))


# Comparisons.


def _compare(fixture: Fixture, name: str, actual: torch.Tensor) -> None:
    """The array ``name``, or what is stored of a large one."""
    found = {name: actual}
    if name not in fixture.arrays:
        parts = fixture.names(f"{name}@*")
        found = {part: _part(actual, part.rpartition("@")[2]) for part in parts} or found
    for part, numbers in found.items():
        fixture.compare(part, numbers, rtol=0, atol=_PRECISION * np.abs(fixture[part]).max())


def _part(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    numbers = tensor.detach().double().flatten()
    if re.fullmatch(r"stride\d+", kind):
        return numbers[:: int(kind[len("stride") :])]
    if kind not in ("shape", "sum", "l2"):
        raise FixtureError(f"has arrays '@{kind}'; known are @stride<n>, @sum, @l2 and @shape")
    return {"shape": torch.tensor(tensor.shape), "sum": numbers.sum(), "l2": numbers.norm()}[kind]


def _compare_names(fixture: Fixture, name: str, stored: set[str], found: set[str]) -> None:
    """As numbers: 1 for each name that is stored, or found, and 0 for one that only the other has."""
    names = sorted(stored | found)
    numbers = (np.array([float(n in group) for n in names]) for group in (stored, found))
    fixture.comparisons.append(Comparison(name, *numbers, **_EXACT))


def _of_folder(fixture: Fixture, folder: str, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The arrays "folder/<name>", and of the tensors that of this name."""
    for array in fixture.names(f"{folder}/*"):
        name = array[len(folder) + 1 :]
        if name not in tensors:
            raise FixtureError(f"has an array '{array}', but there is no tensor '{name}'")
        yield array, tensors[name]
