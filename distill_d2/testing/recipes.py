"""How each loss is set for the small detectors of the laws' suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from distill_d2 import DISTILL_LOSS_REGISTRY, DistillLoss, add_distill_config

from .family import Family


@dataclass(frozen=True)
class Recipe:
    """A loss and its keys. A registered loss without a recipe has the default one.

    Attributes:
        loss: registered name.
        keys: below MODEL.DISTILLER.
        levels: keys that are level names, and the attribute of Family that lists them.
        equal: keys besides, with which equal detectors have no loss.
        off: keys with which the loss trains nothing of the student; empty: its weight is 0.
        not_zero: what the names of terms begin with that equal detectors have all the same.
        host: names of functions that work on the host, see ``no_synchronization``.
        family: the detector of whole runs.
        runs: whether there are whole runs.
        only: the detectors whose cells are tested; empty: all.
    """

    loss: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)
    equal: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    not_zero: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    family: str = "RetinaNet"
    runs: bool = True
    only: tuple[str, ...] = ()

    def set_keys(self, node: CfgNode, family: Family) -> None:
        """Set this recipe's keys in the node MODEL.DISTILLER."""
        chosen = {**self.keys, **{key: list(getattr(family, name)) for key, name in self.levels.items()}}
        _set(node, chosen)

    @property
    def keys_when_off(self) -> dict[str, Any]:
        """Keys below MODEL.DISTILLER with which a run equals the baseline."""
        return dict(self.off) or {f"{DISTILL_LOSS_REGISTRY.get(self.loss).NODE}.WEIGHT": 0.0}

    def build(self, family: Family, equal: bool = False) -> DistillLoss:
        """The loss for detectors of this kind; the same at each call.

        Args:
            equal: with the keys ``equal``.
        """
        cfg = get_cfg()
        add_distill_config(cfg)
        node = cfg.MODEL.DISTILLER
        self.set_keys(node, family)
        if equal:
            _set(node, self.equal)
        torch.manual_seed(0)
        return DISTILL_LOSS_REGISTRY.get(self.loss).from_config(node)


def _set(node: CfgNode, keys: Mapping[str, Any]) -> None:
    node.merge_from_list([item for pair in keys.items() for item in pair])


_ROI_POOLER = "detectron2.modeling.poolers.ROIPooler.forward"  # it waits
# detectron2 selects and samples them.
_TEACHERS_PROPOSALS = (_ROI_POOLER, "distill_d2.views.rcnn.RCNNView.own_proposals")
_FGFI = {"FGFI.IN_FEATURES": "levels"}
_GHND = {"GHND.IN_FEATURES": "stages"}
_GID = {"GID.IN_FEATURES": "pooled"}
_ICD_HOST = (
    "distill_d2.losses.icd.queries.InstanceQueries.ground_truth",
    "distill_d2.losses.icd.loss.geometry_of",
)
_DEFEAT_HEADS = {"DEFEAT.HEAD_CLS_W": 1.0, "DEFEAT.HEAD_CLS_BACK_W": 1.0}
_DEFEAT_STAGES = {"DEFEAT.HINT_BB_W": 1.0, "DEFEAT.HINT_BB_BACK_W": 4.0}
_GID_FEATURES = {
    "GID.GI_MODE": "gt",
    "GID.RESPONSE_CLS_WEIGHT": 0.0,
    "GID.RESPONSE_REG_WEIGHT": 0.0,
    "GID.ADAPTER": True,
}

#: By label; that of a loss's first recipe is its name.
RECIPES = {
    "DeFeat": Recipe("DeFeat", equal={"DEFEAT.NECK_ADAPT": False}),
    "DeFeat: heads and stages": Recipe(
        "DeFeat",
        {**_DEFEAT_HEADS, **_DEFEAT_STAGES},
        levels={"DEFEAT.BB_FEATURES": "stages"},
        equal={"DEFEAT.NECK_ADAPT": False},
        host=(_ROI_POOLER,),
        runs=False,
        only=("RetinaNet", "FCOS (detectron2)", "Faster R-CNN"),
    ),
    "DeFeat: all proposals": Recipe(
        "DeFeat",
        {**_DEFEAT_HEADS, "DEFEAT.PROPOSALS": "both", "DEFEAT.MASK": "roi"},
        equal={"DEFEAT.NECK_ADAPT": False},
        host=_TEACHERS_PROPOSALS,
        family="Faster R-CNN",
        only=("Faster R-CNN", "Mask R-CNN"),
    ),
    "FGFI": Recipe("FGFI", levels=_FGFI, equal={"FGFI.ADAPTER": False}),
    "GHND": Recipe("GHND", levels=_GHND),
    "GID": Recipe("GID", levels=_GID, host=(_ROI_POOLER,)),
    "GID: features": Recipe(
        "GID",
        _GID_FEATURES,
        levels=_GID,
        equal={"GID.ADAPTER": False},
        runs=False,
        only=("RetinaNet", "Faster R-CNN"),
    ),
    "GID: RPN": Recipe(
        "GID", {"GID.PREDICTIONS": "rpn"}, family="Faster R-CNN", runs=False, only=("Faster R-CNN",)
    ),
    "HeadKD": Recipe("HeadKD", host=(_ROI_POOLER,), family="Faster R-CNN"),
    "HeadKD: the teacher's proposals": Recipe(
        "HeadKD",
        {"HEAD_KD.PROPOSALS": "teacher"},
        host=_TEACHERS_PROPOSALS,
        family="Mask R-CNN",
        runs=False,
        only=("Mask R-CNN",),
    ),
    "InstanceConditionalDistillation": Recipe(
        "InstanceConditionalDistillation",
        # The student is reached from the first iteration on.
        {"INS.HIDDEN_DIM": 16, "INS.ATT_HEADS": 4, "BYPASS_DISTILL": 0},
        off={"INS_ATT_MIMIC.WEIGHT_VALUE": 0.0},
        # The decoder learns; the student's values have a projection of their own.
        not_zero=("loss_icd_",),
        host=_ICD_HOST,
    ),
    "MGD": Recipe("MGD", not_zero=("loss_mgd",)),  # the generators learn
    "ReviewKD": Recipe("ReviewKD", not_zero=("loss_review_kd",)),  # as do its convolutions
    # A cross entropy, and a 1x1 convolution for the student's features.
    "SSDKD": Recipe(
        "SSDKD",
        equal={"SSD_KD.HINT": "logits"},
        not_zero=("loss_ssd_kd_soft",),
        host=(_ROI_POOLER,),
        family="SSD",
    ),
    "SSDKD: of its repository": Recipe(
        "SSDKD",
        {"SSD_KD.BOUNDED": "batch", "SSD_KD.HINT": "logits"},
        not_zero=("loss_ssd_kd_soft",),
        host=(_ROI_POOLER,),
        family="Faster R-CNN",
        runs=False,
        only=("Faster R-CNN", "SSD"),
    ),
}


def recipes() -> dict[str, Recipe]:
    """RECIPES, and the default one of each registered loss that has none."""
    registered = sorted(name for name, _ in DISTILL_LOSS_REGISTRY)
    return {**RECIPES, **{name: Recipe(name) for name in registered if name not in RECIPES}}
