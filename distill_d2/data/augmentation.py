"""SSD's augmentations and images of one fixed size, for any detector: INPUT.AUGMENTATIONS, FIXED_SIZE.

torchvision's v2 transforms draw what happens, from torch's generator, which a checkpoint holds and which
is seeded in each worker; detectron2's and fvcore's transforms apply it, to polygons too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.registry import Registry
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform
from torchvision import tv_tensors
from torchvision.transforms import v2

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
DATASET_MAPPER_REGISTRY.__doc__ = """Mappers, chosen by INPUT.MAPPER: classes or functions of (cfg, is_train)
that return a function from a dataset dict to an input of the model."""

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = """Functions from a config to a list of detectron2's augmentations, chosen by
INPUT.AUGMENTATIONS. They come first in training; an augmentation may ask for ``boxes``."""

_IGNORED = 255  # of semantic segmentation
_TRIES = 50
_SMALLEST = 4  # pixels of a side; a crop of 0.3 times less may be empty


class PhotometricDistortion(T.Augmentation):
    """torchvision's RandomPhotometricDistort (Liu et al., SSD, section 2.2, "Data augmentation"): random
    brightness, contrast, saturation, hue and order of the channels, each with probability 0.5."""

    def __init__(self, input_format: str = "BGR"):
        """
        Args:
            input_format: order of the images' channels, "BGR" or "RGB".
        """
        super().__init__()
        self.step = -1 if input_format == "BGR" else 1
        self.distort = v2.RandomPhotometricDistort()

    def get_transform(self, image: np.ndarray) -> Transform:
        """The distortion of this image (H, W, 3), uint8."""
        rgb = torch.from_numpy(image[..., :: self.step].transpose(2, 0, 1).copy())
        changed = np.ascontiguousarray(self.distort(rgb).permute(1, 2, 0).numpy()[..., :: self.step])
        return T.ColorTransform(lambda _: changed)


class ExpandTransform(Transform):
    """Put an image (H, W, C) somewhere on a larger canvas of one color."""

    def __init__(self, left: int, top: int, height: int, width: int, fill: Sequence[float]):
        """
        Args:
            left: where the image's first column is on the canvas, in pixels.
            top: where its first row is.
            height: of the canvas, in pixels.
            width: of the canvas.
            fill: the color, one number per channel.
        """
        super().__init__()
        self.left, self.top, self.height, self.width, self.fill = left, top, height, width, fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        canvas = np.empty((self.height, self.width, *img.shape[2:]), dtype=img.dtype)
        canvas[...] = np.asarray(self.fill).round() if img.ndim == 3 else 0
        return self._place(img, canvas)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        canvas = np.full((self.height, self.width), _IGNORED, dtype=segmentation.dtype)
        return self._place(segmentation, canvas)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords + np.asarray([self.left, self.top], dtype=coords.dtype)

    def _place(self, image: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        canvas[self.top : self.top + height, self.left : self.left + width] = image
        return canvas


class Expand(T.Augmentation):
    """torchvision's RandomZoomOut: with probability 0.5 the image is put somewhere on a canvas of up to
    ``max_ratio`` times its sides."""

    def __init__(self, max_ratio: float = 4.0, fill: Sequence[float] = (127.0, 127.0, 127.0)):
        super().__init__()
        self.zoom_out = v2.RandomZoomOut(side_range=(1.0, max_ratio))
        self.fill = list(fill)

    def get_transform(self, image: np.ndarray) -> Transform:
        """For an image (H, W, C)."""
        size = image.shape[:2]
        placed = self.zoom_out(_boxes([[0, 0, size[1], size[0]]], size))
        if tuple(placed.canvas_size) == size:
            return NoOpTransform()
        left, top = placed[0, :2].int().tolist()
        height, width = placed.canvas_size
        return ExpandTransform(left, top, height, width, self.fill)


class CropToCenters(CropTransform):
    """A crop that drops the boxes whose centers are outside: they become empty."""

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        box = np.asarray(box, dtype=np.float64).reshape(-1, 4)
        centers = (box[:, :2] + box[:, 2:]) / 2 - [self.x0, self.y0]
        inside = np.all((centers > 0) & (centers < [self.w, self.h]), axis=1)
        cropped = super().apply_box(box).clip(0, [self.w, self.h, self.w, self.h])
        return np.where(inside[:, None], cropped, 0.0)


class RandomCropByIoU(T.Augmentation):
    """torchvision's RandomIoUCrop: the whole image, or a patch, free or with an IoU above a limit with
    some object whose center is inside.

    Patches have sides of 0.3 to 1 times the image's, an aspect ratio of 0.5 to 2, and the center of some
    object inside. All choices are equally likely; if 50 tries find none, another choice is drawn.
    """

    def __init__(self, min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)):
        super().__init__()
        # 1.0 stands for the whole image.
        self.crop = v2.RandomIoUCrop(sampler_options=[0.0, *min_ious, 1.0], trials=_TRIES)

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> Transform:
        """For an image (H, W, C) and its objects' boxes (M, 4), absolute XYXY."""
        height, width = image.shape[:2]
        if not len(boxes) or min(height, width) < _SMALLEST:
            return NoOpTransform()
        # Cropping an image of pixel coordinates shows where the patch is.
        columns = tv_tensors.Image(torch.arange(width).expand(1, height, width))
        rows = tv_tensors.Image(torch.arange(height)[:, None].expand(1, height, width))
        columns, rows, _ = self.crop(columns, rows, _boxes(boxes, (height, width)))
        h, w = rows.shape[1:]
        if (h, w) == (height, width):
            return NoOpTransform()
        return CropToCenters(int(columns[0, 0, 0]), int(rows[0, 0, 0]), w, h, width, height)


def _boxes(boxes: Any, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(
        torch.as_tensor(boxes, dtype=torch.float64),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=size,
    )


class BoxAwareMapper(DatasetMapper):
    """detectron2's mapper, whose augmentations may also look at the objects' boxes."""

    augmentations: T.AugmentationList

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        boxes = [
            BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
            for item in dataset_dict.get("annotations", ())
            if not item.get("iscrowd", 0)
        ]
        self.augmentations = _WithBoxes(self.augmentations.augs, np.asarray(boxes, float).reshape(-1, 4))
        return super().__call__(dataset_dict)


class _WithBoxes(T.AugmentationList):
    def __init__(self, augmentations: Sequence[T.Augmentation], boxes: np.ndarray):
        super().__init__(augmentations)
        self.boxes = boxes

    def __call__(self, aug_input: T.AugInput) -> Transform:
        aug_input.boxes = self.boxes
        return super().__call__(aug_input)


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict[str, Any]], Any]:
    """The mapper that INPUT.MAPPER names, or detectron2's with the augmentations of INPUT.

    Raises:
        ValueError: a value of INPUT is out of range; the message names its key.
    """
    if cfg.INPUT.MAPPER:
        _check_registered(DATASET_MAPPER_REGISTRY, "INPUT.MAPPER", cfg.INPUT.MAPPER, "''")
        return DATASET_MAPPER_REGISTRY.get(cfg.INPUT.MAPPER)(cfg, is_train)
    cfg = _merge_flip_keys(cfg)
    kind, size = cfg.INPUT.AUGMENTATIONS, list(cfg.INPUT.FIXED_SIZE)
    if kind != "default":
        _check_registered(AUGMENTATION_REGISTRY, "INPUT.AUGMENTATIONS", kind, "'default'")
    if size and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"INPUT.FIXED_SIZE is {size}; expected [height, width], or [] for none")
    if kind == "default" and not size:
        return DatasetMapper(cfg, is_train)
    resize, *others = detection_utils.build_augmentation(cfg, is_train)
    if size:
        resize = T.Resize(size)
    if not is_train:
        return DatasetMapper(cfg, is_train, augmentations=[resize, *others])
    crop = cfg.INPUT.CROP
    crops = [T.RandomCrop(crop.TYPE, crop.SIZE)] if crop.ENABLED else []
    if kind == "default":
        return DatasetMapper(cfg, is_train, augmentations=[*crops, resize, *others])
    first = AUGMENTATION_REGISTRY.get(kind)(cfg)
    return BoxAwareMapper(cfg, is_train, augmentations=[*first, *crops, *others, resize])


def _check_registered(registry: Registry, key: str, name: str, default: str) -> None:
    known = [f"'{known}'" for known, _ in registry]
    if name not in registry:
        raise ValueError(f"{key} is '{name}'; expected {' or '.join([default, *known])}")


def _merge_flip_keys(cfg: CfgNode) -> CfgNode:
    """A config in which RANDOM_FLIP alone decides whether images are flipped."""
    if cfg.INPUT.IS_ROTATE:
        raise ValueError("INPUT.IS_ROTATE is True; images are not rotated here, set it to False")
    if cfg.INPUT.HFLIP_TRAIN:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.RANDOM_FLIP = "none"
    return cfg


@AUGMENTATION_REGISTRY.register()
def ssd(cfg: CfgNode) -> list[T.Augmentation]:
    """Photometric distortion, expansion and a random crop, with the settings of INPUT.SSD.

    Raises:
        ValueError: another key asks for a second crop or bit masks, or a setting is out of range.
    """
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            "INPUT.CROP.ENABLED is True, but INPUT.AUGMENTATIONS 'ssd' has a crop of its own; set the first "
            "to False, or the second to 'default'"
        )
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask":
        raise ValueError(
            "INPUT.AUGMENTATIONS is 'ssd', which expands polygons but not bit masks; set INPUT.MASK_FORMAT to "
            "'polygon', or AUGMENTATIONS to 'default'"
        )
    node = cfg.INPUT.SSD
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ValueError(
            f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}'; INPUT.AUGMENTATIONS 'ssd' needs 'BGR' or 'RGB'"
        )
    if node.EXPAND_MAX_RATIO < 1:
        raise ValueError(
            f"INPUT.SSD.EXPAND_MAX_RATIO is {node.EXPAND_MAX_RATIO}; expected at least 1 (1: no expansion)"
        )
    return [
        PhotometricDistortion(cfg.INPUT.FORMAT),
        Expand(node.EXPAND_MAX_RATIO, cfg.MODEL.PIXEL_MEAN),
        RandomCropByIoU(node.CROP_MIN_IOUS),
    ]
