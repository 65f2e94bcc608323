"""GHND from its description, in float64: a bottleneck, a ResNet-50 and their weights; nothing of the
package, nor of detectron2."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Layers = Sequence[Union[int, str]]

ENCODER = (64, "norm", 256, "norm", "relu", 64, "norm")  # numbers: 2x2 convolutions to so many channels
DECODER = ("norm", "relu", 64, "norm", 128, "norm", "relu")
BLOCKS = (3, 4, 6, 3)


def random_of(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode("utf-8")) & 0xFFFFFFFF)


def recipe(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a name, as float32 has it."""
    random, last = random_of(key), key.split(".")[-1]
    if last == "weight" and len(shape) == 4:
        numbers = random.standard_normal(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
    elif last == "weight":
        numbers = 0.5 + 0.5 * random.random_sample(shape)
    elif last == "running_var":
        numbers = 0.5 + random.random_sample(shape)
    else:
        assert last in ("bias", "running_mean"), key
        numbers = 0.1 * random.standard_normal(shape)
    return numbers.astype(np.float32)


class Network:
    """A ResNet-50 or a part of it; weights are made as they are first used, and stay.

    Attributes:
        weights: by torchvision's names. Those of ``trained`` layers are leaves.
        buffers: of the bottleneck, as its last run in training leaves them.
    """

    def __init__(self, trained: Sequence[str] = ()):
        self.weights: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._trained = tuple(trained)

    def weight(self, key: str, *shape: int) -> Tensor:
        if key not in self.weights:
            leaf = key.startswith(self._trained) and not key.split(".")[-1].startswith("running")
            self.weights[key] = torch.tensor(recipe(key, shape)).double().requires_grad_(leaf)
        return self.weights[key]

    def backbone(self, x: Tensor, channels: int = 0) -> list[Tensor]:
        """The outputs of the four layers; with ``channels``, the first is a bottleneck in training."""
        x = F.relu(self._frozen_norm(self._convolve(x, "conv1", 64, 7, 2), "bn1"))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        outputs = []
        for layer, blocks in enumerate(BLOCKS, start=1):
            if layer == 1 and channels:
                x = self.bottleneck(x, channels, 256, training=True)[1]
            else:
                for block in range(blocks):
                    stride = 2 if layer > 1 and block == 0 else 1
                    x = self._block(x, f"layer{layer}.{block}", 32 * 2**layer, stride, block == 0)
            outputs.append(x)
        return outputs

    def _block(self, x: Tensor, key: str, width: int, stride: int, projects: bool) -> Tensor:
        y = F.relu(self._frozen_norm(self._convolve(x, f"{key}.conv1", width, 1, 1), f"{key}.bn1"))
        y = F.relu(self._frozen_norm(self._convolve(y, f"{key}.conv2", width, 3, stride), f"{key}.bn2"))
        y = self._frozen_norm(self._convolve(y, f"{key}.conv3", 4 * width, 1, 1), f"{key}.bn3")
        if projects:
            x = self._convolve(x, f"{key}.downsample.0", 4 * width, 1, stride)
            x = self._frozen_norm(x, f"{key}.downsample.1")
        return F.relu(x + y)

    def _convolve(self, x: Tensor, key: str, width: int, side: int, stride: int) -> Tensor:
        weight = self.weight(f"{key}.weight", width, x.shape[1], side, side)
        return F.conv2d(x, weight, stride=stride, padding=side // 2)

    def bottleneck(
        self, x: Tensor, channels: int, out_channels: int, *, training: bool
    ) -> tuple[Tensor, Tensor]:
        """What is sent, and the output."""
        sent = self._run(x, "layer1.encoder", (*ENCODER, channels), 1, training)
        if training and sent.requires_grad:
            sent.retain_grad()
        return sent, self.decode(sent, out_channels, training=training)

    def decode(self, sent: Tensor, out_channels: int, *, training: bool) -> Tensor:
        last = (out_channels, "norm", out_channels, "norm", "relu")
        return self._run(sent, "layer1.decoder", (*DECODER, *last), 0, training)

    def _run(self, x: Tensor, key: str, layers: Layers, padding: int, training: bool) -> Tensor:
        for index, layer in enumerate(layers):
            if layer == "relu":
                x = F.relu(x)
            elif layer == "norm":
                x = self._norm(x, f"{key}.{index}", training)
            else:
                weight = self.weight(f"{key}.{index}.weight", layer, x.shape[1], 2, 2)
                x = F.conv2d(x, weight, padding=padding)
        return x

    def _frozen_norm(self, x: Tensor, key: str) -> Tensor:
        mean, variance = (self.weight(f"{key}.running_{what}", x.shape[1]) for what in ("mean", "var"))
        return self._normalised(x, key, mean, variance)

    def _norm(self, x: Tensor, key: str, training: bool) -> Tensor:
        if not training:
            return self._frozen_norm(x, key)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        count = x.numel() / x.shape[1]
        measured = {"mean": mean, "var": variance * count / (count - 1)}
        for what, value in measured.items():
            before = self.weight(f"{key}.running_{what}", x.shape[1])
            self.buffers[f"{key}.running_{what}"] = 0.9 * before + 0.1 * value.detach()
        self.buffers[f"{key}.num_batches_tracked"] = torch.tensor(1)
        return self._normalised(x, key, mean, variance)

    def _normalised(self, x: Tensor, key: str, mean: Tensor, variance: Tensor) -> Tensor:
        weight, bias = (self.weight(f"{key}.{name}", x.shape[1]) for name in ("weight", "bias"))
        scale = weight / (variance + 1e-5) ** 0.5
        return (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]


def ghnd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    """A term for each layer."""
    return [(ours - theirs).pow(2).sum() for ours, theirs in zip(student, teacher)]


def quantise(numbers: np.ndarray) -> tuple[np.ndarray, np.floating, int, np.ndarray]:
    """Levels, scale, zero point and what they mean, with the reference's bugs."""
    scale = (numbers.max() - numbers.min()) / numbers.dtype.type(255)
    zero_point = int(min(max(-numbers.min() / scale, 0), 255))
    levels = np.rint(np.clip(zero_point + numbers / scale, 0, 255))
    return levels.astype(np.uint8), scale, zero_point, scale * (levels - zero_point)
