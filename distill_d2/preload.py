"""Start a student from its teacher: the "inheriting strategy" of ICD (NeurIPS 2021, section 4)."""

from __future__ import annotations

import logging
from typing import Dict

import torch
from torch import nn

logger = logging.getLogger(__name__)


@torch.no_grad()
def preload(student: nn.Module, teacher: nn.Module, *, fpn: bool, head: bool) -> int:
    """Copy the teacher's FPN and/or heads into the student, tensor by tensor of equal name.

    The FPN is all of the backbone outside the bottom-up network (laterals, outputs, top block); the
    heads are everything outside the backbone. Tensors of another shape are skipped and listed.

    Returns:
        the number of tensors copied.

    Raises:
        ValueError: nothing could be copied.
    """
    ours = student.state_dict()
    candidates = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if name in ours and ((fpn and _in_fpn(name)) or (head and _in_head(name)))
    }
    fitting = {n: t for n, t in candidates.items() if t.shape == ours[n].shape}
    if not fitting:
        raise ValueError(
            "MODEL.DISTILLER.PRELOAD_FPN / PRELOAD_HEAD: no tensor of the teacher "
            f"({type(teacher).__name__}) fits the student ({type(student).__name__}); "
            "set both to False"
        )
    for name, tensor in fitting.items():
        ours[name].copy_(tensor)
    skipped = _describe_skipped(candidates, ours)
    logger.info(f"Copied {len(fitting)} tensors of the teacher into the student." + skipped)
    return len(fitting)


def _in_fpn(name: str) -> bool:
    return name.startswith("backbone.") and not name.startswith("backbone.bottom_up.")


def _in_head(name: str) -> bool:
    return not name.startswith("backbone.") and "pixel_" not in name


def _describe_skipped(candidates: Dict[str, torch.Tensor], ours: Dict[str, torch.Tensor]) -> str:
    lines = [
        f"  {name}: teacher {tuple(tensor.shape)}, student {tuple(ours[name].shape)}"
        for name, tensor in candidates.items()
        if tensor.shape != ours[name].shape
    ]
    return "\nSkipped, of another shape:\n" + "\n".join(lines) if lines else ""
