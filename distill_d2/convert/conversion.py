"""Functions that the converters of public checkpoints share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..checkpoint import read_checkpoint, write_whole
from ..config import student_config
from ..engine import load_config

Weights = dict[str, torch.Tensor]

MOST_NAMES = 20  # in one line of a message
# Of checkpoints that hold a number of numpy beside the weights, such as the best score.
NUMPY_SCALARS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


class ConversionError(ValueError):
    """The input cannot be converted; the message says what was found and expected."""


def convert_detector(
    args: argparse.Namespace,
    author: str,
    convert: Callable[[Weights, CfgNode], tuple[Weights, list[str]]],
    finish: Callable[[Weights], Weights] = dict,
) -> tuple[Weights, list[str]]:
    """Convert INPUT and write the result, if it fits the detector of CONFIG.

    Args:
        args: of ``distill-d2 convert``.
        convert: from INPUT's weights and the config to the detector's weights and the dropped names.
        finish: applied to weights that fit, before they are written.

    Returns:
        the written weights, and the dropped names.

    Raises:
        ConversionError, KeyError, OSError, ValueError: nothing was written; the message says why.
    """
    cfg = student_config(load_config(args.config_file, args.opts))
    weights, dropped = convert(state_dict_of(read_checkpoint(args.input, stubs=NUMPY_SCALARS)), cfg)
    check_agreement(weights, cfg, args.config_file, partial=args.backbone)
    weights = finish(weights)
    write(args.output, weights, author)
    return weights, dropped


def print_result(
    args: argparse.Namespace,
    weights: Weights,
    dropped: Sequence[str],
    reasons: dict[str, str],
    note: str = "",
    use: str = "MODEL.WEIGHTS",
) -> None:
    """Say what was written and dropped, and how to use the result."""
    print(f"{len(weights)} tensors converted{note}")
    if dropped:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        print(f"  dropped {len(dropped)}: {listing(dropped, 5)} ({listed}; others by --backbone)")
    print(f"Wrote {args.output}. To use it: {use} {args.output}")


def check_paths(source: str, target: str) -> None:
    """Check OUTPUT before the work.

    Raises:
        ConversionError: the result could not, or must not, be written to ``target``.
    """
    folder = os.path.dirname(os.path.abspath(target))
    if not target.endswith(".pth"):
        raise ConversionError(f"OUTPUT is '{target}'; expected a name that ends with .pth")
    if os.path.realpath(source) == os.path.realpath(target):
        raise ConversionError(f"INPUT and OUTPUT are the same file, '{target}'; expected another OUTPUT")
    if not os.path.isdir(folder):
        raise ConversionError(f"the folder of OUTPUT, '{folder}', does not exist")
    if os.path.isdir(target):
        raise ConversionError(f"OUTPUT '{target}' is a folder; expected the name of a file")


def state_dict_of(entries: dict[str, Any]) -> Weights:
    """The weights of a checkpoint, under its entry "model" or bare; without DataParallel's prefix.

    Raises:
        ConversionError: it holds something else.
    """
    weights = entries.get("model", entries)
    if not isinstance(weights, dict) or not weights:
        raise ConversionError("INPUT's entry 'model' is not a state_dict; expected {name: tensor, ...}")
    others = [
        str(name)
        for name, value in weights.items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if others:
        raise ConversionError(
            "INPUT is not a state_dict and has no state_dict under 'model'; these of its entries are not "
            f"named tensors: {listing(others)}"
        )
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""
    return {name[len(prefix) :]: tensor.detach() for name, tensor in weights.items()}


def check_agreement(weights: Weights, cfg: CfgNode, config_file: str, *, partial: bool = False) -> None:
    """Compare with the model of the config, name by name.

    Args:
        partial: the weights may be some of the model's.

    Raises:
        ConversionError: they differ, or there is no model of that config; the message lists names.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = build_model(cfg)
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise ConversionError(f"the config '{config_file}' builds no model: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differences = {
        "missing": []
        if partial
        else [name for name in expected if name not in found and not _may_be_missing(name)],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {shape} instead of {expected[name]}"
            for name, shape in found.items()
            if expected.get(name, shape) != shape
        ],
    }
    if any(differences.values()):
        lines = [f"{len(v)} {what}: {listing(v)}" for what, v in differences.items() if v]
        raise ConversionError(
            f"the weights do not fit the detector of '{config_file}' (choose one with "
            "--config-file, or set its keys with KEY VALUE):\n  " + "\n  ".join(lines)
        )


def _may_be_missing(name: str) -> bool:
    # Constants of the config, and counters that only norms without a momentum use.
    return name in ("pixel_mean", "pixel_std") or name.endswith(".num_batches_tracked")


def write(path: str, weights: Weights, author: str) -> None:
    """Write the checkpoint, so that an older one is never lost."""
    # A plain dict: with torchvision's metadata, some versions of detectron2 would take the
    # frozen norms for ones of an old format and change their variances.
    entries = {"model": dict(weights), "__author__": author}
    write_whole(path, lambda file: torch.save(entries, file))


def listing(names: Sequence[str], most: int = MOST_NAMES) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
