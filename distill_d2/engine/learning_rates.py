"""Learning rates and weight decays of a student's parameters that depend on where they are in its backbone."""

from __future__ import annotations

import fnmatch
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import ViT, get_vit_lr_decay_rate
from torch import nn


def rate_factors(model: nn.Module, solver: CfgNode) -> dict[str, float]:
    """What the learning rates of parameters are multiplied with, by name; 1 for those that are left out.

    SOLVER.BACKBONE_LR_FACTOR holds for the whole bottom-up network. SOLVER.LAYER_DECAY multiplies the rate of
    its layers once more, of the last one by LAYER_DECAY, of the one before by its square, and so on down to
    the stem, as in BEiT (arXiv:2106.08254) and ViTDet (arXiv:2203.16527).

    Args:
        model: the student.
        solver: the node SOLVER.

    Raises:
        ValueError: a factor other than 1 reaches no trained parameter.
    """
    factor, decay = solver.BACKBONE_LR_FACTOR, solver.LAYER_DECAY
    if factor == 1 and decay == 1:
        return {}
    path, network = _bottom_up(model)
    decays = _layer_decays(network, decay, path) if decay != 1 else {}
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    factors = {f"{path}.{name}": factor * decays.get(name, 1.0) for name in trained}
    if all(each == 1 for each in factors.values()):
        keys = {"BACKBONE_LR_FACTOR": factor, "LAYER_DECAY": decay}
        found = " and ".join(f"SOLVER.{key} is {value}" for key, value in keys.items() if value != 1)
        raise ValueError(
            f"{found}, but the student trains no parameter of '{path}'; expected 1.0, "
            "or fewer fixed layers (MODEL.BACKBONE.FREEZE_AT, MODEL.DISTILLER.FREEZE)"
        )
    return factors


def without_decay(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that timm's networks and detectron2's ViT name to have no weight decay, such as position
    embeddings."""
    found = []
    for network in model.modules():
        names = _names_without_decay(network)
        found += [
            parameter
            for name, parameter in network.named_parameters()
            if any(fnmatch.fnmatch(name, pattern) for pattern in names)
        ]
    return found


def _names_without_decay(network: Any) -> list[str]:
    if isinstance(network, ViT):
        return ["pos_embed", "*.rel_pos_[hw]"]
    return list(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else []


def _bottom_up(model: Any) -> tuple[str, nn.Module]:
    """The network below a detector's neck, with its name in the detector."""
    backbone = getattr(model, "backbone", None)
    for name in ("bottom_up", "net"):  # of an FPN, of detectron2's SimpleFeaturePyramid
        if isinstance(getattr(backbone, name, None), nn.Module):
            return f"backbone.{name}", getattr(backbone, name)
    return "backbone", backbone if isinstance(backbone, nn.Module) else nn.Module()


def _layer_decays(network: nn.Module, decay: float, path: str) -> dict[str, float]:
    """The factors of a bottom-up network's parameters, by their names in it."""
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, ViT):
            count = len(module.blocks)
            names = [each for each, _ in module.named_parameters()]
            return {
                prefix + each: get_vit_lr_decay_rate(f"backbone.{each}", decay, count) for each in names
            }
        if hasattr(module, "group_matcher"):
            layers = _timm_layers(module)
            count = max(layers.values()) + 1
            return {prefix + each: decay ** (count - layer) for each, layer in layers.items()}
    raise ValueError(
        f"SOLVER.LAYER_DECAY is {decay}, but the layers of '{path}', a {type(network).__name__}, are not known; "
        "expected 1.0, or a backbone of timm (MODEL.BACKBONE.NAME build_timm_fpn_backbone) or detectron2's "
        "ViT. SOLVER.BACKBONE_LR_FACTOR works with every backbone"
    )


def _timm_layers(network: Any) -> dict[str, int]:
    """The layer of each parameter of a timm model, from 0, by timm's own rules."""
    from timm.models import group_parameters  # an extra, which is there where its models are

    return group_parameters(network, network.group_matcher(coarse=False), reverse=True)
