"""Record the outputs of named modules."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


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
        KeyError: there is none; the message lists close names.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        modules = dict(model.named_modules())
    parent = path.rpartition(".")[0]
    close = difflib.get_close_matches(path, modules, n=5) or [
        name for name in modules if name.rpartition(".")[0] == parent
    ]
    advice = f"; the closest names are {close[:10]}" if close else ""
    raise KeyError(f"{type(model).__name__} has no module '{path}'{advice}")


class _Complete(BaseException):
    """All outputs that were awaited are recorded. Not an Exception, because a detector might catch one."""


class Taps:
    """Remembers the outputs of named modules while it records.

    The modules have forward hooks only inside ``recording()``, so that at any other time the model can be
    copied, pickled and scripted as if there were no taps; a copy of the taps works on its own copy of the
    model. A module that is called once per level (a shared head) has one output per call. The tensors are
    the live ones: gradients of a loss on a tap reach the model.

    >>> taps = Taps(nn.Sequential(nn.Linear(2, 3)))
    >>> taps.add("0")
    >>> with taps.recording():
    ...     _ = taps.model(torch.zeros(1, 2))
    ...     taps.output("0").shape
    torch.Size([1, 3])

    Attributes:
        model: whose modules are tapped. It can be replaced by one with the same modules.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._paths: dict[str, None] = {}  # in the order in which they were added
        self._recording = False
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, list[tuple[Any, list[int]]]] = {}
        self._awaited: set[str] = set()
        self._last = ""

    def add(self, path: str) -> None:
        """Tap the module with this dotted name; a second time changes nothing.

        Raises:
            KeyError: there is no such module; the message lists close names.
        """
        if path in self._paths:
            return
        find_module(self.model, path)
        self._paths[path] = None
        if self._recording:
            self._attach(path)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the outputs of tapped modules that run inside; forget all of them at the end."""
        self.start()
        try:
            yield
        finally:
            self.release()

    def start(self) -> None:
        """Put hooks on the tapped modules, until ``release()``."""
        if self._recording:
            return
        self._recording = True
        for path in self._paths:
            self._attach(path)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No hooks inside; what was recorded remains."""
        recording, calls = self._recording, self._calls.copy()
        self.release()
        try:
            yield
        finally:
            if recording:
                self.start()
                self._calls.update(calls)

    def release(self) -> None:
        """Take all hooks off the model and forget the outputs."""
        self._recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    @contextlib.contextmanager
    def stopping_after(self, paths: Iterable[str], last: str) -> Iterator[None]:
        """End a forward inside early, while recording.

        It ends as soon as all tapped modules ``paths`` have run, or the tapped module ``last`` has; without
        ``paths`` it runs to its end. The forward's result is lost, the recorded outputs remain.
        """
        self._awaited, self._last = set(paths), last
        try:
            yield
        except _Complete:
            pass
        finally:
            self._awaited = set()

    def _attach(self, path: str) -> None:
        hook = functools.partial(self._remember, path)
        self._handles.append(find_module(self.model, path).register_forward_hook(hook))

    def _remember(self, path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.put(path, output)
        self._note_arrival(path)

    def _note_arrival(self, path: str) -> None:
        if not self._awaited:
            return
        self._awaited.discard(path)
        if not self._awaited or path == self._last:
            raise _Complete

    @property
    def paths(self) -> list[str]:
        """The dotted names of all tapped modules."""
        return list(self._paths)

    def put(self, path: str, output: Any) -> None:
        """Remember an output of the module ``path``, as if it had run."""
        self._calls.setdefault(path, []).append((output, _versions(output)))

    def take(self) -> dict[str, list[Any]]:
        """The outputs of each module that ran, one for each run; they are forgotten here.

        Raises: see ``output``.
        """
        for path in self._calls:
            self.output(path)
        taken = {path: [output for output, _ in calls] for path, calls in self._calls.items()}
        self._calls.clear()
        return taken

    def has(self, path: str) -> bool:
        """Whether the module ran since recording began."""
        return path in self._calls

    @property
    def recorded(self) -> list[str]:
        """Names of the modules that ran since recording began."""
        return list(self._calls)

    def output(self, path: str) -> Any:
        """What the module returned while recording; a list of its outputs if it ran several times.

        Raises:
            RuntimeError: it did not run, or its output was changed in place afterwards.
        """
        if path not in self._calls:
            raise RuntimeError(
                f"the module '{path}' did not run in this step, or its output is not recorded: a loss must "
                "state in bind what it reads (require_level, require_tap, require)"
            )
        for output, versions in self._calls[path]:
            if _versions(output) != versions:
                raise RuntimeError(
                    f"the output of '{path}' was changed in place after it was recorded "
                    "(by an in-place activation, for example); tap the enclosing module instead"
                )
        outputs = [output for output, _ in self._calls[path]]
        return outputs[0] if len(outputs) == 1 else outputs


def _versions(output: Any) -> list[int]:
    """How often each tensor in ``output`` was changed in place."""
    versions: list[int] = []
    map_tensors(lambda tensor: versions.append(tensor._version), output)
    return versions
