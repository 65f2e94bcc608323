"""Exclude parts of the student from training."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .views import DetectorView
from .views.probe import reached_parameters

logger = logging.getLogger(__name__)


def compile_patterns(patterns: Iterable[str], key: str) -> list[re.Pattern[str]]:
    """Compile regular expressions.

    Args:
        key: the config key that holds them, for messages.

    Raises:
        ValueError: one is not valid.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{key}: '{pattern}' is not a valid regular expression: {error}") from error
    return compiled


def matching_names(names: Sequence[str], patterns: Iterable[str], key: str) -> list[str]:
    """Those of ``names`` that contain a match of some pattern.

    Args:
        key: the config key that holds the patterns, for messages.

    Raises:
        ValueError: a pattern is not valid, or matches no name.
    """
    compiled = compile_patterns(patterns, key)
    for pattern in compiled:
        if not any(pattern.search(name) for name in names):
            examples = list(names[:: max(len(names) // 5, 1)])
            raise ValueError(
                f"{key}: '{pattern.pattern}' matches no name; names are, for example, {examples}"
            )
    return [name for name in names if any(pattern.search(name) for pattern in compiled)]


def freeze(model: nn.Module, patterns: Sequence[str], key: str) -> list[nn.Module]:
    """Exclude parameters from training by name, in place.

    Args:
        patterns: regular expressions of names in ``model.state_dict()``.
        key: the config key, for messages.

    Returns:
        the batch norms whose running statistics match: they must stay in eval mode.

    Raises:
        ValueError: a pattern is not valid, or matches no name.
    """
    names = set(matching_names(list(model.state_dict()), patterns, key))
    parameters = dict(model.named_parameters())
    frozen = [name for name in parameters if name in names]
    for name in frozen:
        parameters[name].requires_grad_(False)
    if patterns:
        logger.info(f"{key}: {len(frozen)} parameters are not trained: {summary(frozen)}")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" in names
    ]


def freeze_unreached(view: DetectorView) -> None:
    """Exclude parameters from training that no gradient of the losses reaches, in place.

    Without a gradient such a parameter would stop DDP; with a gradient of zero, weight decay would
    change it.

    Args:
        view: of the student, bound to losses that read its backbone only.
    """
    reached = reached_parameters(view)
    unreached = {
        name: parameter
        for name, parameter in view.model.named_parameters()
        if parameter.requires_grad and parameter not in reached
    }
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    if unreached:
        logger.info(
            f"MODEL.DISTILLER.TASK_LOSS_WEIGHT is 0: {len(unreached)} parameters that no loss reaches are "
            f"not trained: {summary(unreached)}"
        )


def summary(names: Iterable[str], depth: int = 3) -> str:
    """Names counted by their first parts: "backbone.bottom_up.res3 (39), ..."."""
    counts: dict[str, int] = {}
    for name in names:
        group = ".".join(name.split(".")[:-1][:depth])
        counts[group] = counts.get(group, 0) + 1
    return ", ".join(f"{group} ({count})" for group, count in counts.items()) or "none"
