"""The names that public SSD checkpoints give to their tensors, and their order of classes."""

from __future__ import annotations

import re
from typing import Callable

import torch

Weights = dict[str, torch.Tensor]

# Of an inverted residual: module of the public one, and here. The first block has no expansion.
_FULL = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FIRST = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
# Modules of the checkpoints, and from their groups those here.
_RULES: tuple[tuple[str, Callable[..., str]], ...] = (
    # amdegroot/ssd.pytorch and what is derived from it; bare numbers: its VGG16 with reduced fc layers.
    (r"(?:vgg\.)?(\d+)", lambda i: f"backbone.features.{i}"),
    (r"extras\.(\d+)", lambda i: f"backbone.extras.{i}"),
    (r"L2Norm", lambda: "backbone.l2_norm"),
    (r"loc\.(\d)", lambda i: f"head.deltas.{i}"),
    (r"conf\.(\d)", lambda i: f"head.logits.{i}"),
    # qfgaohao/pytorch-ssd
    (r"base_net\.(0|18)\.([01])", lambda b, i: f"backbone.features.{b}.{i}"),
    (r"base_net\.1\.conv\.([0134])", lambda i: f"backbone.features.1.conv.{_FIRST[i]}"),
    (r"base_net\.(?!1\.)(\d+)\.conv\.([013467])", lambda b, i: f"backbone.features.{b}.conv.{_FULL[i]}"),
    (r"extras\.(\d)\.conv\.([013467])", lambda b, i: f"backbone.extras.{b}.conv.{_FULL[i]}"),
    (r"regression_headers\.(\d(?:\.[013])?)", lambda i: f"head.deltas.{i}"),
    (r"classification_headers\.(\d(?:\.[013])?)", lambda i: f"head.logits.{i}"),
)
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# What has no counterpart, and why.
DROPPED = {"adaptation": "a convolution for hints that its authors compute and do not use"}


def name_of(public: str) -> str | None:
    """The name here of a public checkpoint's tensor; None: unknown."""
    module, _, leaf = public.rpartition(".")
    for pattern, target in _RULES:
        found = re.fullmatch(pattern, module)
        if found and leaf in _LEAVES:
            return f"{target(*found.groups())}.{leaf}"
    return None


def from_public(weights: Weights) -> tuple[Weights, list[str], list[str]]:
    """A public checkpoint's tensors by their names here, the background last among the classes.

    Args:
        weights: without DataParallel's prefix.

    Returns:
        the tensors; names that were dropped (see DROPPED); names that are unknown.
    """
    converted: Weights = {}
    dropped, unknown = [], []
    # A class convolution has as many rows per prior box more than a box convolution as classes than 4.
    for public, tensor in weights.items():
        name = name_of(public)
        if name:
            converted[name] = tensor
        elif public.split(".")[0] in DROPPED:
            dropped.append(public)
        else:
            unknown.append(public)
    for name in [name for name in converted if _is_classifier(name, converted)]:
        classes = _classes(name, converted)
        rows = converted[name].unflatten(0, (-1, classes))
        converted[name] = rows.roll(-1, dims=1).flatten(0, 1)
    return converted, dropped, unknown


def _is_classifier(name: str, weights: Weights) -> bool:
    """Whether this is the last convolution of a class head."""
    return (
        name.startswith("head.logits.")
        and re.fullmatch(r"head\.logits\.\d(\.3)?\.(weight|bias)", name) is not None
    )


def _classes(name: str, weights: Weights) -> int:
    """Classes with background, from the rows of the class and the box convolution."""
    boxes = weights[name.replace("logits", "deltas")].shape[0] // 4
    return weights[name].shape[0] // boxes
