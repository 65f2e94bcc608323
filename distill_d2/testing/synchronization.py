"""Law 7: what a step does on the device must not make the host wait for it."""

from __future__ import annotations

import contextlib
import functools
import pkgutil
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_d2.losses import rows

# Operators whose result, or its shape, the host has to know.
_WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),
    *("nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPYING = ("cpu", "tolist", "numpy")  # no operators, or none on the CPU


class _Guard(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            self._check(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _check(self, name: str, args: Sequence[Any]) -> None:
        assert name not in _WAITING, name
        if name in _INDEXING:
            indices = [i for i in tree_leaves(args[1]) if isinstance(i, torch.Tensor)]
            assert not any(index.dtype in (torch.bool, torch.uint8) for index in indices), name

    def refusing(self, name: str) -> Callable:
        """The method ``name`` of a tensor, which fails unless the guard is paused."""
        method = getattr(torch.Tensor, name)

        @functools.wraps(method)
        def guarded(*args, **kwargs):
            assert self.paused, name
            return method(*args, **kwargs)

        return guarded

    def pausing(self, function: Callable) -> Callable:
        """The function, which may wait."""

        @functools.wraps(function)
        def unguarded(*args, **kwargs):
            paused, self.paused = self.paused, True
            try:
                with _sync_debug_mode("default"):
                    return function(*args, **kwargs)
            finally:
                self.paused = paused

        return unguarded


@contextlib.contextmanager
def no_synchronization(*, host: Sequence[str] = ()) -> Iterator[None]:
    """Inside, an operation after which the host waits for a GPU fails; on a CPU, too.

    Args:
        host: dotted names of functions and methods that may wait, or that work on tensors of the host.

    Raises:
        AssertionError, RuntimeError: there was such an operation; the message names it.
    """
    guard = _Guard()
    with contextlib.ExitStack() as stack:
        for name in _COPYING:
            stack.enter_context(mock.patch.object(torch.Tensor, name, guard.refusing(name)))
        for name in host:
            stack.enter_context(mock.patch(name, guard.pausing(pkgutil.resolve_name(name))))
        stack.enter_context(_sync_debug_mode("error"))
        stack.enter_context(guard)
        yield


@contextlib.contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    """torch's own check, which sees what happens on a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Elsewhere(torch.Tensor):
    """A mask that seems to be on another device than it is."""

    @property
    def device(self):
        return SimpleNamespace(type="cuda")


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, sums over some rows are computed as on a GPU: over all rows, with the other rows masked. On a
    CPU the rows are selected, which waits for their number."""
    masked_sum = rows.masked_sum

    def elsewhere(loss, mask, *values, **options):
        total = masked_sum(loss, mask.as_subclass(_Elsewhere), *values, **options)
        return total.as_subclass(torch.Tensor)

    with mock.patch.object(rows, "masked_sum", elsewhere):
        yield
