"""What a teacher's outputs depend on, besides images, padding and precision, as a short text."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import torch
from torch import nn

from ...views import DetectorView

_FORMAT = 1  # of the entries
_PLAIN = (bool, int, float, str, type(None))


def fingerprint(view: DetectorView, *settings: Any) -> str:
    """A checksum of a teacher's weights and structure, of what losses read of it, and of what else it is run with.

    Args:
        view: of the teacher as it was loaded.
        settings: plain values.
    """
    model = view.model
    found = hashlib.blake2b(digest_size=12)
    device = next(model.parameters()).device.type
    texts = [_FORMAT, torch.__version__, device, *settings, view.reads]
    texts += [line for module in model.named_modules() for line in _structure(*module)]
    for text in texts:
        found.update(f"{text}\n".encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(as_bytes(tensor))
    return found.hexdigest()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor, in the order of its dimensions."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _structure(name: str, module: nn.Module) -> list[str]:
    """A module's class and its plain attributes, such as the way in which an FPN fuses its levels."""
    values = {key: value for key, value in vars(module).items() if _is_plain(value)}
    return [f"{name} {type(module).__module__}.{type(module).__qualname__}", str(sorted(values.items()))]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
