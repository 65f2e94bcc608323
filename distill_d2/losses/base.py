"""The base class of distillation losses: a name, a config node, a schedule, and a forward."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.utils.registry import Registry
from torch import nn

from ..views import Batch, DetectorView
from .pairing import FeaturePairs
from .settings import LossSettings, SettingError, keys_of

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """Subclasses of DistillLoss, chosen by MODEL.DISTILLER.TYPES."""


class DistillLoss(nn.Module):
    """A loss between what a student and a teacher computed on the same batch.

    A subclass sets ``NODE``, states its settings (they are the keys of its config node, in upper
    case), and implements ``forward``. Its FeaturePairs are bound to the detectors before training; a
    loss that needs more (a head, a tap) states it in ``bind``. One without FeaturePairs that does not
    override ``bind`` may read all levels of both necks.

        @DISTILL_LOSS_REGISTRY.register()
        class MeanFeature(DistillLoss):
            NODE = "MEAN_FEATURE"

            @dataclass(frozen=True)
            class Settings(LossSettings):
                in_features: Sequence[str] = key(("p3", "p4"), "Neck levels by name.")

            def __init__(self, **keys: Any):
                super().__init__(**keys)
                self.pairs = FeaturePairs(self.settings.in_features)

            def forward(self, student, teacher, batch):
                pairs = self.pairs(student, teacher).values()
                return {"loss_mean_feature": sum((s.mean() - t.mean()) ** 2 for s, t in pairs)}
    """

    #: Name of the config node below MODEL.DISTILLER.
    NODE: str = ""

    #: Factors of the student's own losses, by name, while this loss is on; a loss that changes them
    #: sets it in ``bind``.
    task_weights: Mapping[str, float] = MappingProxyType({})

    #: The setting that multiplies what trains the student, and those that say when it does, for messages
    #: about a loss that never acts. ``factor`` decides.
    weight_setting: str = "weight"
    schedule: tuple[str, ...] = ("start_iter", "stop_iter")

    #: Class of the settings.
    Settings: type[LossSettings] = LossSettings

    settings: LossSettings

    #: The weight of what trains the student: the setting ``weight_setting``, until GRADIENT_RATIO has set it. A
    #: loss with a ``weight_setting`` of its own multiplies by this number, not by the setting.
    applied_weight: float

    def __init__(self, **keys: Any):
        """
        Args:
            keys: the settings by name.

        Raises:
            TypeError: a setting does not exist.
            ValueError: a setting has a value that is not allowed; the message names its config key.
        """
        super().__init__()
        known = keys_of(self.Settings)
        unknown = [name for name in keys if name not in known]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no settings {unknown}; it has {list(known)}")
        try:
            self.settings = self.Settings(**keys)
        except SettingError as error:
            raise ValueError(f"{self.config_key(error.name)} {error.problem}") from None
        self.applied_weight = getattr(self.settings, self.weight_setting)
        expected = f"above 0, because GRADIENT_RATIO is {self.settings.gradient_ratio}; both 0.0: the loss is off"
        is_on = self.applied_weight > 0 or not self.settings.gradient_ratio
        self.check_setting(self.weight_setting, is_on, expected)

    @classmethod
    def config_key(cls, name: str) -> str:
        """The config key of a setting: "MODEL.DISTILLER.PKD.WEIGHT" of "weight"."""
        return ".".join(part for part in ("MODEL.DISTILLER", cls._node(name), name.upper()) if part)

    @classmethod
    def _node(cls, name: str) -> str:
        node = keys_of(cls.Settings)[name].node
        return cls.NODE if node is None else node

    def check_setting(self, name: str, holds: bool, expected: str) -> None:
        """Check a setting with what is known later, such as the detectors.

        Raises:
            ValueError: the condition does not hold; the message names the config key.
        """
        if not holds:
            value = getattr(self.settings, name)
            raise ValueError(f"{self.config_key(name)} is {value!r}; expected {expected}")

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        """State what this loss reads of both detectors, and create its adapters. Called once.

        Raises:
            KeyError, TypeError, ValueError: a detector cannot give what the loss needs.
        """
        all_pairs = self.feature_pairs()
        for pairs in all_pairs:
            if not pairs.key and "in_features" in keys_of(self.Settings):
                pairs.key = self.config_key("in_features")
            pairs.bind(student, teacher)
        if not all_pairs:
            student.require_neck()
            teacher.require_neck()

    def feature_pairs(self) -> list[FeaturePairs]:
        """The level pairings of this loss, for binding and for the table at start-up."""
        return [module for module in self.modules() if isinstance(module, FeaturePairs)]

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The unweighted terms, scalars in float32 by name; differentiable w.r.t. the student."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def factor(self, iteration: int) -> float:
        """Weight times schedule at this iteration; 0 where the loss is off."""
        s = self.settings
        weight = self.applied_weight if self.weight_setting == "weight" else s.weight
        if iteration < s.start_iter or 0 <= s.stop_iter <= iteration:
            return 0.0
        if iteration < s.start_iter + s.warmup_iters:
            return weight * (iteration - s.start_iter + 1) / (s.warmup_iters + 1)
        return weight

    def idle(self) -> dict[str, torch.Tensor]:
        """A zero that reaches every parameter of this loss, so that DDP sees all of them each step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return {}
        first, *others = [parameter.sum() for parameter in parameters]
        return {f"loss_{self.NODE.lower()}": sum(others, start=first) * 0.0}

    @classmethod
    def add_config(cls, distiller: CN) -> None:
        """Add the keys of this loss, with their defaults, to the node MODEL.DISTILLER.

        Raises:
            ValueError: the class has no NODE, or another loss has the same keys.
        """
        if not cls.NODE:
            raise ValueError(f"{cls.__name__} has no NODE, the name of its config node; set it")
        defaults = cls.Settings()
        for name in keys_of(cls.Settings):
            node, default = cls._node(name), getattr(defaults, name)
            keys = distiller.setdefault(node, CN()) if node else distiller
            if name.upper() in keys:
                raise ValueError(
                    f"{cls.__name__} adds the key {cls.config_key(name)}, which exists already; give the class "
                    "a NODE that no other loss has"
                )
            keys[name.upper()] = list(default) if isinstance(default, tuple) else default

    @classmethod
    def from_config(cls, distiller: CN) -> DistillLoss:
        """Build this loss from the node MODEL.DISTILLER."""
        return cls(**cls.read_config(distiller))

    @classmethod
    def read_config(cls, distiller: CN) -> dict[str, Any]:
        """The settings by name, from the node MODEL.DISTILLER."""
        nodes = {name: cls._node(name) for name in keys_of(cls.Settings)}
        return {
            name: (distiller[node] if node else distiller)[name.upper()] for name, node in nodes.items()
        }


def build_losses(distiller: CN) -> dict[str, DistillLoss]:
    """The losses that MODEL.DISTILLER.TYPES names, by registered name.

    Raises:
        ValueError: TYPES is empty, repeats a name, or names a loss that is not registered.
    """
    names, known = list(distiller.TYPES), sorted(name for name, _ in DISTILL_LOSS_REGISTRY)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"MODEL.DISTILLER.TYPES is {names}; expected one or more different names "
            f"of {known}" + (f"; unknown: {unknown}" if unknown else "")
        )
    return {name: DISTILL_LOSS_REGISTRY.get(name).from_config(distiller) for name in names}


def keys_without_effect(distiller: CN) -> list[str]:
    """The keys of losses that MODEL.DISTILLER.TYPES does not name, with other values than their defaults."""
    keys, defaults = [], CN()
    for name, loss in DISTILL_LOSS_REGISTRY:
        if name not in distiller.TYPES:
            loss.add_config(defaults)
            values, usual = loss.read_config(distiller), loss.read_config(defaults)
            keys += [loss.config_key(each) for each in values if values[each] != usual[each]]
    return keys


def key_comments() -> dict[str, str]:
    """What each config key of the registered losses means, by its full name."""
    losses = [loss for _, loss in DISTILL_LOSS_REGISTRY]
    return {
        loss.config_key(name): rule.comment
        for loss in losses
        for name, rule in keys_of(loss.Settings).items()
    }
