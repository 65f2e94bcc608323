"""How strongly distillation losses pull on the student beside its own losses, in words, and the weights that would
balance them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from .gradients import TermGradients
from .losses import DistillLoss, TrainedLoss

_WEAK, _STRONG = 0.02, 10.0  # in units of the task's gradient


def describe_gradients(measured: TermGradients) -> str:
    """One line: the gradients of the task and of each loss, with their ratio and its terms."""
    parts = [f"task {measured.task:.3g}"]
    for name, gradient in measured.losses.items():
        ratio = measured.ratio(name)
        text = f"{name} {gradient:.3g}" + ("" if ratio is None else f" ({_times(ratio)} of the task's)")
        terms = [f"{key} {t.gradient:.3g}" for key, t in measured.terms.items() if t.loss == name]
        parts.append(f"{text}: {', '.join(terms)}" if len(terms) > 1 else text)
    return f"Gradients in the student's backbone and neck: {'; '.join(parts)}"


def balanced_weight(
    name: str, loss: DistillLoss, measured: TermGradients, ratio: float = 1.0
) -> float | None:
    """The weight with which the gradient of a loss would be ``ratio`` times the task's, to two digits; None where
    one of the two gradients is 0 or not finite. Its key is that of ``loss.weight_setting``.

    Args:
        name: of the loss.
    """
    found, weight = measured.ratio(name), getattr(loss.settings, loss.weight_setting)
    if not found or not math.isfinite(found) or not weight:
        return None
    return float(f"{weight * ratio / found:.2g}")


def unbalanced(measured: TermGradients, losses: Mapping[str, DistillLoss]) -> Iterator[str]:
    """A message on each loss that is much too weak or too strong, and on terms that are too weak.

    Args:
        losses: of the Distiller, by name. What a TrainedLoss teaches changes while it learns, so nothing is said.
    """
    for name, loss in losses.items():
        found = measured.ratio(name)
        off = not getattr(loss.settings, loss.weight_setting)
        if off or found is None or not math.isfinite(found) or isinstance(loss, TrainedLoss):
            continue
        if _WEAK <= found <= _STRONG:
            yield from _weak_terms(name, measured)
            continue
        pulls = (
            f"{name} pulls on the student's backbone with {_times(found)} times the gradient of the task"
        )
        effect = "it hardly teaches" if found < _WEAK else "the student may neglect its own losses"
        balanced = balanced_weight(name, loss, measured)
        key = loss.config_key(loss.weight_setting)
        advice = "" if balanced is None else f". {key} {balanced:g} would make them equal"
        yield f"{pulls}: {effect}{advice}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _weak_terms(name: str, measured: TermGradients) -> Iterator[str]:
    weak = [
        key
        for key, term in measured.terms.items()
        if term.loss == name and 0 < term.gradient < _WEAK * measured.task
    ]
    if weak:
        yield (
            f"Terms of {name} with less than {_WEAK:.0%} of the task's gradient in the student's backbone, which "
            f"hardly teach: {', '.join(weak)}"
        )
