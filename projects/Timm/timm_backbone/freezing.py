"""Exclude parts of a model of timm from training, by stride.

timm's models define their parts in the order in which they are run. What lies before a stage, or behind it, is
told by that order.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .requirement import import_timm


def freeze_until(body: nn.Module, stages: Mapping[int, str], stride: int) -> None:
    """Exclude from training what computes the stages up to a stride, and fix its batch norms, in place.

    Args:
        stages: the modules that end the stages, by stride, rising.
        stride: 2: what lies before the first stage of stride 4 or more, the stem.

    Raises:
        ValueError: a stage does not end with a module of its own, as in HRNet.
    """
    import_timm()
    from timm.utils.model import freeze

    names = [name for name, _ in body.named_modules()][1:]
    if stride == 2:
        first = next((module for each, module in stages.items() if each >= 4), names[0])
        last = names.index(_checked(first, names)) - 1
    else:
        inside = [module for each, module in stages.items() if each <= stride]
        last = _ends(names)[_checked(inside[-1], names)] if inside else -1
    for parameter in body.parameters(recurse=False):  # of no part, such as embeddings of positions
        parameter.requires_grad_(False)
    frozen = _whole(names, last)
    if frozen:
        freeze(body, frozen)


def freeze_unread(body: nn.Module, stage: str) -> None:
    """Exclude from training what lies behind the last stage, in place: no gradient reaches it.

    Args:
        stage: the module that ends the last stage; nothing is done where there is no such module.
    """
    names = [name for name, _ in body.named_modules()][1:]
    for name in names[_ends(names).get(stage, len(names)) + 1 :]:
        for parameter in body.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(False)


def _checked(stage: str, names: list[str]) -> str:
    if stage not in names:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT must be 0 for this model of timm (MODEL.TIMM.NAME): it has no "
            f"module '{stage}' that ends a stage"
        )
    return stage


def _ends(names: list[str]) -> dict[str, int]:
    """For each module, the position of the last one in it."""
    ends: dict[str, int] = {}
    for position, name in enumerate(names):
        while name:
            ends[name] = position
            name = name.rpartition(".")[0]
    return ends


def _whole(names: list[str], last: int) -> list[str]:
    """The outermost modules that end at position ``last`` or before it."""
    ends = _ends(names)
    whole = {name for name in names if ends[name] <= last}
    return [name for name in names if name in whole and name.rpartition(".")[0] not in whole]
