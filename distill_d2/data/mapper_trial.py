"""Run the mapper of a training on a sample of its records before the first step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch

from .sample import has, objects, varied_sample

_IMAGES = 24


@dataclass(frozen=True)
class MapperNeeds:
    """What the model needs of a training mapper's output.

    Attributes:
        instances: objects with boxes and classes.
        masks, keypoints: of the objects.
        segmentation: the class of each pixel.
        num_keypoints: of each object.
        channels: of the images: the length of MODEL.PIXEL_MEAN. None: not known.
        num_classes: of the dataset; None: not known.
        masks_read: whether the mapper reads masks (MODEL.MASK_ON), needed or not.
        mask_format: INPUT.MASK_FORMAT.
    """

    instances: bool = True
    masks: bool = False
    keypoints: bool = False
    segmentation: bool = False
    num_keypoints: int = 17
    channels: int | None = None
    num_classes: int | None = None
    masks_read: bool = False
    mask_format: str = "bitmask"


def try_mapper(
    name: str,
    records: Sequence[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], Any],
    needs: MapperNeeds,
    most: int = _IMAGES,
) -> None:
    """Give records of every kind to a training mapper, and check that its output has what the model needs.

    Args:
        name: of the dataset.
        records: its detectron2 dicts, those that are trained on.
        most: records that are given, 24 at most.

    Raises:
        ValueError: the mapper fails, or its output lacks something; the message names the image and the key.
    """
    sample, given = varied_sample(records, min(most, _IMAGES)), 0
    for record in sample:
        try:
            output = mapper(copy.deepcopy(record))
        except Exception as error:  # a mapper may raise anything
            problem = _missing(name, records, record, needs) or f"{type(error).__name__}: {error}"
            raise ValueError(f"the mapper cannot use {_image(name, record)}: {problem}") from error
        if output is None:  # detectron2's loader then takes another image
            continue
        given += 1
        problem = _problem(name, records, record, output, needs)
        if problem:
            raise ValueError(f"the mapper's output for {_image(name, record)} {problem}")
    if sample and not given:
        raise ValueError(f"the mapper returns None for all of {len(sample)} images of dataset '{name}'")


def _image(name: str, record: dict[str, Any]) -> str:
    return f"'{record.get('file_name')}' of dataset '{name}'"


def _problem(
    name: str, records: Sequence[dict[str, Any]], record: dict[str, Any], output: Any, needs: MapperNeeds
) -> str:
    """What the output lacks; "" if nothing."""
    image = output.get("image") if isinstance(output, dict) else None
    if not isinstance(image, torch.Tensor) or image.dim() != 3:
        return "has no 'image', a tensor (C, H, W) (INPUT.MAPPER)"
    if needs.channels not in (None, len(image)):
        return (
            f"has {len(image)} channels, but MODEL.PIXEL_MEAN has {needs.channels} numbers: INPUT.FORMAT, "
            "PIXEL_MEAN and PIXEL_STD must agree (three for BGR and RGB, one for L)"
        )
    if not needs.instances:
        return ""
    if needs.segmentation and "sem_seg" not in output:
        return (
            f"has no 'sem_seg', on which a PanopticFPN is trained: the records of dataset '{name}' need a "
            "'sem_seg_file_name', as those of coco_2017_train_panoptic_separated have; without, set "
            "MODEL.META_ARCHITECTURE to 'GeneralizedRCNN'"
        )
    if "instances" not in output:
        return "has no 'instances', the ground truth that the model is trained on (INPUT.MAPPER)"
    return _problem_of_instances(name, records, record, output["instances"], needs)


def _problem_of_instances(
    name: str, records: Sequence[dict[str, Any]], record: dict[str, Any], found: Any, needs: MapperNeeds
) -> str:
    if not len(found):
        return ""
    for field in ("gt_boxes", "gt_classes"):
        if not found.has(field):
            return f"has objects without {field} (INPUT.MAPPER)"
    classes = found.gt_classes
    if needs.num_classes and not 0 <= int(classes.min()) <= int(classes.max()) < needs.num_classes:
        return (
            f"has objects of the classes {sorted(set(classes.tolist()))}; dataset '{name}' has "
            f"{needs.num_classes} classes, counted from 0"
        )
    if needs.masks and not found.has("gt_masks"):
        return f"has no masks, which the model is trained on{_hint(name, records, record, needs)}"
    if needs.keypoints and not found.has("gt_keypoints"):
        return f"has no keypoints, which the model is trained on{_hint(name, records, record, needs)}"
    count = found.gt_keypoints.tensor.shape[1] if needs.keypoints else needs.num_keypoints
    if count != needs.num_keypoints:
        return (
            f"has {count} keypoints per object, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
            f"{needs.num_keypoints}; set it to {count}, and TEST.KEYPOINT_OKS_SIGMAS to as many numbers"
        )
    return ""


def _hint(*arguments: Any) -> str:
    text = _missing(*arguments)
    return f": {text}" if text else ""


def _missing(
    name: str, records: Sequence[dict[str, Any]], record: dict[str, Any], needs: MapperNeeds
) -> str:
    """What the annotations of ``record`` lack, with the key that helps; "" if nothing is known to be."""
    items, size = objects(record), [record.get("height"), record.get("width")]
    masks = [item.get("segmentation") for item in items]
    if needs.masks_read and needs.mask_format == "polygon" and any(_is_bits(mask) for mask in masks):
        count = _count(records, lambda item: _is_bits(item.get("segmentation")))
        return f"dataset '{name}' has {count} masks in RLE; set INPUT.MASK_FORMAT to 'bitmask'"
    if (needs.masks or needs.masks_read) and any(_is_empty(mask) for mask in masks):
        count = _count(records, lambda item: _is_empty(item.get("segmentation")))
        return (
            f"{count} of {_count(records)} objects of dataset '{name}' have no segmentation; a detector of masks "
            "needs one for each object, others need MODEL.MASK_ON False"
        )
    if needs.keypoints and not all(has(item, "keypoints") for item in items):
        count = _count(records, lambda item: not has(item, "keypoints"))
        return (
            f"{count} of {_count(records)} objects of dataset '{name}' have no keypoints; set MODEL.KEYPOINT_ON "
            "to False, or use a dataset with keypoints"
        )
    wrong = [
        list(mask["size"]) for mask in masks if isinstance(mask, dict) and list(mask["size"]) != size
    ]
    if needs.masks_read and wrong:
        return f"a mask in RLE has the size {wrong[0]}, the image {size} (height, width)"
    if any(isinstance(item.get("bbox"), np.ndarray) for item in items):
        return "a bbox is a numpy array; detectron2 reads lists of numbers (bbox.tolist())"
    if needs.masks and not needs.masks_read:
        return "MODEL.MASK_ON is False; set it to True"
    return ""


def _count(records: Sequence[dict[str, Any]], holds: Callable[[Any], bool] = bool) -> int:
    return sum(holds(item) for record in records for item in objects(record))


def _is_bits(mask: Any) -> bool:
    return mask is not None and not isinstance(mask, list)


def _is_empty(mask: Any) -> bool:
    return mask is None or (isinstance(mask, (list, dict)) and not mask)
