"""What is known about a loss that is not finite: weights that hold NaN, and the operation that made it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Callable

import torch
from torch import nn

from ..checkpoint.integrity import is_finite
from ..distiller import Distiller


def describe_weights(model: nn.Module) -> str:
    """A sentence on the weights of student and teacher that are not finite; "" if all are."""
    bad = {
        who: [name for name, tensor in part.state_dict().items() if not is_finite(tensor)]
        for who, part in _parts(model).items()
    }
    return "".join(
        f" {len(names)} tensors of the {who} hold NaN or infinity: {', '.join(names[:5])}."
        for who, names in bad.items()
        if names
    )


def rerun(model: nn.Module, compute: Callable[[], dict[str, torch.Tensor]]) -> str:
    """Repeat a step without an update, and name the operation whose output is the first that is not finite.

    Args:
        model: the detector, or the Distiller, without DistributedDataParallel.
        compute: the forward pass, with the batch and the random numbers of the step.
    """
    first: list[str] = []
    with _watching(model, first), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True):
            losses = compute()
            bad = [name for name, loss in losses.items() if not is_finite(loss)]
            problem = _backward(losses)
    module = f"the first module with an output that is not finite is {first[0]}" if first else ""
    loss = f"the losses {bad} are not finite" if bad else "all losses are finite this time"
    # torch warns with the traceback of the operation's forward call.
    calls = [
        str(warning.message) for warning in caught if "Traceback of forward call" in str(warning.message)
    ]
    where = f"\n{calls[-1].strip()}" if calls else ""
    return (
        "\n--detect-anomaly: this batch again, with the weights and random numbers of the step, but with moving "
        "averages (batch norm statistics in evaluation, the loss normalizer of RetinaNet and FCOS) that have seen "
        f"it once: {'; '.join(text for text in (loss, module, problem) if text)}{where}"
    )


def _backward(losses: dict[str, torch.Tensor]) -> str:
    try:
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    except RuntimeError as error:
        return f"backward: {error}"
    return "backward found no operation that returns NaN."


@contextlib.contextmanager
def _watching(model: nn.Module, first: list[str]) -> Iterator[None]:
    """Inside, the name of the first module with an output that is not finite is added to ``first``."""

    def watch(name: str, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not first and not all(is_finite(tensor) for tensor in _tensors(output)):
                first.append(f"{name} ({type(module).__name__})")

        return module.register_forward_hook(look)

    handles = [
        watch(f"{who}.{name}" if name else who, module)
        for who, part in _parts(model).items()
        for name, module in part.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, Distiller):
        return {"student": model}
    return {"teacher": model.teacher.model, "student": model.student, "losses": model.losses}


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
