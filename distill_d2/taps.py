"""Remember the outputs of named modules for one step."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Callable

import torch
from torch import nn


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in a nest of dicts, lists and tuples; the rest stays."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule of ``model`` with this dotted name.

    Raises:
        KeyError: there is none; the message lists names that come close.
    """
    modules = dict(model.named_modules())
    if path in modules:
        return modules[path]
    parent = path.rpartition(".")[0]
    close = difflib.get_close_matches(path, modules, n=5) or [
        name for name in modules if name.rpartition(".")[0] == parent
    ]
    raise KeyError(f"{type(model).__name__} has no module '{path}'; the closest names are {close[:10]}")


class _Complete(Exception):
    """Everything that was awaited has been recorded."""


class Taps:
    """Forward hooks on named modules; each remembers its module's outputs while ``recording``.

    A module that is called once per level (a shared head) has one output per call. The tensors are
    the live ones: gradients of a loss on a tap reach the model. ``clear()`` forgets them all.

    >>> taps = Taps(nn.Sequential(nn.Linear(2, 3)))
    >>> taps.add("0")
    >>> taps.recording = True
    >>> _ = taps.model(torch.zeros(1, 2))
    >>> taps.output("0").shape
    torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.recording = False
        self._handles: dict[str, Any] = {}
        self._calls: dict[str, list[Any]] = {}
        self._awaited: set[str] = set()
        self._last = ""

    def add(self, path: str) -> None:
        """Tap the module with this dotted name; twice is once. Raises KeyError if there is none."""
        if path in self._handles:
            return
        module = find_module(self.model, path)

        def remember(_module, _inputs, output):
            if self.recording:
                self.put(path, output)
                self._note_arrival(path)

        self._handles[path] = module.register_forward_hook(remember)

    @contextlib.contextmanager
    def stopping_after(self, paths: Iterable[str], last: str) -> Iterator[None]:
        """End a forward inside as soon as all these tapped modules have run, or the tapped module
        ``last`` has; what would follow is not computed. Without ``paths`` it runs to its end. Only while
        recording. The forward's result is lost, the recorded outputs remain."""
        self._awaited, self._last = set(paths), last
        try:
            yield
        except _Complete:
            pass
        finally:
            self._awaited = set()

    def _note_arrival(self, path: str) -> None:
        if not self._awaited:
            return
        self._awaited.discard(path)
        if not self._awaited or path == self._last:
            raise _Complete

    @property
    def paths(self) -> list[str]:
        """The dotted names of all tapped modules."""
        return list(self._handles)

    def put(self, path: str, output: Any) -> None:
        """Remember an output of the module ``path``, as its hook does."""
        self._calls.setdefault(path, []).append((output, _versions(output)))

    def has(self, path: str) -> bool:
        """Whether the module ran while recording, since the last ``clear()``."""
        return path in self._calls

    @property
    def recorded(self) -> list[str]:
        """Names of the modules that ran while recording, since the last ``clear()``."""
        return list(self._calls)

    def output(self, path: str) -> Any:
        """What the module returned in this step; a list of its outputs if it ran several times.

        Raises:
            RuntimeError: it did not run, or its output was changed in place afterwards.
        """
        if path not in self._calls:
            raise RuntimeError(f"the module '{path}' did not run in this step, or is not tapped")
        for output, versions in self._calls[path]:
            if _versions(output) != versions:
                raise RuntimeError(
                    f"the output of '{path}' was changed in place after it was recorded "
                    "(by an in-place activation, for example); tap the enclosing module instead"
                )
        outputs = [output for output, _ in self._calls[path]]
        return outputs[0] if len(outputs) == 1 else outputs

    def clear(self) -> None:
        """Forget the outputs of this step."""
        self._calls.clear()

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.clear()


def _versions(output: Any) -> list[int]:
    """How often each tensor in ``output`` was changed in place."""
    versions: list[int] = []
    map_tensors(lambda tensor: versions.append(tensor._version), output)
    return versions
