"""One common padding: student and teacher see images of one size (law 6)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import nn


class CommonPadding:
    """Pads the student's images further where the teacher's backbone needs a coarser multiple.

    Attributes:
        size: (H, W) in pixels of the padded images of this step.
    """

    def __init__(self, backbone: nn.Module, teacher_divisibility: int, teacher_square: int):
        """
        Args:
            backbone: the student's.
            teacher_divisibility: the sides of the teacher's images are multiples of this.
            teacher_square: and at least this long; 0: of any length.
        """
        self.size: tuple[int, int] = (0, 0)
        self._backbone: Any = backbone  # Module's annotations know none of a backbone's attributes
        self._teacher_divisibility = teacher_divisibility
        self._teacher_square = teacher_square

    def of(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) to which both detectors pad what the student pads to ``height`` x ``width``."""
        divisibility, square = self._teacher_divisibility, self._teacher_square
        height, width = max(height, square), max(width, square)
        if height % divisibility == 0 and width % divisibility == 0:
            return height, width
        multiple = math.lcm(divisibility, self._student_divisibility)
        return _round_up(height, multiple), _round_up(width, multiple)

    def of_images(self, images: Sequence[torch.Tensor]) -> tuple[int, int]:
        """The size (H, W) to which both pad these images (3, H_i, W_i), without a forward.

        The student's part is detectron2's own rule, applied to tensors without data.
        """
        shapes = [torch.empty(image.shape, device="meta") for image in images]
        constraints = self._backbone.padding_constraints
        padded = ImageList.from_tensors(
            shapes, self._backbone.size_divisibility, padding_constraints=constraints
        )
        return self.of(*padded.tensor.shape[-2:])

    def of_image(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) to which both pad one image of this size."""
        multiple = self._student_divisibility
        return self.of(_round_up(height, multiple), _round_up(width, multiple))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The student's backbone, run inside, gets its images padded to ``size``, which is set."""
        handle = self._backbone.register_forward_pre_hook(self._pad)
        try:
            yield
        finally:
            handle.remove()

    @property
    def _student_divisibility(self) -> int:
        return max(self._backbone.size_divisibility, 1)

    def _pad(
        self, _backbone: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        height, width = inputs[0].shape[-2:]
        self.size = self.of(height, width)
        if self.size == (height, width):
            return None
        missing_rows, missing_columns = self.size[0] - height, self.size[1] - width
        return (F.pad(inputs[0], (0, missing_columns, 0, missing_rows)), *inputs[1:])


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
