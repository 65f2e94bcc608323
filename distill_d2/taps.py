"""Remember the outputs of named modules for one step."""

from __future__ import annotations

import difflib
from typing import Any, Callable, Dict, List

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
    raise KeyError(
        f"{type(model).__name__} has no module '{path}'; the closest names are {close[:10]}"
    )


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
        self._handles: Dict[str, Any] = {}
        self._calls: Dict[str, List[Any]] = {}

    def add(self, path: str) -> None:
        """Tap the module with this dotted name; twice is once. Raises KeyError if there is none."""
        if path in self._handles:
            return
        module = find_module(self.model, path)

        def remember(_module, _inputs, output):
            if self.recording:
                self.put(path, output)

        self._handles[path] = module.register_forward_hook(remember)

    @property
    def paths(self) -> List[str]:
        """The dotted names of all tapped modules."""
        return list(self._handles)

    def put(self, path: str, output: Any) -> None:
        """Remember an output of the module ``path``, as its hook does."""
        self._calls.setdefault(path, []).append((output, _versions(output)))

    def has(self, path: str) -> bool:
        """Whether the module ran while recording, since the last ``clear()``."""
        return path in self._calls

    @property
    def recorded(self) -> List[str]:
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


def _versions(output: Any) -> List[int]:
    """How often each tensor in ``output`` was changed in place."""
    versions: List[int] = []
    map_tensors(lambda tensor: versions.append(tensor._version), output)
    return versions
