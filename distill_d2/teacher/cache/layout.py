"""What of a teacher's outputs is kept: per image a list of tensors, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...taps import map_tensors
from ...upload import contiguous, upload
from ...views import DetectorView

#: The outputs of tapped modules by dotted name, one for each run of the module.
Outputs = Mapping[str, Sequence[Any]]
#: What is kept of one image: tensors (1, ...) on the CPU; on "meta" those of which only the shape is read.
Entry = list[torch.Tensor]


def size_of(entry: Entry) -> int:
    """The bytes that an entry takes."""
    return sum(tensor.nbytes for tensor in entry if not tensor.is_meta)


class Layout:
    """Where each tensor of an entry is in the outputs, which is the same for all images."""

    def __init__(self, view: DetectorView, outputs: Outputs):
        """
        Args:
            view: the teacher's.
            outputs: of some images, to learn from.
        """
        self._view = view
        counted = iter(range(10**6))
        # Each tensor is replaced by its place in the list.
        self._places = map_tensors(lambda _: torch.tensor(next(counted)), dict(outputs))

    @classmethod
    def checked(cls, view: DetectorView, outputs: Outputs, images: int) -> Layout:
        """A layout of outputs that were computed for this number of images.

        Raises:
            ValueError: an output does not consist of tensors with one part for each image; the message names the
                module.
        """
        for path, runs in outputs.items():
            for leaf in _leaves(runs):
                if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or len(leaf) != images:
                    raise ValueError(
                        f"MODEL.DISTILLER.TEACHER_CACHE: the teacher's module '{path}' returns {_describe(leaf)}; "
                        "expected tensors with one part for each image. Set TEACHER_CACHE to '', or let losses "
                        "read another module"
                    )
        return cls(view, outputs)

    def entries(self, outputs: Outputs, half: bool = False) -> list[Entry]:
        """One entry for each image of a batch.

        Args:
            half: floating-point numbers in float16, where it holds them.
        """
        tensors: list[torch.Tensor] = []
        for path, runs in outputs.items():
            map_tensors(tensors.append, [self._read(path, run) for run in runs])
        if half:
            tensors = [_halved(tensor) for tensor in tensors]
        return [
            [
                tensor[i : i + 1].to("cpu", copy=True) if not tensor.is_meta else tensor[i : i + 1]
                for tensor in tensors
            ]
            for i in range(len(tensors[0]))
        ]

    def outputs(self, entries: Sequence[Entry], device: torch.device) -> dict[str, list[Any]]:
        """The outputs for a batch of these images; NaN where only the shape is kept."""
        tensors = [_batched(parts, device) for parts in zip(*entries)]
        return map_tensors(lambda place: tensors[int(place)], self._places)

    def _read(self, path: str, output: Any) -> Any:
        """The part of a module's output that is read; the rest on "meta". Losses read contiguous levels."""
        if path.split(".")[0] != "backbone":
            return output
        if isinstance(output, dict):
            return {
                name: contiguous(level) if self._view.reads_entry(path, name) else level.to("meta")
                for name, level in output.items()
            }
        return map_tensors(contiguous, output)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"a tensor of shape {tuple(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is not torch.float32 or tensor.is_meta:
        return tensor
    half = tensor.half()
    return half if half.isfinite().all() else tensor


def _batched(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One tensor of those of all images: in float32 where one of them did not fit into float16."""
    first = parts[0]
    if first.is_meta:
        shape = (len(parts), *first.shape[1:])
        return torch.full((), torch.nan, dtype=first.dtype, device=device).expand(shape)
    return upload(torch.cat(list(parts)), device)
