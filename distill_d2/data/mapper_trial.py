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
    trial = _Trial(name, records, needs)
    sample, given = varied_sample(records, min(most, _IMAGES)), 0
    for record in sample:
        image = f"'{record.get('file_name')}' of dataset '{name}'"
        try:
            output = mapper(copy.deepcopy(record))
        except Exception as error:  # a mapper may raise anything
            problem = trial.missing(record) or f"{type(error).__name__}: {error}"
            raise ValueError(f"the mapper cannot use {image}: {problem}") from error
        if output is None:  # detectron2's loader then takes another image
            continue
        given += 1
        problem = trial.problem(record, output)
        if problem:
            raise ValueError(f"the mapper's output for {image} {problem}")
    if sample and not given:
        raise ValueError(f"the mapper returns None for all of {len(sample)} images of dataset '{name}'")


@dataclass(frozen=True)
class _Trial:
    """The records of a dataset, and what the model needs of them."""

    name: str
    records: Sequence[dict[str, Any]]
    needs: MapperNeeds

    def problem(self, record: dict[str, Any], output: Any) -> str:
        """What the output lacks; "" if nothing."""
        needs = self.needs
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
                f"has no 'sem_seg', on which a PanopticFPN is trained: the records of dataset '{self.name}' need "
                "a 'sem_seg_file_name', as those of coco_2017_train_panoptic_separated have; without, set "
                "MODEL.META_ARCHITECTURE to 'GeneralizedRCNN'"
            )
        if "instances" not in output:
            return "has no 'instances', the ground truth that the model is trained on (INPUT.MAPPER)"
        return self._problem_of_instances(record, output["instances"])

    def _problem_of_instances(self, record: dict[str, Any], found: Any) -> str:
        needs = self.needs
        if not len(found):
            return ""
        for field in ("gt_boxes", "gt_classes"):
            if not found.has(field):
                return f"has objects without {field} (INPUT.MAPPER)"
        classes = found.gt_classes
        if needs.num_classes and not 0 <= int(classes.min()) <= int(classes.max()) < needs.num_classes:
            return (
                f"has objects of the classes {sorted(set(classes.tolist()))}; dataset '{self.name}' has "
                f"{needs.num_classes} classes, counted from 0"
            )
        for needed, what in ((needs.masks, "masks"), (needs.keypoints, "keypoints")):
            if needed and not found.has(f"gt_{what}"):
                hint = self.missing(record)
                return f"has no {what}, which the model is trained on{hint and ': '}{hint}"
        count = found.gt_keypoints.tensor.shape[1] if needs.keypoints else needs.num_keypoints
        if count != needs.num_keypoints:
            return (
                f"has {count} keypoints per object, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
                f"{needs.num_keypoints}; set it to {count}, and TEST.KEYPOINT_OKS_SIGMAS to as many numbers"
            )
        return ""

    def missing(self, record: dict[str, Any]) -> str:
        """What the annotations of ``record`` lack, with the key that helps; "" if nothing is known to be."""
        needs, items, size = self.needs, objects(record), [record.get("height"), record.get("width")]
        masks = [item.get("segmentation") for item in items]
        if needs.masks_read and needs.mask_format == "polygon" and any(map(_is_bits, masks)):
            count = self._count(lambda item: _is_bits(item.get("segmentation")))
            return f"dataset '{self.name}' has {count} masks in RLE; set INPUT.MASK_FORMAT to 'bitmask'"
        if (needs.masks or needs.masks_read) and not all(has(item, "segmentation") for item in items):
            return (
                f"{self._without('segmentation')}; a detector of masks needs one for each object, others need "
                "MODEL.MASK_ON False"
            )
        if needs.keypoints and not all(has(item, "keypoints") for item in items):
            return f"{self._without('keypoints')}; set MODEL.KEYPOINT_ON to False, or use a dataset with keypoints"
        sizes = [list(mask["size"]) for mask in masks if isinstance(mask, dict)]
        wrong = [found for found in sizes if found != size]
        if needs.masks_read and wrong:
            return f"a mask in RLE has the size {wrong[0]}, the image {size} (height, width)"
        if any(isinstance(item.get("bbox"), np.ndarray) for item in items):
            return "a bbox is a numpy array; detectron2 reads lists of numbers (bbox.tolist())"
        if needs.masks and not needs.masks_read:
            return "MODEL.MASK_ON is False; set it to True"
        return ""

    def _without(self, key: str) -> str:
        lacking = self._count(lambda item: not has(item, key))
        return f"{lacking} of {self._count()} objects of dataset '{self.name}' have no {key}"

    def _count(self, holds: Callable[[Any], bool] = bool) -> int:
        return sum(holds(item) for record in self.records for item in objects(record))


def _is_bits(mask: Any) -> bool:
    return mask is not None and not isinstance(mask, list)
