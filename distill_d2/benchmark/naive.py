"""Plain formulas that a loss is compared with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F

from distill_d2 import DistillLoss

from .parts import Compute

# From a loss: the formula, and the parameters that it trains.
NaiveFormula = Callable[[DistillLoss], tuple[Compute, list[torch.Tensor]]]

# Where the tests keep the naive versions of losses.
ORACLES = Path(__file__).resolve().parents[2] / "tests" / "losses"


def of_pairs(formula: Callable) -> NaiveFormula:
    """The sum of ``formula(student's map, teacher's map)`` over the level pairs of a loss."""

    def naive(loss: DistillLoss) -> tuple[Compute, list[torch.Tensor]]:
        def compute(student, teacher, _batch):
            pairs = loss.pairs(student, teacher).values()
            return {"loss": torch.stack([formula(s, t) for s, t in pairs]).sum()}

        return compute, list(loss.parameters())

    return naive


def naive_pkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """PKD as its authors wrote it: standardize both maps (N, C, H, W), then half their MSE."""
    return F.mse_loss(standardize(student), standardize(teacher)) / 2


def standardize(feature: torch.Tensor) -> torch.Tensor:
    count, channels, height, width = feature.shape
    flat = feature.permute(1, 0, 2, 3).reshape(channels, -1)
    flat = (flat - flat.mean(dim=-1, keepdim=True)) / (flat.std(dim=-1, keepdim=True) + 1e-6)
    return flat.reshape(channels, count, height, width).permute(1, 0, 2, 3)


def naive_icd(loss: DistillLoss) -> tuple[Compute, list[torch.Tensor]]:
    """ICD by the tests' oracle: the same features and numbers of slots, random weights of its own."""
    oracle = load_oracle("naive_icd")
    settings = {name.upper(): value for name, value in vars(loss.settings).items()}
    settings["NUM_CLASSES"] = loss.queries.classes
    device = next(loss.parameters()).device
    weights = {n: w.to(device) for n, w in naive_icd_weights(oracle, settings).items()}
    naive = oracle.NaiveICD(weights, settings, settings, settings["REFERENCE_BUGS"])
    random = np.random.RandomState(0)
    plain: dict[str, torch.Tensor] = {}  # the memory layout of an unprepared teacher

    def compute(student, teacher, batch):
        teacher_maps = loss.pairs.of_teacher(teacher)
        if not plain and not loss.pairs.teacher_adapters:
            plain.update((name, level.contiguous()) for name, level in teacher_maps.items())
        teacher_maps = plain or teacher_maps
        sizes = [level.shape[-2:] for level in teacher_maps.values()]
        student_maps = loss.pairs.of_student(student, sizes)
        instances = [item["instances"] for item in batch.inputs]
        queries = oracle.draw_queries(
            random,
            [real.gt_boxes.tensor.cpu() for real in instances],
            [real.gt_classes.cpu() for real in instances],
            batch.image_sizes,
            settings,
            settings,
        )
        outputs = naive.forward(
            teacher_maps,
            student_maps,
            queries.to(device),
            batch.image_sizes,
            batch.padded_size,
            iteration=batch.iteration,
            max_iter=batch.max_iter,
        )
        return outputs["losses"]  # the rest would hold memory

    return compute, [*naive.weights.values(), *loss.pairs.parameters()]


def naive_icd_weights(oracle: ModuleType, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The oracle's random weights, with a soft attention, as the loss has at the start.

    The oracle's own is sharp, and one-hot on the large features of random networks: nearly all of it
    is denormal numbers then, with which a CPU takes five times as long, and no trained model has them.
    """
    weights = oracle.random_weights(
        torch.Generator().manual_seed(0),
        hidden_dim=settings["HIDDEN_DIM"],
        heads=settings["ATT_HEADS"],
        layers=settings["ATT_LAYERS"],
        classes=settings["NUM_CLASSES"],
        add_scale=settings["ADD_SCALE_INDICATOR"],
        reconst=settings["VALUE_RECONST"] > 0,
    )
    return {n: w * 0.1 if n.endswith("in_proj_weight") else w for n, w in weights.items()}


def load_oracle(name: str) -> ModuleType:
    """A module of the tests' naive versions, by its path: the tests are not a package."""
    path = ORACLES / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"--against-naive needs {path}, which is in a checkout of the repository"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_oracle(name: str) -> NaiveFormula:
    """The function ``formula`` of an oracle."""
    return lambda loss: load_oracle(name).formula(loss)


# By a loss's registered name.
NAIVE: dict[str, NaiveFormula] = {"PKD": of_pairs(naive_pkd)}
# Those that take longer than the loss itself.
SLOW_NAIVE: dict[str, NaiveFormula] = {
    "DeFeat": of_oracle("naive_defeat"),
    "GID": of_oracle("naive_gid"),
    "InstanceConditionalDistillation": naive_icd,
}
