"""MODEL.DISTILLER.<LOSS>.GRADIENT_RATIO: weights that are measured when the training starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from ..balance import weights_by_ratio
from ..distiller import Distiller
from ..distiller.phases import reaches_student
from ..gradients import gradients_in, norm_of, trained_backbone
from ..losses import DistillLoss
from ..run_files import WEIGHT
from .gradient_examples import gradient_examples
from .settings import RunSettings

logger = logging.getLogger(__name__)

# A deviation of adapters' first weights far below PyTorch's default, and the iterations in which they grow.
_SMALL, _GROWTH = 0.01, 200


class GradientRatios:
    """Sets the weight of each loss that has a GRADIENT_RATIO.

    It is measured before the student's first step. With GRADIENT_RATIO_ITERS, or where adapters start almost at 0,
    it is measured again after 1, 2, 4, ... steps with the loss, up to that number; until then it is at most the
    config's. All processes measure the same images, and take the first one's numbers. The weights are part of a
    checkpoint; a resumed run measures none of them again.
    """

    def __init__(self, model: nn.Module, loader: Any, settings: RunSettings):
        """
        Args:
            model: not wrapped in DistributedDataParallel; without a Distiller nothing is done.
            loader: of the training.
        """
        self._model: Any = model
        self._loader = loader
        self._settings = settings
        losses = model.losses.items() if isinstance(model, Distiller) else ()
        self._losses: dict[str, DistillLoss] = {n: loss for n, loss in losses if _ratio_of(loss)}
        self._due = {name: _iterations(loss, settings.max_iter) for name, loss in self._losses.items()}

    def before(self, iteration: int) -> None:
        """Before a step; all processes call it together.

        Args:
            iteration: the student's.

        Raises:
            ValueError: a weight cannot be measured.
        """
        names = [name for name, due in self._due.items() if iteration in due]
        if not names:
            return
        with gradient_examples(self._loader, self._settings) as batches:
            if batches is None:
                loss = self._losses[names[0]]
                raise ValueError(
                    f"{_key(loss)} is {_ratio_of(loss)}, but the data loader is not one of distill_d2's, whose "
                    "images can be taken without a change of their order; expected detectron2's "
                    "L(build_detection_train_loader)(...) with a list of images, or GRADIENT_RATIO 0.0"
                )
            weights = comm.all_gather(weights_by_ratio(self._model, names, batches))[0]
        for name in names:
            self._set(name, weights[name], last=iteration == self._due[name][-1])

    def _set(self, name: str, weight: float | None, last: bool) -> None:
        loss = self._losses[name]
        if not last:
            given = getattr(loss.settings, loss.weight_setting)
            weight = given if weight is None else min(weight, given)
        if weight is None:
            raise ValueError(
                f"{_key(loss)} is {_ratio_of(loss)}, but the gradient of {name} in the student's backbone and "
                "neck is 0, with any weight. Expected a loss that reaches them; if it does so only after some "
                f"iterations, {loss.config_key('gradient_ratio_iters')} measures it then"
            )
        loss.applied_weight = weight
        if has_event_storage():
            get_event_storage().put_scalar(f"{WEIGHT}{name}", weight, smoothing_hint=False)
        logger.log(
            logging.INFO if last else logging.DEBUG,
            f"{loss.config_key(loss.weight_setting)} is {weight:g} now, by {_key(loss)} {_ratio_of(loss):g}",
        )

    def state_dict(self) -> dict[str, Any]:
        """Entries of the trainer's own state."""
        weights = {
            name: {"ratio": float(_ratio_of(loss)), "weight": float(loss.applied_weight)}
            for name, loss in self._losses.items()
        }
        return {"gradient_ratios": weights}

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError if the state is of other ratios; a weight may take the place of one."""
        saved = state_dict.get("gradient_ratios", {})
        for name, loss in self._losses.items():
            before = saved.get(name, {}).get("ratio", 0.0)
            if before != _ratio_of(loss):
                weight = f", with the weight {saved[name]['weight']:g}" if name in saved else ""
                raise ValueError(
                    f"--resume: {_key(loss)} is {_ratio_of(loss)}, but the checkpoint's run has {before}{weight}. "
                    f"It is measured at a training's start; use the checkpoint's, give "
                    f"{loss.config_key(loss.weight_setting)} and GRADIENT_RATIO 0.0, or start without --resume"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the weights of a state that ``check`` has passed."""
        for name, loss in self._losses.items():
            loss.applied_weight = state_dict["gradient_ratios"][name]["weight"]


def ratios_in_step(
    model: nn.Module,
    losses: Mapping[str, torch.Tensor],
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The gradient of each distillation loss in the student's backbone and neck, in units of the task's, in every
    GRADIENT_RATIO_PERIOD-th step: scalars by "grad_ratio/<loss>". The graph of the losses stays as it is.

    Args:
        model: not wrapped in DistributedDataParallel.
        losses: of its step, of this process's images.
        scale: multiplies a loss, such that its gradients do not vanish in float16.
    """
    if not isinstance(model, Distiller) or not _is_due(model):
        return {}
    parameters = trained_backbone(model)
    sums: dict[str, torch.Tensor] = {}
    for name, loss in losses.items():
        owner = model.owners.get(name, "")
        sums[owner] = sums[owner] + loss if owner in sums else loss
    norms = {owner: norm_of(gradients_in(scale(loss), parameters)) for owner, loss in sums.items()}
    task = norms.pop("")
    return {f"grad_ratio/{owner}": norm / task for owner, norm in norms.items()}


def _is_due(model: Distiller) -> bool:
    period = model.gradient_ratio_period
    return period > 0 and model.iteration >= 0 and model.iteration % period == 0


def _ratio_of(loss: DistillLoss) -> float:
    return loss.settings.gradient_ratio


def _key(loss: DistillLoss) -> str:
    return loss.config_key("gradient_ratio")


def _iterations(loss: DistillLoss, max_iter: int) -> list[int]:
    """Before which of the student's the weight is measured."""
    iters = loss.settings.gradient_ratio_iters
    if iters < 0:
        iters = _GROWTH if _has_small_adapters(loss) else 0
    if iters == 0:
        return [0]
    first = next((i for i in range(max_iter) if reaches_student(loss, i)), 0)
    powers = [2**k for k in range(math.ceil(math.log2(iters)))]
    return [*([0] if first else []), first, *(first + n for n in (*powers, iters))]


def _has_small_adapters(loss: DistillLoss) -> bool:
    return any(pairs.adapters and 0 < pairs.init_std < _SMALL for pairs in loss.feature_pairs())
