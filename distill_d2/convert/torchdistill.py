"""Torchvision's Faster, Mask and Keypoint R-CNN R*-FPN, and GHND's students of them as torchdistill and its
authors' repositories released them, as detectron2 checkpoints.

Key names of torchvision before and since 0.13, GHND's encoder one or two levels deep. Depth, classes and the
bottleneck's widths follow from INPUT.

Class order: torchvision has the background first, detectron2 last. 91 rows are COCO's 80 classes with gaps; if
they are 90 classes of your own, say MODEL.ROI_HEADS.NUM_CLASSES 90.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from typing import Any, Callable, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from ..checkpoint import read_checkpoint
from ..config import student_config
from ..engine import load_config
from .conversion import (
    NUMPY_SCALARS,
    ConversionError,
    Weights,
    check_agreement,
    listing,
    state_dict_of,
    write,
)

AUTHOR = "converted from torchvision's names by distill_d2"
# Used by what checkpoints of torchdistill hold beside the weights. best_value is a number of numpy.
UNREAD = ("argparse.Namespace", "collections.Counter", *NUMPY_SCALARS)
DETECTRON2_EPS = 1e-5
COCO_ROWS = 91
COCO_IDS = sorted(category["id"] for category in COCO_CATEGORIES if category["isthing"])
# By numbers of blocks in res3, res4 and res5, and whether they have three convolutions.
DEPTHS = {
    (2, 2, 2, False): 18,
    (4, 6, 3, False): 34,
    (4, 6, 3, True): 50,
    (4, 23, 3, True): 101,
    (8, 36, 3, True): 152,
}

_BODY, _BOTTOM_UP = r"backbone\.body", "backbone.bottom_up"
_BOTTLENECK = f"{_BOTTOM_UP}.res2"
_RPN = "proposal_generator.rpn_head"
_SCORES, _BOXES = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
_MASKS, _KEYPOINTS = "roi_heads.mask_head.predictor", "roi_heads.keypoint_head.score_lowres"
# Of a norm or convolution; detectron2 has the same.
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Modules of torchvision, and from their groups those of detectron2.
_RULES: tuple[tuple[str, Callable[..., str]], ...] = (
    (rf"{_BODY}\.conv1", lambda: f"{_BOTTOM_UP}.stem.conv1"),
    (rf"{_BODY}\.bn1", lambda: f"{_BOTTOM_UP}.stem.conv1.norm"),
    (rf"{_BODY}\.layer([1-4])\.(\d+)\.conv(\d)", lambda k, b, i: f"{_stage(k)}.{b}.conv{i}"),
    (rf"{_BODY}\.layer([1-4])\.(\d+)\.bn(\d)", lambda k, b, i: f"{_stage(k)}.{b}.conv{i}.norm"),
    (rf"{_BODY}\.layer([1-4])\.(\d+)\.downsample\.0", lambda k, b: f"{_stage(k)}.{b}.shortcut"),
    (rf"{_BODY}\.layer([1-4])\.(\d+)\.downsample\.1", lambda k, b: f"{_stage(k)}.{b}.shortcut.norm"),
    # Twice "encoder" in the checkpoints of the ICPR 2020 repository.
    (rf"{_BODY}\.layer1\.(?:encoder\.)?(encoder\.\d+)", lambda layer: f"{_BOTTLENECK}.{layer}"),
    (rf"{_BODY}\.layer1\.(decoder\.\d+)", lambda layer: f"{_BOTTLENECK}.{layer}"),
    # The optional zeros: since torchvision 0.13, these convolutions are wrapped.
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?", lambda i: f"backbone.fpn_lateral{int(i) + 2}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?", lambda i: f"backbone.fpn_output{int(i) + 2}"),
    (r"rpn\.head\.conv(?:\.0\.0)?", lambda: f"{_RPN}.conv"),
    (r"rpn\.head\.cls_logits", lambda: f"{_RPN}.objectness_logits"),
    (r"rpn\.head\.bbox_pred", lambda: f"{_RPN}.anchor_deltas"),
    (r"roi_heads\.box_head\.fc([67])", lambda i: f"roi_heads.box_head.fc{int(i) - 5}"),
    (r"roi_heads\.box_predictor\.cls_score", lambda: _SCORES),
    (r"roi_heads\.box_predictor\.bbox_pred", lambda: _BOXES),
    (r"roi_heads\.mask_head\.mask_fcn(\d+)", lambda i: f"roi_heads.mask_head.mask_fcn{i}"),
    (r"roi_heads\.mask_head\.(\d+)\.0", lambda i: f"roi_heads.mask_head.mask_fcn{int(i) + 1}"),
    (r"roi_heads\.mask_predictor\.conv5_mask", lambda: "roi_heads.mask_head.deconv"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", lambda: _MASKS),
    # Even numbers: every other module is a ReLU.
    (
        r"roi_heads\.keypoint_head\.(\d*[02468])",
        lambda i: f"roi_heads.keypoint_head.conv_fcn{int(i) // 2 + 1}",
    ),
    (r"roi_heads\.keypoint_predictor\.kps_score_lowres", lambda: _KEYPOINTS),
)
# Whole names that have no counterpart, and why.
_DROPPED = (
    (rf"(?:{_BODY}\.)?fc\.(weight|bias)", "the classifier of ImageNet, which a detector does not use"),
    (
        rf"{_BODY}\.layer1\.encoder\.ext_classifier\..+",
        "the neural filter for images without a person, which is not offered here: every image is sent",
    ),
)
_COUNTER_REASON = "counters of ordinary batch norms, which are frozen ones here"
_SECOND_VERSION = re.compile(
    r"backbone\.fpn\.(inner|layer)_blocks\.\d\.1\..+"
    r"|rpn\.head\.conv\.[1-9].*|roi_heads\.(box|mask)_head\.\d+\.1\..+|roi_heads\.box_head\.\d+\..+"
)


class Converted(NamedTuple):
    """
    Attributes:
        weights: by detectron2's names.
        keys: config keys that follow from them.
        dropped: names that were left out, by reason.
        notes: lines about what was changed.
    """

    weights: Weights
    keys: dict[str, Any]
    dropped: dict[str, list[str]]
    notes: list[str]


def run(args: argparse.Namespace) -> None:
    """Convert a file, as ``distill-d2 convert torchdistill`` was told.

    Raises:
        ConversionError, OSError, ValueError: nothing was written; the message says why.
    """
    if args.frozen_bn_eps < 0:
        raise ConversionError(f"--frozen-bn-eps is {args.frozen_bn_eps}; expected 0 or more")
    entries = read_checkpoint(args.input, stubs=UNREAD)
    given = dict(zip(args.opts[::2], args.opts[1::2]))
    own_classes = given.get("MODEL.ROI_HEADS.NUM_CLASSES") == str(COCO_ROWS - 1)
    converted = convert(state_dict_of(entries), args.frozen_bn_eps, coco=not own_classes)
    config_file = args.config_file or packaged_config(converted.keys)
    cfg, needed = complete_config(config_file, args.opts, converted.keys)
    check_agreement(converted.weights, cfg, config_file)
    write(args.output, converted.weights, AUTHOR)
    print_summary(converted)
    print_command(args.output, config_file, needed, converted.keys)


def convert(state_dict: Weights, frozen_bn_eps: float, *, coco: bool) -> Converted:
    """From torchvision's detector to detectron2's.

    Args:
        state_dict: by torchvision's names.
        frozen_bn_eps: eps of its frozen batch norms.
        coco: 91 rows of classes are COCO's.

    Raises:
        ConversionError: it is not a detector of a known kind, or has keys of unknown meaning.
    """
    weights, dropped = rename(state_dict)
    notes = [last_background(weights, coco=coco)]
    counters, note = match_eps(weights, frozen_bn_eps)
    if counters:
        dropped[_COUNTER_REASON] = counters
    return Converted(weights, infer_keys(weights), dropped, [*notes, note])


def rename(state_dict: Weights) -> tuple[Weights, dict[str, list[str]]]:
    """The weights by detectron2's names, and the names that have none, by reason.

    Raises:
        ConversionError: the meaning of some key is not known, or two keys mean the same.
    """
    refuse_second_version(state_dict)
    weights: Weights = {}
    sources: dict[str, str] = {}
    dropped: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in state_dict.items():
        target, reason = detectron2_name(name), reason_to_drop(name)
        if target in weights:
            raise ConversionError(f"INPUT's keys {sources[target]} and {name} both become {target}")
        if target:
            weights[target], sources[target] = tensor, name
        elif reason:
            dropped.setdefault(reason, []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ConversionError(
            f"{len(unknown)} of INPUT's {len(state_dict)} keys do not belong to torchvision's Faster, Mask "
            f"or Keypoint R-CNN with a ResNet and FPN, nor of GHND's bottleneck: {listing(unknown)}"
        )
    return weights, dropped


def refuse_second_version(state_dict: Weights) -> None:
    found = [name for name in state_dict if _SECOND_VERSION.fullmatch(name)]
    if found:
        raise ConversionError(
            "INPUT is of the architecture of torchvision's fasterrcnn_resnet50_fpn_v2 and "
            "maskrcnn_resnet50_fpn_v2 (norms in the FPN, two convolutions in the RPN, a box head of "
            "convolutions), which is not converted; expected that of fasterrcnn_resnet50_fpn. It has "
            + listing(found, 3)
        )


def detectron2_name(name: str) -> str | None:
    """The name in detectron2 of a key of torchvision; None: unknown."""
    module, _, leaf = name.rpartition(".")
    for pattern, target in _RULES:
        found = re.fullmatch(pattern, module)
        if found and leaf in _LEAVES:
            return f"{target(*found.groups())}.{leaf}"
    return None


def _stage(layer: str) -> str:
    return f"{_BOTTOM_UP}.res{int(layer) + 1}"


def reason_to_drop(name: str) -> str | None:
    return next((reason for pattern, reason in _DROPPED if re.fullmatch(pattern, name)), None)


def last_background(weights: Weights, *, coco: bool) -> str:
    """Put the rows of the classes into detectron2's order, in place; return a note about it.

    K + 1 rows, background first, become K (boxes, masks), or K + 1 with the background last (scores).

    Raises:
        ConversionError: there are no scores or boxes of classes, or their numbers differ.
    """
    if f"{_SCORES}.weight" not in weights:
        raise ConversionError(
            "INPUT has no roi_heads.box_predictor.cls_score.weight: it is not a Faster, Mask or Keypoint "
            "R-CNN of torchvision"
        )
    rows = len(weights[f"{_SCORES}.weight"])
    is_coco = coco and rows == COCO_ROWS
    foreground = COCO_IDS if is_coco else list(range(1, rows))
    orders = {
        _SCORES: [*foreground, 0],
        _BOXES: [4 * row + side for row in foreground for side in range(4)],
        _MASKS: foreground,
    }
    names = [f"{layer}.{leaf}" for layer in orders for leaf in ("weight", "bias")]
    changes = {}
    for name in [name for name in names if name in weights]:
        layer, found = name.rpartition(".")[0], len(weights[name])
        if found != rows * (4 if layer == _BOXES else 1) or rows < 2:
            raise ConversionError(
                f"INPUT's {name} has {found} rows, but cls_score.weight has {rows}; expected 2 or more, "
                "the background and a class, equally many of masks, and 4 times as many of boxes"
            )
        weights[name] = weights[name][orders[layer]]
        changes[layer] = f"{layer} {found} -> {len(weights[name])}"
    kind = "COCO's" if is_coco else f"all {len(foreground)}"
    return f"classes: {kind}, background last; rows of {', '.join(changes.values())}"


def match_eps(weights: Weights, frozen_bn_eps: float) -> tuple[list[str], str]:
    """Make frozen batch norms of detectron2, with its eps, equal those of the input, in place.

    Norms with a counter are ordinary ones, whose eps is detectron2's already; outside the bottleneck
    they are frozen by detectron2, and their counters removed.

    Returns:
        the removed counters, by detectron2's names; a note about what was changed.
    """
    counters = []
    shifted = ordinary = 0
    for name in [name for name in weights if name.endswith(".running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        if name.startswith((f"{_BOTTLENECK}.encoder.", f"{_BOTTLENECK}.decoder.")):
            ordinary += 1
        elif counter in weights:
            ordinary += 1
            counters.append(counter)
            del weights[counter]
        else:
            shifted += 1
            # In double precision: variances may be as small as eps.
            variance = weights[name].double() + (frozen_bn_eps - DETECTRON2_EPS)
            weights[name] = variance.to(torch.float32)
    difference = f"{frozen_bn_eps:g} - {DETECTRON2_EPS:g}"
    note = f"eps: {difference} was added to running_var of {shifted} frozen batch norms"
    return counters, f"{note}; {ordinary} ordinary ones stay as they are"


def infer_keys(weights: Weights) -> dict[str, Any]:
    """The config keys that follow from the weights, by detectron2's names and in its class order.

    Raises:
        ConversionError: the ResNet or the bottleneck cannot be built.
    """
    keypoints = weights.get(f"{_KEYPOINTS}.weight")
    keys = {
        "MODEL.MASK_ON": f"{_MASKS}.weight" in weights,
        "MODEL.KEYPOINT_ON": keypoints is not None,
        "MODEL.ROI_HEADS.NUM_CLASSES": len(weights[f"{_SCORES}.weight"]) - 1,
        "MODEL.RESNETS.DEPTH": infer_depth(weights),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": weights[f"{_BOTTOM_UP}.res3.0.conv1.weight"].shape[1],
    }
    if keypoints is not None:
        keys["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = keypoints.shape[1]
    if any(name.startswith(f"{_BOTTLENECK}.encoder.") for name in weights):
        keys.update(infer_bottleneck(weights))
    return keys


def infer_depth(weights: Weights) -> int:
    # res2 may be a bottleneck.
    pattern = re.compile(rf"{re.escape(_BOTTOM_UP)}\.res([345])\.\d+\.conv1\.weight")
    stages = [found[1] for found in map(pattern.fullmatch, weights) if found]
    blocks = (stages.count("3"), stages.count("4"), stages.count("5"))
    three = f"{_BOTTOM_UP}.res3.0.conv3.weight" in weights
    if (*blocks, three) not in DEPTHS:
        raise ConversionError(
            f"INPUT's ResNet has {blocks} blocks of {3 if three else 2} convolutions in layer2 to "
            f"layer4; expected a ResNet-{', '.join(map(str, DEPTHS.values()))}"
        )
    return DEPTHS[(*blocks, three)]


def infer_bottleneck(weights: Weights) -> dict[str, Any]:
    layers = ("encoder.0", "encoder.2", "encoder.5", "encoder.7", "decoder.2", "decoder.4")
    names = [f"{_BOTTLENECK}.{layer}.weight" for layer in layers]
    missing = [name for name in names if name not in weights]
    if missing:
        raise ConversionError(
            f"INPUT's bottleneck is not the one of GHND (2020): it lacks {listing(missing)}"
        )
    *encoder, channels, first, second = (len(weights[name]) for name in names)
    return {
        "MODEL.BACKBONE.NAME": "build_bottleneck_backbone",
        "MODEL.BOTTLENECK.CHANNELS": channels,
        "MODEL.BOTTLENECK.ENCODER_WIDTHS": encoder,
        "MODEL.BOTTLENECK.DECODER_WIDTHS": [first, second],
    }


def packaged_config(keys: dict[str, Any]) -> str:
    return _config_name(detector_kind(keys), student=is_student(keys))


def _config_name(kind: str, *, student: bool) -> str:
    detector = f"torchvision_{kind}_rcnn_R_50_FPN"
    return f"Distillation-GHND/{detector}_ghnd.yaml" if student else f"Teachers/{detector}.yaml"


def detector_kind(keys: dict[str, Any]) -> str:
    if keys["MODEL.KEYPOINT_ON"]:
        return "keypoint"
    return "mask" if keys["MODEL.MASK_ON"] else "faster"


def is_student(keys: dict[str, Any]) -> bool:
    return "MODEL.BOTTLENECK.CHANNELS" in keys


def complete_config(
    config_file: str, opts: list[str], keys: dict[str, Any]
) -> tuple[CfgNode, list[str]]:
    """The config of the detector, and the KEY VALUE pairs that make it of ``config_file``.

    Args:
        opts: KEY VALUE pairs of the user, which win over ``keys``.

    Raises:
        ConversionError, OSError, ValueError: there is no such config or key, or a value does not fit.
    """
    inferred = []
    try:
        cfg = student_config(load_config(config_file, opts))
        for key, value in keys.items():
            if key not in opts[::2] and functools.reduce(getattr, key.split("."), cfg) != value:
                inferred += [key, str(value)]
        cfg.merge_from_list(inferred)
    except (KeyError, AssertionError) as error:
        raise ConversionError(f"the config does not load: {error.args[0]}") from error
    return cfg, [*inferred, *opts]


def print_summary(converted: Converted) -> None:
    keys = converted.keys
    detector = f"{detector_kind(keys).capitalize()} R-CNN R{keys['MODEL.RESNETS.DEPTH']}-FPN"
    if is_student(keys):
        detector += f", GHND's student with {keys['MODEL.BOTTLENECK.CHANNELS']} bottleneck channels"
    print(f"{detector}: {len(converted.weights)} tensors converted, all that the detector has")
    for reason, names in converted.dropped.items():
        print(f"  dropped {len(names)} ({reason}): {listing(names, 5)}")
    for note in converted.notes:
        print(f"  {note}")


def print_command(path: str, config_file: str, opts: list[str], keys: dict[str, Any]) -> None:
    command = ["distill-d2", "evaluate", "--config-file", config_file]
    command += ["MODEL.WEIGHTS", path, *opts]
    print(f"Wrote {path}. To evaluate it:\n  {shlex.join(command)}")
    if "MODEL.ROI_HEADS.NUM_CLASSES" in opts[::2] and "DATASETS.TEST" not in opts[::2]:
        print("  with DATASETS.TEST, a dataset of its classes in their order, from DATASETS.CUSTOM")
