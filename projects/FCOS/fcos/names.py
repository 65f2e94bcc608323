"""The names that FCOS' tensors have elsewhere: in public checkpoints, and in detectron2's own FCOS."""

from __future__ import annotations

import re
from typing import Callable

import torch

Weights = dict[str, torch.Tensor]

HEAD = "proposal_generator.fcos_head"
_BODY = "backbone.bottom_up"
#: Tensors of checkpoints that models do not have, by the beginning of their names, and why.
DROPPED = {
    "pixel_": "constants of the config",
    "fc.": "the classifier of ImageNet",
    f"{_BODY}.fc.": "the classifier of ImageNet",
}
# Applied one after the other. Up to the head: of the FCOS that preceded detectron2, whose levels of the
# pyramid count from 1 for stride 4.
_RULES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"^backbone\.body\.", f"{_BODY}."),
    (rf"^({re.escape(_BODY)})\.layer(\d)\.", lambda m: f"{m[1]}.res{int(m[2]) + 1}."),
    (rf"^({re.escape(_BODY)}\..*)\bbn(\d)\.", r"\1conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^backbone\.fpn\.", "backbone."),
    (r"\bfpn_inner(\d)\.", lambda m: f"fpn_lateral{int(m[1]) + 1}."),
    (r"\bfpn_layer(\d)\.", lambda m: f"fpn_output{int(m[1]) + 1}."),
    (r"\.top_blocks\.", ".top_block."),
    (r"^rpn\.", "proposal_generator."),
    (r"^proposal_generator\.head\.", f"{HEAD}."),
    (r"\.centerness\.", ".ctrness."),
    # DLA's weights of ImageNet.
    (r"^(base_layer|level\d)\.", rf"{_BODY}.\1."),
)
_TO_DETECTRON2 = {"cls_tower": "cls_subnet", "bbox_tower": "bbox_subnet", "cls_logits": "cls_score"}
_FROM_DETECTRON2 = {new: old for old, new in _TO_DETECTRON2.items()}
_SCALES = 1e-6  # differences between them that do not count


def from_public(weights: Weights) -> tuple[Weights, list[str]]:
    """A public checkpoint's tensors by their names here, and the names that were dropped (see DROPPED).

    Those of AdelaiDet's FCOS and CondInst have these names already, but for what changed over the years.
    """
    converted = {_name(public): tensor for public, tensor in weights.items()}
    dropped = [name for name in converted if name.startswith(tuple(DROPPED))]
    for name in dropped:
        del converted[name]
    if "mask_head.sizes_of_interest" in converted:  # checkpoints of 2020 have no counter of iterations
        converted.setdefault("mask_head._iter", torch.zeros(1))
    return converted, dropped


def to_detectron2(weights: Weights) -> Weights:
    """The tensors of this FCOS under the names of detectron2's own, which has no scales per level.

    Raises:
        ValueError: detectron2's FCOS has no such head; the message says what differs.
    """
    prefix = f"{HEAD}."
    head = {name[len(prefix) :]: t for name, t in weights.items() if name.startswith(prefix)}
    scales = [float(t) for name, t in head.items() if name.startswith("scales.")] or [1.0]
    _check_head(head, scales)
    converted = {name: t for name, t in weights.items() if not name.startswith(prefix)}
    for name, tensor in head.items():
        part, _, rest = name.partition(".")
        if part != "scales":
            factor = scales[0] if part == "bbox_pred" else 1.0
            converted[f"head.{_TO_DETECTRON2.get(part, part)}.{rest}"] = tensor * factor
    return converted


def is_detectron2s(weights: Weights) -> bool:
    """Whether these are of detectron2's own FCOS; its RetinaNet has no centerness."""
    return "head.ctrness.weight" in weights


def from_detectron2(weights: Weights, num_scales: int) -> Weights:
    """The tensors of detectron2's own FCOS under their names here, with scales of 1 for ``num_scales``
    levels; the predictions are the same."""
    converted = {f"{HEAD}.scales.{level}.scale": torch.ones(1) for level in range(num_scales)}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "head":
            part, _, rest = rest.partition(".")
            name = f"{HEAD}.{_FROM_DETECTRON2.get(part, part)}.{rest}"
        converted[name] = tensor
    return converted


def _check_head(head: Weights, scales: list[float]) -> None:
    if max(scales) - min(scales) > _SCALES:
        raise ValueError(
            f"the levels' scales differ, {[round(scale, 4) for scale in scales]}: detectron2's FCOS has "
            "none, and only equal ones could be part of its box prediction; use that of projects/FCOS"
        )
    kinds = {
        "convolutions of both towers together (NUM_SHARE_CONVS)": r"share_tower\.",
        "deformable convolutions (USE_DEFORMABLE)": r".*\.offset\.",
        "a batch norm per level (NORM)": r"\w+_tower\.\d+\.\d+\.",
    }
    for kind, pattern in kinds.items():
        if any(re.match(pattern, name) for name in head):
            raise ValueError(f"the head has {kind}, which detectron2's FCOS has not in this form")


def _name(public: str) -> str:
    for pattern, replacement in _RULES:
        public = re.sub(pattern, replacement, public)
    return public
