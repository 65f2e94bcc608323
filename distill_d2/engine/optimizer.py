"""The student's optimizer, and what all optimizers share: names, arguments and gradient clipping."""

from __future__ import annotations

import inspect
from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import reduce_param_groups
from torch import nn

from ..distiller import Distiller
from ..losses import DistillLoss, TrainedLoss
from .learning_rates import rate_factors, without_decay


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of torch.optim that SOLVER.OPTIMIZER names; "SGD" as detectron2 does.

    All take SOLVER's BASE_LR, WEIGHT_DECAY, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR and
    CLIP_GRADIENTS, SGD also MOMENTUM and NESTEROV, and further arguments from OPTIMIZER_ARGS.
    BACKBONE_LR_FACTOR and LAYER_DECAY multiply the rates of the backbone; what networks of timm name to have no
    weight decay, such as position embeddings, has none.
    Parameters of a Distiller's losses that have a solver of their own are left out.

    Raises:
        ValueError: see ``create_optimizer`` and ``rate_factors``.
    """
    return create_optimizer(
        cfg.SOLVER, _parameter_groups(cfg.SOLVER, trained_with_student(model)), "SOLVER"
    )


def _parameter_groups(solver: CfgNode, trained: nn.Module) -> list[dict[str, Any]]:
    """detectron2's groups of what is trained, with the factors and exceptions of its backbone."""
    factors = rate_factors(trained, solver)

    def factor_of(name: str) -> float:
        # Here, because detectron2's own BIAS_LR_FACTOR replaces the rate that the other factors give.
        of_bias = solver.BIAS_LR_FACTOR if name.endswith(".bias") else 1.0
        return factors.get(name, 1.0) * of_bias

    groups = get_default_optimizer_params(
        trained,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=1.0 if factors else solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor_of if factors else None,
    )
    exceptions = {id(parameter) for parameter in without_decay(trained)}
    if not exceptions:
        return groups
    single = [{**group, "params": [p]} for group in groups for p in group["params"]]
    for group in single:
        if id(group["params"][0]) in exceptions:
            group["weight_decay"] = 0.0
    return reduce_param_groups(single)


def create_optimizer(solver: CfgNode, params: list[dict[str, Any]], key: str) -> torch.optim.Optimizer:
    """The optimizer of a SOLVER node for these parameter groups, with its gradient clipping.

    Args:
        key: the node's name, for messages.

    Raises:
        ValueError: torch.optim has no such OPTIMIZER, or it takes no weight decay; it does not take
            OPTIMIZER_ARGS; CLIP_GRADIENTS.CLIP_TYPE is unknown.
    """
    kind = _optimizer_type(solver.OPTIMIZER, key)
    elsewhere = {"lr", "weight_decay"} & set(solver.OPTIMIZER_ARGS)
    if elsewhere:
        raise ValueError(
            f"{key}.OPTIMIZER_ARGS has {sorted(elsewhere)}; set {key}.BASE_LR and {key}.WEIGHT_DECAY instead"
        )
    arguments = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if kind is torch.optim.SGD:
        arguments.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True)
    arguments.update(solver.OPTIMIZER_ARGS)
    try:
        optimizer = kind(params, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{key}: torch.optim.{kind.__name__} cannot be made from BASE_LR, WEIGHT_DECAY and "
            f"OPTIMIZER_ARGS {dict(solver.OPTIMIZER_ARGS)}: {error}"
        ) from error
    _add_clipping(optimizer, solver.CLIP_GRADIENTS, f"{key}.CLIP_GRADIENTS")
    return optimizer


def optimizer_types() -> dict[str, type[torch.optim.Optimizer]]:
    """The classes of torch.optim by name. They take a weight decay, which excludes optimizers for sparse
    gradients and those that run the model themselves."""
    return {
        kind.__name__: kind
        for kind in vars(torch.optim).values()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and {"lr", "weight_decay"} <= set(inspect.signature(kind).parameters)
    }


def _optimizer_type(name: str, key: str) -> type[torch.optim.Optimizer]:
    """The class with this name, in any case."""
    kinds = optimizer_types()
    for known, kind in kinds.items():
        if known.lower() == name.lower():
            return kind
    raise ValueError(f"{key}.OPTIMIZER is '{name}'; expected one of {sorted(kinds)}")


def trained_with_student(model: nn.Module) -> nn.Module:
    """A module of all that the student's optimizer trains: the student, and losses without a solver.

    Parameters have the names that they have in the student, because the learning rates of a LazyConfig
    may depend on them (layers of a vision transformer); those of losses follow under "distiller.".
    """
    if not isinstance(model, Distiller):
        return model
    trained = nn.Module()
    for name, parameter in model.student.named_parameters(recurse=False):
        trained.register_parameter(name, parameter)
    for name, child in model.student.named_children():
        trained.add_module(name, child)
    losses = {name: loss for name, loss in model.losses.items() if not has_own_solver(loss)}
    trained.add_module("distiller", nn.ModuleDict(losses))
    return trained


def optimizer_signature(optimizer: torch.optim.Optimizer) -> str:
    """What must be equal for an optimizer to load the state of another: "Adam of 25 tensors"."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return f"{type(optimizer).__name__} of {count} tensors"


def has_own_solver(loss: DistillLoss) -> bool:
    """Whether the loss asks for a solver and has parameters to train."""
    asks = isinstance(loss, TrainedLoss) and loss.solver is not None
    return asks and any(p.requires_grad for p in loss.parameters())


def _add_clipping(optimizer: torch.optim.Optimizer, node: CfgNode, key: str) -> None:
    """Clip gradients before each step, according to a CLIP_GRADIENTS node.

    detectron2's own clipping fails on parameters without a gradient, such as frozen ones.
    """
    if not node.ENABLED:
        return
    if node.CLIP_TYPE not in CLIPPERS:
        raise ValueError(f"{key}.CLIP_TYPE is '{node.CLIP_TYPE}'; expected one of {list(CLIPPERS)}")
    clipper, limit, norm_type = CLIPPERS[node.CLIP_TYPE], node.CLIP_VALUE, node.NORM_TYPE

    def clip(optimizer: torch.optim.Optimizer, _args, _kwargs) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None]
        if parameters:
            clipper(parameters, limit, norm_type)

    optimizer.register_step_pre_hook(clip)


def _clip_each(parameters: list[nn.Parameter], limit: float, norm_type: float) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, limit, norm_type)


def _clip_values(parameters: list[nn.Parameter], limit: float, _norm_type: float) -> None:
    nn.utils.clip_grad_value_(parameters, limit)


CLIPPERS: dict[str, Callable] = {
    "full_model": nn.utils.clip_grad_norm_,
    "norm": _clip_each,
    "value": _clip_values,
}
