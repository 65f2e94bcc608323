"""Pretrained weights of a backbone: timm's own, of a file, or of an installed package."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from distill_d2.checkpoint.addresses import local_file
from distill_d2.checkpoint.reading import errors_name_file, read_checkpoint

from .description import of_timm
from .packages import PACKAGES, package_file, package_of
from .requirement import import_timm

logger = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]


def load_weights(body: nn.Module, name: str, weights: str, args: Mapping[str, Any]) -> None:
    """Load pretrained weights into a model of timm, in place; one process of a machine downloads them.

    Args:
        body: the model, whose unread parts may be cut off.
        name: of the model.
        weights: MODEL.TIMM.WEIGHTS; "": nothing is loaded.
        args: with which the model was created.

    Raises:
        FileNotFoundError, OSError, ValueError: they cannot be found or read, or do not fit.
    """
    if not weights:
        return
    first = comm.get_local_rank() == 0
    if not first:
        comm.synchronize()
    try:
        state = _read(name, weights, args)
    finally:
        if first:
            comm.synchronize()
    _load(body, name, weights, state, args)
    logger.info(
        f"Loaded {len(body.state_dict())} tensors of the backbone {name} from {weights} (MODEL.TIMM.WEIGHTS)"
    )


def _read(name: str, weights: str, args: Mapping[str, Any]) -> State:
    if weights == "timm":
        return _of_timm(name, args)
    package = package_of(weights)
    if package in PACKAGES:
        return _of_known_package(package, name, args)
    if package:
        return read_state(package_file(package))
    try:
        return read_state(local_file(weights))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"MODEL.TIMM.WEIGHTS: {error}") from error


def _of_timm(name: str, args: Mapping[str, Any]) -> State:
    of_timm(name)  # raises where there are none
    timm = import_timm()
    try:
        return timm.create_model(name, pretrained=True, **args).state_dict()
    except Exception as error:  # of huggingface_hub, requests, or torch.hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS is 'timm', but timm's weights of '{name}' cannot be downloaded: "
            f"{reason.rstrip('.')}. Download them elsewhere, and give the path of the file"
        ) from error


def _of_known_package(package: str, name: str, args: Mapping[str, Any]) -> State:
    known = PACKAGES[package]
    if name.partition(".")[0] != known.model:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS is 'package:{package}', the weights of {known.model}, but MODEL.TIMM.NAME is "
            f"'{name}'"
        )
    path = package_file(package)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if digest != known.sha256:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS is 'package:{package}', but {path} is not the known file: its sha256 is "
            f"{digest}, expected {known.sha256}. Install {package.replace('_', '-')} 0.1.0 again"
        )
    state = read_state(path)
    own = _whole(name, args)
    return dict(zip(own, state.values())) if len(own) == len(state) else state


def read_state(path: str) -> State:
    """The tensors of a file, by name.

    Args:
        path: .safetensors, or what torch.save wrote: a state dict, alone or as "state_dict" or "model".

    Raises:
        OSError, ValueError: it cannot be read, or holds something else; the message names it.
    """
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with errors_name_file(path):
            try:
                return load_file(path)
            except SafetensorError as error:
                raise ValueError(str(error)) from error
    state: Any = read_checkpoint(path)
    for entry in ("state_dict", "model"):
        state = state.get(entry, state)
    found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise ValueError(f"'{path}' holds no tensors by name; expected the state dict of a backbone")
    return found


def _load(body: nn.Module, name: str, weights: str, state: State, args: Mapping[str, Any]) -> None:
    own, whole = body.state_dict(), _whole(name, args)
    counters = [key for key in own if key.endswith("num_batches_tracked")]  # older files have none
    mis_shaped = [
        f"{key} {tuple(state[key].shape)} {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = {
        "missing in the file": [key for key in own if key not in state and key not in counters],
        "not in the model": [key for key in state if key not in own and key not in whole],
        "of another shape (file, model)": mis_shaped,
    }
    if any(problems.values()):
        listing = "\n".join(
            f"  {len(keys)} tensors {kind}: {', '.join(keys[:10])}{', ...' * (len(keys) > 10)}"
            for kind, keys in problems.items()
            if keys
        )
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS '{weights}' do not fit MODEL.TIMM.NAME '{name}':\n{listing}\n"
            "Give the weights of this model with timm's names; only its head and unread stages may be missing "
            "or extra"
        )
    body.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _whole(name: str, args: Mapping[str, Any]) -> State:
    """The tensors of the whole model, without values."""
    timm = import_timm()
    with torch.device("meta"):
        return timm.create_model(name, **args).state_dict()
