"""SSD's augmentations, and images of one fixed size, for any detector: INPUT.AUGMENTATIONS, FIXED_SIZE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.registry import Registry
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
DATASET_MAPPER_REGISTRY.__doc__ = """Mappers, chosen by INPUT.MAPPER: classes or functions of (cfg, is_train)
that return a function from a dataset dict to an input of the model."""

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = """Functions from a config to a list of detectron2's augmentations, chosen by
INPUT.AUGMENTATIONS. They come first in training; an augmentation may ask for ``boxes``."""

_IGNORED = 255  # of semantic segmentation
_HUE_DEGREES = 18.0
_TRIES = 50


class PhotometricDistortion(T.Augmentation):
    """Random brightness, contrast, saturation, hue and order of channels (Liu et al., SSD; as its PyTorch
    versions do): each with probability 0.5, contrast before or after the two of HSV."""

    def __init__(self, input_format: str = "BGR"):
        """
        Args:
            input_format: order of the images' channels, "BGR" or "RGB".
        """
        super().__init__()
        self.to_hsv, self.from_hsv = _HSV[input_format]

    def get_transform(self, image: np.ndarray) -> Transform:
        """For an image (H, W, 3), uint8."""
        steps: list[Callable[[np.ndarray], np.ndarray]] = []
        if _coin():
            brightness = np.random.uniform(-32, 32)
            steps.append(lambda x: x + np.float32(brightness))
        contrast, first = np.random.uniform(0.5, 1.5) if _coin() else 1.0, _coin()
        saturation = np.random.uniform(0.5, 1.5) if _coin() else 1.0
        hue = np.random.uniform(-_HUE_DEGREES, _HUE_DEGREES) if _coin() else 0.0
        colours = [
            lambda x: x * np.float32(contrast),
            lambda x: self._change_hsv(x, saturation, hue),
        ]
        steps += colours if first else reversed(colours)
        if _coin():
            order = np.random.permutation(3)
            steps.append(lambda x: x[..., order])
        return T.ColorTransform(lambda image: _apply(steps, image))

    def _change_hsv(self, image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
        if saturation == 1.0 and hue == 0.0:
            return image
        hsv = cv2.cvtColor(
            image.clip(0, 255), self.to_hsv
        )  # of float32: hue in degrees, saturation 0 to 1
        hsv[..., 0] = (hsv[..., 0] + hue) % 360
        hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 1)
        return cv2.cvtColor(hsv, self.from_hsv)


_HSV = {
    "BGR": (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR),
    "RGB": (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB),
}


def _coin() -> bool:
    return np.random.rand() < 0.5


def _apply(steps: Sequence[Callable], image: np.ndarray) -> np.ndarray:
    changed = image.astype(np.float32)
    for step in steps:
        changed = step(changed)
    return changed.round().clip(0, 255).astype(image.dtype)


class ExpandTransform(Transform):
    """Put an image (H, W, C) somewhere on a larger canvas of one colour."""

    def __init__(self, left: int, top: int, height: int, width: int, fill: Sequence[float]):
        """
        Args:
            left, top: where; height, width: of the canvas, in pixels.
            fill: the colour, one number per channel.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        canvas = np.empty((self.height, self.width, *image.shape[2:]), dtype=image.dtype)
        canvas[...] = np.asarray(self.fill).round() if image.ndim == 3 else 0
        return self._place(image, canvas)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        canvas = np.full((self.height, self.width), _IGNORED, dtype=segmentation.dtype)
        return self._place(segmentation, canvas)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords + np.asarray([self.left, self.top], dtype=coords.dtype)

    def inverse(self) -> Transform:
        raise NotImplementedError("ExpandTransform: not needed, it is for training")

    def _place(self, image: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        canvas[self.top : self.top + height, self.left : self.left + width] = image
        return canvas


class Expand(T.Augmentation):
    """With probability 0.5, zoom out: the image somewhere on a canvas of up to ``max_ratio`` times its sides."""

    def __init__(self, max_ratio: float = 4.0, fill: Sequence[float] = (127.0, 127.0, 127.0)):
        super().__init__()
        self.max_ratio = max_ratio
        self.fill = list(fill)

    def get_transform(self, image: np.ndarray) -> Transform:
        if not _coin():
            return NoOpTransform()
        height, width = image.shape[:2]
        ratio = np.random.uniform(1, self.max_ratio)
        left, top = np.random.uniform(0, width * (ratio - 1)), np.random.uniform(0, height * (ratio - 1))
        return ExpandTransform(
            int(left), int(top), int(np.ceil(height * ratio)), int(np.ceil(width * ratio)), self.fill
        )


class CropToCentres(CropTransform):
    """A crop that drops the boxes whose centres are outside: they become empty."""

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        box = np.asarray(box, dtype=np.float64).reshape(-1, 4)
        inside = _centres_inside(box, (self.x0, self.y0, self.x0 + self.w, self.y0 + self.h))
        cropped = super().apply_box(box)
        cropped = cropped.clip(0, [self.w, self.h, self.w, self.h])
        return np.where(inside[:, None], cropped, 0.0)


class RandomCropByIoU(T.Augmentation):
    """SSD's crop: the whole image, or a patch, free or of which some object has an IoU above a limit.

    Patches have sides of 0.3 to 1 times the image's, an aspect ratio of 0.5 to 2, and the centre of some
    object inside. All choices are equally likely; if 50 tries find none, another choice is drawn.
    """

    def __init__(self, min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)):
        super().__init__()
        self.choices: list[float | None] = [None, 0.0, *min_ious]

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> Transform:
        """For an image (H, W, C) and its objects' boxes (M, 4), absolute XYXY."""
        height, width = image.shape[:2]
        while True:
            limit = self.choices[np.random.randint(len(self.choices))]
            if limit is None or not len(boxes):
                return NoOpTransform()
            for _ in range(_TRIES):
                patch = _random_patch(height, width)
                if patch and _fits(patch, boxes, limit):
                    x1, y1, x2, y2 = patch
                    return CropToCentres(x1, y1, x2 - x1, y2 - y1, width, height)


def _random_patch(height: int, width: int) -> tuple[int, int, int, int] | None:
    w, h = np.random.uniform(0.3, 1) * width, np.random.uniform(0.3, 1) * height
    if not 0.5 <= h / w <= 2 or min(w, h) < 1:
        return None
    left, top = np.random.uniform(0, width - w), np.random.uniform(0, height - h)
    return int(left), int(top), int(left + w), int(top + h)


def _fits(patch: tuple[int, int, int, int], boxes: np.ndarray, limit: float) -> bool:
    if min(patch[2] - patch[0], patch[3] - patch[1]) < 1:
        return False
    return _iou(patch, boxes).max() >= limit and _centres_inside(boxes, patch).any()


def _iou(patch: Sequence[float], boxes: np.ndarray) -> np.ndarray:
    sides = np.minimum(patch[2:], boxes[:, 2:]) - np.maximum(patch[:2], boxes[:, :2])
    common = sides.clip(0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    area = (patch[2] - patch[0]) * (patch[3] - patch[1])
    return common / (area + areas - common)


def _centres_inside(boxes: np.ndarray, patch: Sequence[float]) -> np.ndarray:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > patch[:2]) & (centres < patch[2:])).all(axis=1)


class BoxAwareMapper(DatasetMapper):
    """detectron2's mapper, whose augmentations may also look at the objects' boxes."""

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
        ValueError: INPUT.MAPPER, AUGMENTATIONS, FIXED_SIZE, CROP, MASK_FORMAT or IS_ROTATE is wrong.
    """
    if cfg.INPUT.MAPPER:
        _check_registered(DATASET_MAPPER_REGISTRY, "INPUT.MAPPER", cfg.INPUT.MAPPER, "''")
        return DATASET_MAPPER_REGISTRY.get(cfg.INPUT.MAPPER)(cfg, is_train)
    cfg = _heed_flip_keys(cfg)
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


def _heed_flip_keys(cfg: CfgNode) -> CfgNode:
    """A config that says in RANDOM_FLIP alone whether images are flipped."""
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
        ValueError: another key asks for a second crop, or for bit masks.
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
    return [
        PhotometricDistortion(cfg.INPUT.FORMAT),
        Expand(node.EXPAND_MAX_RATIO, cfg.MODEL.PIXEL_MEAN),
        RandomCropByIoU(node.CROP_MIN_IOUS),
    ]
