"""Pair the levels of a student and a teacher by name and stride, and adapt what differs (law 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..views import DetectorView

Shapes = dict[str, tuple[int, ...]]
Maps = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]

_SHARED = "shared"
#: Comments of settings.
ADAPTER = "Convolve the student's levels even where channels agree; where they differ, always."
INIT_STD = "Deviation of the adapters' first weights; 0: PyTorch's default."


class FeaturePairs(nn.Module):
    """The levels that a loss compares, by name: "p3" of the student with "p3" of the teacher.

    Where channels differ, a trainable convolution maps the student's to the teacher's number;
    where sizes differ (two networks may round an odd size differently), the student's map is
    resized bilinearly. The teacher's maps are not changed, unless a loss sets a number of channels.
    """

    def __init__(
        self,
        in_features: Sequence[str] = (),
        *,
        channels: int | None = None,
        contiguous: bool = True,
        kernel_size: int = 1,
        shared: bool = False,
        always: bool = False,
        relu: bool = False,
        init_std: float = 0.0,
        bias: bool = True,
        adapt: bool = True,
        key: str = "",
    ):
        """
        Args:
            in_features: names of neck levels or bottom-up stages; empty: all neck levels that both
                detectors have with one stride.
            channels: map the levels of both detectors to this number of channels, where they differ
                from it; None: the student's to the teacher's.
            contiguous: False: maps may come in any memory layout, which saves copies.
            kernel_size: of the convolutions, an odd number.
            shared: one convolution for all levels.
            always: convolve the student's levels even if channels agree.
            relu: after each convolution.
            init_std: the convolutions' weights start from a normal distribution with this deviation, of
                which the remainder by twice the deviation is taken (as in DeFeat); 0: PyTorch's default.
            bias: of the convolutions.
            adapt: False: maps keep their channels, which may differ; the student's are resized only.
            key: config keys of these arguments, for messages.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.channels = channels
        self.contiguous = contiguous
        self.kernel_size = kernel_size
        self.shared = shared
        self.always = always
        self.relu = relu
        self.init_std = init_std
        self.bias = bias
        self.adapt = adapt
        self.key = key
        self.adapters = nn.ModuleDict()
        self.teacher_adapters = nn.ModuleDict()
        self.strides: dict[str, int] = {}
        #: Channels of the student's and of the teacher's map that ``forward`` gives, by level name.
        self.level_channels: dict[str, tuple[int, int]] = {}

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        """Find the levels in both detectors and create the adapters.

        Raises:
            KeyError: a detector lacks a level.
            ValueError: strides differ, no level is common, a level is named twice, or levels that share
                a convolution have different channels.
        """
        try:
            self._bind(student, teacher)
        except (KeyError, ValueError) as error:
            if not self.key:
                raise
            kind = KeyError if isinstance(error, KeyError) else ValueError
            raise kind(f"{self.key}: {error.args[0]}") from error

    def _bind(self, student: DetectorView, teacher: DetectorView) -> None:
        if not self.in_features:
            self.in_features = _common_levels(student, teacher)
        if len(set(self.in_features)) < len(self.in_features):
            raise ValueError(f"the levels {self.in_features} have one name twice; expected it once")
        student_channels, teacher_channels = {}, {}  # (input, output) of a convolution, by level
        for name in self.in_features:
            of_student, of_teacher = student.require_level(name), teacher.require_level(name)
            if of_student.stride != of_teacher.stride:
                raise ValueError(
                    f"level '{name}' has stride {of_student.stride} in the student "
                    f"({_strides(student)}) and {of_teacher.stride} in the teacher "
                    f"({_strides(teacher)}); levels pair by name and stride"
                )
            self.strides[name] = of_student.stride
            output = self.channels or of_teacher.channels
            student_channels[name] = (of_student.channels, output)
            teacher_channels[name] = (of_teacher.channels, output)
            self.level_channels[name] = (output if self.adapt else of_student.channels, output)
        if self.adapt:
            self.adapters.update(self._convolutions(student_channels, self.always))
            self.teacher_adapters.update(self._convolutions(teacher_channels, False))

    def _convolutions(self, channels: dict[str, tuple[int, int]], always: bool) -> dict[str, nn.Module]:
        """The convolutions that are needed: one per level, or one shared by all levels."""
        needed = {name: pair for name, pair in channels.items() if always or pair[0] != pair[1]}
        if not needed or not self.shared:
            return {name: self._convolution(*pair) for name, pair in needed.items()}
        if len(set(channels.values())) > 1:
            raise ValueError(
                f"the levels {list(channels)} share one convolution, but need different (input, output) "
                f"channels: {channels}; choose levels of equal channels, or do not share it"
            )
        return {_SHARED: self._convolution(*channels[self.in_features[0]])}

    def _convolution(self, inputs: int, outputs: int) -> nn.Module:
        size = self.kernel_size
        convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=self.bias)
        if self.init_std > 0:
            with torch.no_grad():
                convolution.weight.normal_().fmod_(2).mul_(self.init_std)
        return nn.Sequential(convolution, nn.ReLU()) if self.relu else convolution

    def _adapter(self, adapters: nn.ModuleDict, name: str) -> nn.Module | None:
        key = _SHARED if self.shared else name
        return adapters[key] if key in adapters else None

    def describe(self, student: Shapes, teacher: Shapes) -> list[list[str]]:
        """One row per level for the table at start-up: name, stride, both shapes, and what is adapted.

        Args:
            student, teacher: (C, H, W) of each level by name, see ``level_shapes``.
        """
        rows = []
        for name in self.in_features:
            kernel = (
                f"{self.kernel_size}x{self.kernel_size} convolution{' and ReLU' if self.relu else ''}"
            )
            steps = [kernel] if self._adapter(self.adapters, name) else []
            if self._adapter(self.teacher_adapters, name):
                steps = [f"{kernel} of each" if steps else f"{kernel} of the teacher's"]
            steps += ["resize"] if student[name][1:] != teacher[name][1:] else []
            stride, adapter = self.strides[name], ", ".join(steps) or "none"
            rows.append([name, str(stride), str(student[name]), str(teacher[name]), adapter])
        return rows

    def forward(self, student: DetectorView, teacher: DetectorView) -> Pairs:
        """Per level name, the student's map and the teacher's, of equal shape (N, C, H, W); with ``adapt``
        False, of equal N, H and W."""
        teacher_maps = self.of_teacher(teacher)
        sizes = [(level.shape[-2], level.shape[-1]) for level in teacher_maps.values()]
        student_maps = self.of_student(student, sizes)
        return {name: (student_maps[name], teacher_maps[name]) for name in teacher_maps}

    def of_teacher(self, teacher: DetectorView) -> Maps:
        """The teacher's map (N, C, H, W) by level name."""
        return {name: self._level(teacher, name, self.teacher_adapters) for name in self.in_features}

    def of_student(
        self, student: DetectorView, sizes: Sequence[tuple[int, int]], *, detach: bool = False
    ) -> Maps:
        """The student's map (N, C, H, W) by level name.

        Args:
            sizes: (H, W) of the teacher's map of each level.
            detach: gradients reach the adapters, but not the student.
        """
        maps = {}
        for name, size in zip(self.in_features, sizes):
            level = self._level(student, name, self.adapters, detach)
            if level.shape[-2:] != tuple(size):
                level = F.interpolate(level, size, mode="bilinear", align_corners=False)
            maps[name] = level
        return maps

    def _level(
        self, view: DetectorView, name: str, adapters: nn.ModuleDict, detach: bool = False
    ) -> torch.Tensor:
        level = view.level(name, contiguous=self.contiguous)
        level = level.detach() if detach else level
        adapter = self._adapter(adapters, name)
        return level if adapter is None else adapter(level)


def level_modules(pairs: FeaturePairs, make: Callable[[int, int], nn.Module]) -> nn.ModuleDict:
    """Modules of a loss's own, one for each level of bound FeaturePairs, by level name.

    A loss makes them in its ``bind``, so that they are moved, trained and saved as the adapters are.

    Args:
        make: (channels of the student's map, channels of the teacher's), as ``pairs`` gives the maps.
    """
    return nn.ModuleDict({name: make(*channels) for name, channels in pairs.level_channels.items()})


def _common_levels(student: DetectorView, teacher: DetectorView) -> list[str]:
    strides = teacher.strides
    names = [name for name, stride in student.strides.items() if strides.get(name) == stride]
    if not names:
        raise ValueError(
            f"student and teacher have no neck level with the same name and stride: the student has "
            f"{_strides(student)}, the teacher {_strides(teacher)}"
        )
    return names


def _strides(view: DetectorView) -> str:
    shapes = {**view.stage_shapes, **view.neck_shapes}
    return ", ".join(f"{name}: {shape.stride}" for name, shape in shapes.items())
