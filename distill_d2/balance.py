"""How strongly distillation losses pull on the student beside its own losses: a table, advice, and the weights
that balance them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from .distiller import Distiller
from .distiller.phases import reaches_student
from .gradients import TermGradients, term_gradients
from .losses import DistillLoss, TrainedLoss

_WEAK, _STRONG = 0.1, 10.0  # in units of the task's gradient
#: Significant digits of a weight that is measured: machines that round differently agree on them.
_DIGITS = 4


def gradient_table(measured: TermGradients) -> str:
    """A table of the terms, with sums over the task and over each loss that has several."""
    rows: list[tuple] = [
        _row(name, t.value, t.gradient, measured) for name, t in _terms_of("", measured)
    ]
    rows.append(("all of the task", None, measured.task, None))
    counts = Counter(term.loss for term in measured.terms.values())
    for loss, gradient in measured.losses.items():
        rows += [_row(name, t.value, t.gradient, measured) for name, t in _terms_of(loss, measured)]
        if counts[loss] > 1:
            rows.append(_row(f"all of {loss}", None, gradient, measured))
    header = ["term", "value", "gradient", "of the task's"]
    title = (
        f"Terms of a step at iteration {measured.iteration}, and the norms of their gradients in the student's "
        "backbone and neck:"
    )
    return f"{title}\n{tabulate(rows, header, tablefmt='pipe', floatfmt='.3g')}"


def _terms_of(loss: str, measured: TermGradients) -> list[tuple[str, Any]]:
    return [(name, term) for name, term in measured.terms.items() if term.loss == loss]


def _row(name: str, value: float | None, gradient: float, measured: TermGradients) -> tuple:
    return name, value, gradient, gradient / measured.task if measured.task > 0 else None


def balanced_weight(
    name: str, loss: DistillLoss, measured: TermGradients, ratio: float = 1.0
) -> float | None:
    """The weight with which the gradient of a loss would be ``ratio`` times the task's, to two digits; None where
    one of the two gradients is 0 or not finite. Its key is that of ``loss.weight_setting``.

    Args:
        name: of the loss.
    """
    found, weight = measured.ratio(name), loss.applied_weight
    if not found or not math.isfinite(found) or not weight:
        return None
    return float(f"{weight * ratio / found:.2g}")


def weights_by_ratio(
    model: Distiller, names: Sequence[str], batches: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, float | None]:
    """The weights with which these losses, by name, pull on the student as their GRADIENT_RATIO says, where each
    one's schedule is at its strongest; None where a loss has no gradient there.

    Their weights in the config do not matter. Nothing is changed. See ``term_gradients``.

    Args:
        batches: each as a dataset mapper gives it.

    Raises:
        ValueError: the student's own losses have no gradient, or it is not finite.
    """
    losses = {name: model.losses[name] for name in names}
    before = {name: loss.applied_weight for name, loss in losses.items()}
    try:
        for loss in losses.values():
            loss.applied_weight = 1.0
        when = {name: _strongest(loss, model.max_iter) for name, loss in losses.items()}
        factors = {name: loss.factor(when[name]) for name, loss in losses.items()}
        measured = {i: term_gradients(model, *batches, iteration=i) for i in set(when.values())}
    finally:
        for name, loss in losses.items():
            loss.applied_weight = before[name]
    return {
        name: _weight(name, loss, measured[when[name]], factors[name]) for name, loss in losses.items()
    }


def _strongest(loss: DistillLoss, max_iter: int) -> int:
    """The first iteration at which a loss acts on the student as strongly as it ever does."""
    return max(
        range(max(max_iter, 1)), key=lambda i: loss.factor(i) if reaches_student(loss, i) else 0.0
    )


def _weight(name: str, loss: DistillLoss, measured: TermGradients, factor: float) -> float | None:
    """Where the weight 1 times the schedule's ``factor`` was measured."""
    task, gradient = measured.task, measured.losses[name]
    if not (math.isfinite(task) and math.isfinite(gradient)) or task == 0:
        raise ValueError(
            f"{loss.config_key('gradient_ratio')} is {loss.settings.gradient_ratio}, but in the student's trained "
            f"backbone and neck the gradient of its own losses is {task}, and that of {name} {gradient}; expected "
            "finite ones, the student's above 0. Give the loss's weight, and GRADIENT_RATIO 0.0"
        )
    if gradient == 0 or factor == 0:
        return None
    return float(f"{loss.settings.gradient_ratio * task / (gradient / factor):.{_DIGITS}g}")


def unbalanced(measured: TermGradients, losses: Mapping[str, DistillLoss]) -> Iterator[str]:
    """A message on each loss that is much too weak or too strong, and on terms that are too weak.

    Args:
        losses: of the Distiller, by name. Of those whose gradient is chosen by GRADIENT_RATIO nothing is said, nor
            of a TrainedLoss: what it teaches changes while it learns.
    """
    for name, loss in losses.items():
        found = measured.ratio(name)
        off = (
            not loss.applied_weight or loss.settings.gradient_ratio > 0 or isinstance(loss, TrainedLoss)
        )
        if off or found is None or not math.isfinite(found):
            continue
        if _WEAK <= found <= _STRONG:
            yield from _weak_terms(name, measured)
            continue
        pulls = (
            f"{name} pulls on the student's backbone with {_times(found)} times the gradient of the task"
        )
        effect = "it hardly teaches" if found < _WEAK else "the student may neglect its own losses"
        balanced = balanced_weight(name, loss, measured)
        key, ratio = loss.config_key(loss.weight_setting), loss.config_key("gradient_ratio")
        advice = "" if balanced is None else f". {key} {balanced:g}, or {ratio} 1, makes them equal"
        yield f"{pulls}: {effect}{advice}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _weak_terms(name: str, measured: TermGradients) -> Iterator[str]:
    weak = [
        f"{key} (times {measured.task / term.gradient:.2g} it is equal)"
        for key, term in _terms_of(name, measured)
        if 0 < term.gradient < _WEAK * measured.task
    ]
    if weak:
        yield (
            f"Terms of {name} with less than {_WEAK:g} of the task's gradient in the student's backbone, which "
            f"hardly teach: {', '.join(weak)}"
        )
