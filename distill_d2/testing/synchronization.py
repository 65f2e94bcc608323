"""Law 7: what a step does on the device must not make the host wait for it."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result, or its shape, the host has to know.
_WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),
    *("nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPYING = ("cpu", "tolist", "numpy")  # no operators, or none on the CPU


class _Guard(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in _WAITING, name
        if name in _INDEXING:
            indices = [i for i in tree_leaves(args[1]) if isinstance(i, torch.Tensor)]
            assert not any(index.dtype in (torch.bool, torch.uint8) for index in indices), name
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronization():
    """Fails where something would wait for a GPU; on the CPU too."""
    refused = {name: mock.Mock(side_effect=AssertionError(name)) for name in _COPYING}
    with mock.patch.multiple(torch.Tensor, **refused), _Guard():
        yield
