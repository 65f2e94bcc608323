"""A golden fixture of GHND in another configuration, from the naive version; nothing of the package.

Five channels are sent; three images, no two of one size, and maps of odd sizes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from naive_ghnd import Network, ghnd, quantise, random_of
from torch import Tensor

Arrays = dict[str, np.ndarray]

CHANNELS = 5
X = (3, 64, 5, 3)
IMAGES = [(25, 64), (32, 50), (18, 33)]
PADDED = (32, 64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = 20000  # numbers; of a larger array only parts are stored
RECIPE = ("conv1.weight", "layer1.2.bn3.bias", "layer1.decoder.9.weight", "layer3.0.bn1.running_mean")
ADAM = ("conv1.weight", "layer1.encoder.7.weight", "layer1.decoder.0.weight", "layer1.decoder.0.bias")
# What is computed from nothing else, or is a rounding error.
INPUTS = ("large/x", "large/teacher", "large/w/", "full/img")
NOISE = ("decoder.3.bias", "decoder.8.bias")


def make_fixture(seed: int = 5) -> Arrays:
    """All arrays by name, those of the recorded one."""
    random = np.random.default_rng(seed)
    return {**_bottlenecks(random), **_quantisers(random), **_step(random)}


def is_input(name: str) -> bool:
    quantised = name.startswith("quant/") and name.endswith("/x")
    return quantised or name.startswith(INPUTS) or "/grad" in name and name.endswith(NOISE)


# Bottlenecks alone.


def _bottlenecks(random: np.random.Generator) -> Arrays:
    x, teacher = _maps(random, X), _maps(random, (X[0], 256, *X[2:]))
    numbers = random_of("input:layer1.teacher.64").standard_normal((X[0], 64, *X[2:]))
    small_teacher = _as_stored(numbers.clip(min=0))
    return {
        "large/x": _float(x),
        "large/teacher": _float(teacher),
        **_large(x.clone().requires_grad_(), teacher),
        **_evaluation(Network(), "small", x, 64),
        **_training(Network(), "small", x, small_teacher)[0],
    }


def _large(x: Tensor, teacher: Tensor) -> Arrays:
    network = Network(trained=["layer1."])
    arrays = {**_evaluation(network, "large", x, 256), **_sent(network, x)}
    training, sent = _training(network, "large", x, teacher)
    arrays.update({**training, "large/grad.x": _float(x.grad), "large/grad.z": _float(sent.grad)})
    for name, weight in network.weights.items():
        arrays[f"large/w/{name}"] = _float(weight)
        if weight.requires_grad:
            arrays.update(_parts(f"large/grad.{name.partition('.')[2]}", weight.grad))
    for name, buffer in network.buffers.items():
        arrays[f"large/after.{name.partition('.')[2]}"] = _float(buffer)
        arrays.setdefault(f"large/w/{name}", np.array(0))  # the numbers of batches
    return arrays


@torch.no_grad()
def _evaluation(network: Network, folder: str, x: Tensor, channels: int) -> Arrays:
    _, out = network.bottleneck(x, CHANNELS, channels, training=False)
    return {f"{folder}/eval.out": _float(out)}


@torch.no_grad()
def _sent(network: Network, x: Tensor) -> Arrays:
    """What is sent in evaluation, in 8 bits too, and what follows from these."""
    sent, _ = network.bottleneck(x, CHANNELS, 256, training=False)
    levels, scale, zero_point, arrived = quantise(sent.numpy())
    out = network.decode(torch.from_numpy(arrived), 256, training=False)
    found = {"tensor": levels, "scale": scale, "zero_point": zero_point}
    found.update(dequant=np.float32(arrived), out=_float(out))
    arrays = {f"large/q8.{name}": np.asarray(array) for name, array in found.items()}
    return {"large/eval.z": _float(sent), **arrays}


def _training(network: Network, folder: str, x: Tensor, teacher: Tensor) -> tuple[Arrays, Tensor]:
    """The arrays, and what is sent; afterwards there are gradients, if something is trained."""
    sent, out = network.bottleneck(x, CHANNELS, teacher.shape[1], training=True)
    (loss,) = ghnd([out], [teacher])
    if loss.requires_grad:
        loss.backward()
    found = {"z": _float(sent), "out": _float(out), "loss": _number(loss)}
    return {f"{folder}/train.{name}": array for name, array in found.items()}, sent


# The quantiser.


def _quantisers(random: np.random.Generator) -> Arrays:
    arrays = {}
    for kind, (low, high) in {"mixed": (-4, 9), "positive": (2, 5), "negative": (-7, -3)}.items():
        numbers = random.uniform(low, high, 31).astype(np.float32)
        found = (numbers, *quantise(numbers))
        for name, array in zip(("x", "q", "scale", "zero_point", "deq"), found):
            arrays[f"quant/{kind}/{name}"] = np.asarray(array)
    return arrays


# One step.


def _step(random: np.random.Generator) -> Arrays:
    images = [random.random((3, *size)).astype(np.float32) for size in IMAGES]
    x = torch.zeros(len(images), 3, *PADDED).double()
    for padded, image in zip(x, images):
        mean, std = (torch.tensor(numbers).double()[:, None, None] for numbers in (MEAN, STD))
        padded[:, : image.shape[1], : image.shape[2]] = (torch.from_numpy(image).double() - mean) / std
    ours, theirs = Network(trained=["conv1.", "layer1."]), Network()
    with torch.no_grad():
        teacher = theirs.backbone(x)
    student = ours.backbone(x, CHANNELS)
    terms = ghnd(student, teacher)
    sum(terms).backward()
    arrays = {f"full/img{index}": image for index, image in enumerate(images)}
    arrays.update({"full/x": _float(x), "full/loss": _number(sum(terms))})
    for layer, (term, *maps) in enumerate(zip(terms, teacher, student), start=1):
        arrays[f"full/loss/layer{layer}"] = _number(term)
        for role, level in zip(("teacher", "student"), maps):
            arrays.update(_parts(f"full/{role}/layer{layer}", level, 7, ("sum", "l2")))
    arrays.update({f"full/after/{name}": _float(buffer) for name, buffer in ours.buffers.items()})
    trained = {name: weight for name, weight in ours.weights.items() if weight.requires_grad}
    arrays["full/trainable"] = np.array(list(trained))
    for name, weight in trained.items():
        arrays.update(_parts(f"full/grad/{name}", weight.grad))
    arrays.update({f"full/adam1/{name}": _float(_after_adam(trained[name])) for name in ADAM})
    weights = {**theirs.weights, **ours.weights}
    return {**arrays, **{f"recipe/{name}": _float(weights[name].flatten()[:8]) for name in RECIPE}}


def _after_adam(weight: Tensor) -> Tensor:
    """Of the first step both means are the gradient's."""
    return weight - 1e-3 * weight.grad / ((weight.grad**2) ** 0.5 + 1e-8)


# What is stored.


def _parts(name: str, tensor: Tensor, stride: int = 97, sums: Iterable[str] = ("l2",)) -> Arrays:
    numbers = tensor.detach().flatten()
    if numbers.numel() <= LARGE:
        return {name: _float(tensor)}
    totals = {"sum": numbers.sum(), "l2": (numbers**2).sum() ** 0.5}
    return {
        f"{name}@stride{stride}": _float(numbers[::stride]),
        f"{name}@shape": np.array(tensor.shape),
        **{f"{name}@{kind}": _number(totals[kind]) for kind in sums},
    }


def _maps(random: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return _as_stored(random.standard_normal(shape).clip(min=0))


def _as_stored(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32)).double()


def _float(tensor: Tensor) -> np.ndarray:
    numbers = tensor.detach().numpy()
    return numbers.astype(np.float32) if numbers.dtype.kind == "f" else numbers


def _number(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
