"""Pair the levels of a student and a teacher by name and stride, and adapt what differs (law 5)."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..views import DetectorView

Shapes = Dict[str, Tuple[int, ...]]
Pairs = Dict[str, Tuple[torch.Tensor, torch.Tensor]]


class FeaturePairs(nn.Module):
    """The levels that a loss compares, by name: "p3" of the student with "p3" of the teacher.

    Where channels differ, a trainable 1x1 convolution maps the student's to the teacher's number;
    where sizes differ (two networks may round an odd size differently), the student's map is
    resized bilinearly. The teacher's maps are never changed.
    """

    def __init__(self, in_features: Sequence[str] = ()):
        """
        Args:
            in_features: names of neck levels or bottom-up stages; empty: all neck levels that both
                detectors have with one stride.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.adapters = nn.ModuleDict()
        self.strides: Dict[str, int] = {}

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        """Find the levels in both detectors and create the adapters.

        Raises:
            KeyError: a detector lacks a level.
            ValueError: strides differ, or no level is common.
        """
        if not self.in_features:
            self.in_features = _common_levels(student, teacher)
        for name in self.in_features:
            ours, theirs = student.require_level(name), teacher.require_level(name)
            if ours.stride != theirs.stride:
                raise ValueError(
                    f"level '{name}' has stride {ours.stride} in the student "
                    f"({_strides(student)}) and {theirs.stride} in the teacher "
                    f"({_strides(teacher)}); levels pair by name and stride"
                )
            self.strides[name] = ours.stride
            if ours.channels != theirs.channels:
                self.adapters[name] = nn.Conv2d(ours.channels, theirs.channels, kernel_size=1)

    def describe(self, student: Shapes, teacher: Shapes) -> List[List[str]]:
        """One row per level for the table at start-up: name, stride, both shapes, and what is adapted.

        Args:
            student, teacher: (C, H, W) of each level by name, as DetectorView.probe gives them.
        """
        rows = []
        for name in self.in_features:
            steps = ["1x1 convolution"] if name in self.adapters else []
            steps += ["resize"] if student[name][1:] != teacher[name][1:] else []
            stride, adapter = self.strides[name], ", ".join(steps) or "none"
            rows.append([name, str(stride), str(student[name]), str(teacher[name]), adapter])
        return rows

    def forward(self, student: DetectorView, teacher: DetectorView) -> Pairs:
        """Per level name, the student's map and the teacher's, both (N, C, H, W) of the teacher."""
        pairs = {}
        for name in self.in_features:
            ours, theirs = student.level(name), teacher.level(name)
            if name in self.adapters:
                ours = self.adapters[name](ours)
            if ours.shape[-2:] != theirs.shape[-2:]:
                ours = F.interpolate(ours, theirs.shape[-2:], mode="bilinear", align_corners=False)
            pairs[name] = (ours, theirs)
        return pairs


def _common_levels(student: DetectorView, teacher: DetectorView) -> List[str]:
    theirs = teacher.strides
    names = [name for name, stride in student.strides.items() if theirs.get(name) == stride]
    if not names:
        raise ValueError(
            f"student and teacher have no neck level of one name and stride: the student has "
            f"{_strides(student)}, the teacher {_strides(teacher)}"
        )
    return names


def _strides(view: DetectorView) -> str:
    shapes = {**view.stage_shapes, **view.neck_shapes}
    return ", ".join(f"{name}: {shape.stride}" for name, shape in shapes.items())
