"""Which norm reads a convolution's output, and nobody else does: found by running a model once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..taps import map_tensors


@torch.no_grad()
def sole_readers(
    model: nn.Module,
    image: torch.Tensor,
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    kept: Sequence[nn.Module] = (),
) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a convolution and the norm for which alone it computes.

    The order of modules, or their names, do not say what reads what. In a run of ``model`` every operation says
    which tensors it gets: in a pair both modules are called once, the norm gets the very tensor that the
    convolution returned, no other module gets it, no operation outside the norm reads it, and the model does not
    return it.

    Args:
        model: in eval mode.
        image: (N, C, H, W), its input.
        convs, norms: the modules that may form pairs; those with hooks of their own do not.
        kept: modules whose outputs are read from elsewhere; they and what they return are in no pair.
    """
    record = _Record(set(convs), set(norms))
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(record.before, with_kwargs=True))
        handles.append(module.register_forward_hook(record.after))
    try:
        with record:
            returned = model.forward(
                image
            )  # hooks of the whole model, as users count with, do not see this image
            map_tensors(record.note_other, returned)
    finally:
        for handle in handles:
            handle.remove()
    for module in kept:
        map_tensors(record.note_other, record.returned.get(module))
    own_hooks = [m for m in (*convs, *norms) if m._forward_hooks or m._forward_pre_hooks]
    return record.pairs({*kept, *own_hooks})


class _Record(TorchDispatchMode):
    """Attributes:
    returned: what each module returned last; it keeps the tensors alive, so that no two have one id.
    """

    def __init__(self, convs: set[nn.Module], norms: set[nn.Module]):
        super().__init__()
        self.returned: dict[nn.Module, Any] = {}
        self._convs, self._norms = convs, norms
        self._calls: dict[nn.Module, int] = defaultdict(int)
        self._made_by: dict[int, nn.Module] = {}  # convolutions by the ids of their outputs
        self._readers: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self._running: nn.Module | None = None  # the norm that runs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        map_tensors(self._note, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[module] += 1
        if module in self._norms:
            self._running = module
        elif self._running is None:  # a norm has modules of its own, which get what it computed
            map_tensors(self.note_other, (args, kwargs))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.returned[module] = output
        if module in self._convs:
            self._made_by[id(output)] = module
        if module is self._running:
            self._running = None

    def note_other(self, tensor: torch.Tensor) -> None:
        """Something other than a norm reads ``tensor``."""
        self._note(tensor, None)

    def pairs(self, excluded: set[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
        found = []
        for conv in self._made_by.values():
            readers = self._readers[conv]
            norm = next(iter(readers)) if len(readers) == 1 else None
            if norm is None or {conv, norm} & excluded:
                continue
            if self._calls[conv] == self._calls[norm] == 1:
                found.append((conv, norm))
        return found

    def _note(self, tensor: torch.Tensor, *reader: nn.Module | None) -> None:
        conv = self._made_by.get(id(tensor))
        if conv is not None:
            self._readers[conv].add(reader[0] if reader else self._running)
