"""What a rule may ask of the config that it is part of."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from fvcore.common.registry import Registry

from ..messages import shortened


class Context:
    """A config, and what several rules want to know about it.

    Attributes:
        cfg: of a detector; its META_ARCHITECTURE is not the Distiller.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg

    def value(self, key: str) -> Any:
        """The value of a key by its full name. Raises KeyError."""
        return functools.reduce(lambda node, name: node[name], key.split("."), self.cfg)

    def has_key(self, key: str) -> bool:
        """Whether the config has this key, by its full name."""
        try:
            self.value(key)
        except (KeyError, TypeError, ValueError):  # a LazyConfig may have a list, or None, on the way
            return False
        return True

    def wrong(self, key: str, expected: str) -> str:
        """The message about the value of a key."""
        return f"{key} is {shortened(repr(self.value(key)), 200)}; expected {expected}"

    @functools.cached_property
    def architecture(self) -> type | None:
        """The class of the detector; None for a function or an unknown name."""
        return registered(META_ARCH_REGISTRY, self.cfg.MODEL.META_ARCHITECTURE)

    def has(self, *kinds: type) -> bool:
        """Whether the detector is one of these classes, or derived from one."""
        return self.architecture is not None and issubclass(self.architecture, kinds)

    @functools.cached_property
    def names(self) -> set[str]:
        """Of the architecture and of the parts that are chosen by name."""
        model = self.cfg.MODEL
        parts = (model.META_ARCHITECTURE, model.BACKBONE.NAME, model.PROPOSAL_GENERATOR.NAME)
        return {part for part in parts if isinstance(part, str)}

    @functools.cached_property
    def levels(self) -> list[str] | None:
        """Names of the backbone's outputs; None where it cannot be built without weights.

        Raises:
            ValueError: the config of the backbone is wrong.
        """
        name = self.cfg.MODEL.BACKBONE.NAME
        if not isinstance(name, str) or not _is_registered(BACKBONE_REGISTRY, name):
            return None
        nodes = {key: value for key, value in self.cfg.MODEL.items() if key not in _OTHER_KEYS}
        text = repr(nodes)
        if text not in _LEVELS:
            if len(_LEVELS) >= _MOST_LEVELS:
                _LEVELS.clear()
            _LEVELS[text] = _levels(self.cfg, name)
        return _LEVELS[text]


# A run asks for the same levels several times: while its config is checked, when the Distiller is built, ...
_LEVELS: dict[str, list[str] | None] = {}
_MOST_LEVELS = 100
# The architecture counts: a pyramid may have as many levels as it reads.
_OTHER_KEYS = ("DISTILLER", "WEIGHTS", "DEVICE")


def _levels(cfg: CfgNode, name: str) -> list[str] | None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return list(build_backbone(cfg).output_shape())
    except (AssertionError, KeyError, ValueError) as error:
        if "MODEL." in str(error) and isinstance(error, ValueError):  # of a project, which names the key
            raise
        raise ValueError(
            f"the backbone '{name}' (MODEL.BACKBONE.NAME) cannot be built from this config: "
            f"{type(error).__name__}: {error}"
        ) from error
    except Exception:  # a user's backbone that needs its weights, or a device
        return None


def registered(registry: Registry, name: Any) -> type | None:
    """The class of this name; None for a function or an unknown name."""
    known = isinstance(name, str) and _is_registered(registry, name)
    found = registry.get(name) if known else None
    return found if inspect.isclass(found) else None


def _is_registered(registry: Registry, name: str) -> bool:
    try:
        registry.get(name)  # imports the module of a plugin's detector
    except KeyError:
        return False
    return True
