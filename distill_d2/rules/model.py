"""The table of detectron2's detectors: what MODEL and the keys that a model reads outside of it may hold."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    StandardROIHeads,
)
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads
from PIL import Image

from .. import plugins
from .check import check_rules
from .context import Context, registered
from .kinds import (
    COUNT,
    COUNT_OR_0,
    COUNT_OR_ALL,
    FRACTION,
    NORM,
    NOT_NEGATIVE,
    OVERLAP,
    POSITIVE,
    PROBABILITY,
    Choice,
    Flag,
    Integer,
    Levels,
    Number,
    Rule,
    Sequence,
    Text,
    is_list,
    rule_of,
)

_BOX_LOSS = Choice(("smooth_l1", "giou", "diou", "ciou"))
_WEIGHTS = Sequence(POSITIVE, count=(4,))
_PROPOSALS = Choice(PROPOSAL_GENERATOR_REGISTRY, also=("PrecomputedProposals",))
_POOLERS = Choice(("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated"))
#: A list for each level, or one for all levels.
_ANCHORS = Sequence(Sequence(POSITIVE, least=1, alone=True), least=1)
_STAGES = ("stem", "res2", "res3", "res4", "res5")
_RESNETS = {
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_resnet_bifpn_backbone",
}
Condition = Callable[[Context], bool]
#: Forms of an image that detectron2 makes in addition to those of Pillow.
_FORMATS = {"BGR": 3, "YUV-BT.601": 3}


def _architectures(context: Context) -> list[str]:
    """Registered names, and those of detectors whose modules are imported only when they are used."""
    of_detectors = {detector.architecture for detector in plugins.detectors().values()} - {""}
    return sorted({name for name, _ in META_ARCH_REGISTRY} - {"Distiller"} | of_detectors)


ARCHITECTURE = Choice(_architectures)


def _formats(context: Context) -> list[str]:
    return [*_FORMATS, *(mode for mode in Image.MODES if ";" not in mode)]


def _channels(context: Context) -> list[int]:
    """Of INPUT.FORMAT."""
    name = context.cfg.INPUT.FORMAT
    if name in _FORMATS:
        return [_FORMATS[name]]
    return [len(Image.new(name, (1, 1)).getbands())] if name in _formats(context) else []


def _labels(node: str) -> Callable[[Context], list[int]]:
    """The number of labels: one more than thresholds."""
    return lambda context: [len(context.value(f"{node}.IOU_THRESHOLDS")) + 1]


def _matching(node: str) -> dict[str, Rule]:
    """Of detectron2's Matcher."""
    return {
        f"{node}.IOU_THRESHOLDS": Sequence(OVERLAP, least=1, not_falling=True),
        f"{node}.IOU_LABELS": Sequence(Choice((-1, 0, 1)), count=_labels(node)),
    }


def _pooler(node: str) -> dict[str, Rule]:
    """Of detectron2's ROIPooler."""
    return {
        f"{node}.POOLER_TYPE": _POOLERS,
        f"{node}.POOLER_RESOLUTION": COUNT,
        f"{node}.POOLER_SAMPLING_RATIO": COUNT_OR_0,
    }


def _box_sides(context: Context) -> list[int]:
    """4, or 5 of a rotated box."""
    return [5] if context.cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN" else [4]


def _cascade_stages(context: Context) -> list[int]:
    return [len(context.cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)]


def _always(context: Context) -> bool:
    return True


def _retinanet(context: Context) -> bool:
    return context.has(RetinaNet)


def _rcnn(context: Context) -> bool:
    return context.has(GeneralizedRCNN)


def _rpn(context: Context) -> bool:
    generator = context.cfg.MODEL.PROPOSAL_GENERATOR.NAME
    return context.has(GeneralizedRCNN, ProposalNetwork) and generator in ("RPN", "RRPN")


def _anchors(context: Context) -> bool:
    return _retinanet(context) or _rpn(context)


def _standard_heads(context: Context, kind: type = StandardROIHeads) -> bool:
    found = registered(ROI_HEADS_REGISTRY, context.cfg.MODEL.ROI_HEADS.NAME)
    return _rcnn(context) and found is not None and issubclass(found, kind)


def _cascade_heads(context: Context) -> bool:
    return _standard_heads(context, CascadeROIHeads)


def _resnet(context: Context) -> bool:
    bottleneck = context.cfg.MODEL.get("BOTTLENECK", {}).get("BACKBONE", "")
    name = context.cfg.MODEL.BACKBONE.NAME
    return (bottleneck if name == "build_bottleneck_backbone" else name) in _RESNETS


def _has_masks(context: Context) -> bool:
    return _rcnn(context) and context.cfg.MODEL.MASK_ON is True


def _has_keypoints(context: Context) -> bool:
    return _rcnn(context) and context.cfg.MODEL.KEYPOINT_ON is True


def _has_segmentation(context: Context) -> bool:
    return context.has(PanopticFPN, SemanticSegmentor)


#: Rules of keys, by the condition that a model reads them.
TABLE: dict[Condition, dict[str, Rule]] = {
    _always: {
        "MODEL.META_ARCHITECTURE": ARCHITECTURE,
        "MODEL.BACKBONE.NAME": Choice(BACKBONE_REGISTRY),
        "MODEL.BACKBONE.FREEZE_AT": Integer(at_least=-1),
        "MODEL.PIXEL_MEAN": Sequence(Number(), count=_channels),
        "MODEL.PIXEL_STD": Sequence(POSITIVE, count=_channels),
        "INPUT.FORMAT": Choice(_formats),
        "MODEL.FPN.OUT_CHANNELS": COUNT,
        "MODEL.FPN.NORM": NORM,
        "MODEL.FPN.FUSE_TYPE": Choice(("sum", "avg")),
        "MODEL.FPN.IN_FEATURES": Sequence(Text(empty=False), unique=True),
        "TEST.DETECTIONS_PER_IMAGE": COUNT,
    },
    _resnet: {
        "MODEL.RESNETS.DEPTH": Choice((18, 34, 50, 101, 152)),
        "MODEL.RESNETS.OUT_FEATURES": Sequence(Choice(_STAGES), least=1, unique=True),
        "MODEL.RESNETS.NUM_GROUPS": COUNT,
        "MODEL.RESNETS.NORM": NORM,
        "MODEL.RESNETS.WIDTH_PER_GROUP": COUNT,
        "MODEL.RESNETS.RES5_DILATION": Choice((1, 2)),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": COUNT,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": COUNT,
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Sequence(Flag(), count=(4,)),
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": COUNT,
    },
    _anchors: {
        "MODEL.ANCHOR_GENERATOR.NAME": Choice(ANCHOR_GENERATOR_REGISTRY),
        "MODEL.ANCHOR_GENERATOR.SIZES": _ANCHORS,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _ANCHORS,
        "MODEL.ANCHOR_GENERATOR.OFFSET": Number(at_least=0, below=1),
    },
    _rcnn: {
        "MODEL.PROPOSAL_GENERATOR.NAME": _PROPOSALS,
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": NOT_NEGATIVE,
        "TEST.DETECTIONS_PER_IMAGE": COUNT_OR_ALL,
        "MODEL.ROI_HEADS.NAME": Choice(ROI_HEADS_REGISTRY),
        "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
        "MODEL.ROI_HEADS.IN_FEATURES": Levels(),
        **_matching("MODEL.ROI_HEADS"),
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": FRACTION,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": FRACTION,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": FRACTION,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": Sequence(POSITIVE, count=_box_sides),
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": NOT_NEGATIVE,
        "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": COUNT,
        "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": NOT_NEGATIVE,
        **_pooler("MODEL.ROI_BOX_HEAD"),
    },
    _rpn: {
        "MODEL.RPN.HEAD_NAME": Choice(RPN_HEAD_REGISTRY),
        "MODEL.RPN.IN_FEATURES": Levels(),
        "MODEL.RPN.BOUNDARY_THRESH": Number(at_least=-1),
        **_matching("MODEL.RPN"),
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
        "MODEL.RPN.POSITIVE_FRACTION": FRACTION,
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.RPN.BBOX_REG_WEIGHTS": Sequence(POSITIVE, count=_box_sides),
        "MODEL.RPN.SMOOTH_L1_BETA": NOT_NEGATIVE,
        "MODEL.RPN.LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": COUNT,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": COUNT,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": COUNT,
        "MODEL.RPN.POST_NMS_TOPK_TEST": COUNT,
        "MODEL.RPN.NMS_THRESH": FRACTION,
        "MODEL.RPN.CONV_DIMS": Sequence(COUNT_OR_ALL, least=1),
    },
    _standard_heads: {
        "MODEL.ROI_BOX_HEAD.NAME": Choice(ROI_BOX_HEAD_REGISTRY),
        "MODEL.ROI_BOX_HEAD.NUM_FC": COUNT_OR_0,
        "MODEL.ROI_BOX_HEAD.FC_DIM": COUNT,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": COUNT_OR_0,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": COUNT,
        "MODEL.ROI_BOX_HEAD.NORM": NORM,
    },
    _cascade_heads: {
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": Sequence(OVERLAP, least=1),
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": Sequence(_WEIGHTS, count=_cascade_stages),
    },
    _has_masks: {
        "MODEL.ROI_MASK_HEAD.NAME": Choice(ROI_MASK_HEAD_REGISTRY),
        **_pooler("MODEL.ROI_MASK_HEAD"),
        "MODEL.ROI_MASK_HEAD.NUM_CONV": COUNT_OR_0,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": COUNT,
        "MODEL.ROI_MASK_HEAD.NORM": NORM,
    },
    _has_keypoints: {
        "MODEL.ROI_KEYPOINT_HEAD.NAME": Choice(ROI_KEYPOINT_HEAD_REGISTRY),
        **_pooler("MODEL.ROI_KEYPOINT_HEAD"),
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": Sequence(COUNT, least=1),
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": COUNT,
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": COUNT_OR_0,
        "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": NOT_NEGATIVE,
    },
    _has_segmentation: {
        "MODEL.SEM_SEG_HEAD.NAME": Choice(SEM_SEG_HEADS_REGISTRY),
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": Levels(),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": COUNT,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": COUNT,
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": COUNT,
        "MODEL.SEM_SEG_HEAD.NORM": NORM,
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": FRACTION,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": NOT_NEGATIVE,
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": FRACTION,
    },
    _retinanet: {
        "MODEL.RETINANET.NUM_CLASSES": COUNT,
        "MODEL.RETINANET.IN_FEATURES": Levels(),
        "MODEL.RETINANET.NUM_CONVS": COUNT,
        **_matching("MODEL.RETINANET"),
        "MODEL.RETINANET.PRIOR_PROB": PROBABILITY,
        "MODEL.RETINANET.SCORE_THRESH_TEST": FRACTION,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": COUNT,
        "MODEL.RETINANET.NMS_THRESH_TEST": FRACTION,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": _WEIGHTS,
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": NOT_NEGATIVE,
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA": Number(at_least=0, at_most=1, also=(-1,)),
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": NOT_NEGATIVE,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
        "MODEL.RETINANET.NORM": NORM,
    },
}


#: Norms of heads, the condition that they are read, and the channels that a group norm divides.
_GROUPS = 32
_GROUPED: list[tuple[Condition, str, str]] = [
    (_retinanet, "MODEL.RETINANET.NORM", "MODEL.FPN.OUT_CHANNELS"),
    (_standard_heads, "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_BOX_HEAD.CONV_DIM"),
    (_has_masks, "MODEL.ROI_MASK_HEAD.NORM", "MODEL.ROI_MASK_HEAD.CONV_DIM"),
    (_has_segmentation, "MODEL.SEM_SEG_HEAD.NORM", "MODEL.SEM_SEG_HEAD.CONVS_DIM"),
]


def model_rules(context: Context) -> dict[str, Rule]:
    """The rules of all keys that the config's model reads, those of its plugins included."""
    rules: dict[str, Rule] = {}
    for is_read, group in TABLE.items():
        if is_read(context):
            rules.update(group)
    for detector in plugins.detectors().values():
        if detector.names & context.names:
            rules.update(detector.rules)
    return rules


def model_relations(context: Context) -> Iterator[str]:
    """What is wrong between keys of MODEL, a message each."""
    model, wrong = context.cfg.MODEL, context.wrong
    if _anchors(context):
        yield from _anchor_relations(context)
    if _standard_heads(context) and model.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead":
        if not model.ROI_BOX_HEAD.NUM_FC + model.ROI_BOX_HEAD.NUM_CONV:
            yield "MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are 0; expected at least one layer"
    for is_read, norm, channels in _GROUPED:
        if is_read(context) and context.value(norm) == "GN" and context.value(channels) % _GROUPS:
            yield wrong(channels, f"a multiple of {_GROUPS} for {norm} 'GN'")
    if _rcnn(context) and model.ROI_BOX_HEAD.USE_FED_LOSS and not model.ROI_BOX_HEAD.USE_SIGMOID_CE:
        yield wrong("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "False, or USE_SIGMOID_CE True")
    if _cascade_heads(context):
        if not model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            yield wrong("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True for CascadeROIHeads")
        first = model.ROI_HEADS.IOU_THRESHOLDS[0]
        if model.ROI_BOX_CASCADE_HEAD.IOUS[0] != first:
            start = f"to start with {first}, as MODEL.ROI_HEADS.IOU_THRESHOLDS"
            yield wrong("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", start)


def _anchor_relations(context: Context) -> Iterator[str]:
    model = context.cfg.MODEL
    node = "RETINANET" if _retinanet(context) else "RPN"
    levels = list(model[node].IN_FEATURES)
    for name in ("SIZES", "ASPECT_RATIOS"):
        lists = [is_list(each) for each in model.ANCHOR_GENERATOR[name]]
        if any(lists) and not (all(lists) and len(lists) in (1, len(levels))):
            expected = f"one list, or {len(levels)} for MODEL.{node}.IN_FEATURES {levels}"
            yield f"MODEL.ANCHOR_GENERATOR.{name} has {len(lists)} entries; expected {expected}"
    rotated = node == "RPN" and model.PROPOSAL_GENERATOR.NAME == "RRPN"
    if model.ANCHOR_GENERATOR.NAME == (
        "DefaultAnchorGenerator" if rotated else "RotatedAnchorGenerator"
    ):
        expected = "rotated anchors with MODEL.PROPOSAL_GENERATOR.NAME 'RRPN', and only there"
        yield context.wrong("MODEL.ANCHOR_GENERATOR.NAME", expected)


def check_model(cfg: CfgNode, source: str = "") -> None:
    """Check the keys that a model reads, before it is built.

    Args:
        cfg: its config, without the Distiller.
        source: which config it is, for the message; "": the run's.

    Raises:
        RuleError: a value is not allowed; the message names key, value and what was expected.
    """
    context = Context(cfg)
    check_rules(context, model_rules(context), model_relations, source)


@contextlib.contextmanager
def assertions_told(source: str) -> Iterator[None]:
    """While a model is built: what detectron2 asserts of its config is a ValueError.

    Args:
        source: which model it is, for the message.
    """
    try:
        yield
    except AssertionError as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(
            f"{source} cannot be built from its config; detectron2 says: {reason}"
        ) from error


def default_rules(node: CfgNode, prefix: str = "") -> dict[str, Rule]:
    """The types of all keys of a node of default values."""
    rules: dict[str, Rule] = {}
    for name, value in node.items():
        if isinstance(value, CfgNode):
            rules.update(default_rules(value, f"{prefix}{name}."))
        else:
            rules[prefix + name] = rule_of(value)
    return rules
