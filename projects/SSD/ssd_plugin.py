"""SSD: its keys, and what distill_d2 needs to know about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import COUNT, FRACTION, NOT_NEGATIVE, OVERLAP, POSITIVE, Context, Rule, Sequence


def add_ssd_config(cfg: CN) -> None:
    """Add MODEL.SSD, in place. The defaults are those of MobileNetV2-SSDLite and of the VGG16 teacher that
    has its priors; configs/Base-SSD300-VGG16.yaml has those of the original SSD300."""
    cfg.MODEL.SSD = node = CN()
    # Foreground classes.
    node.NUM_CLASSES = 20
    # Height and width of the images in pixels; the augmentations must resize them so (INPUT.FIXED_SIZE).
    node.SIZE = 300
    # Of each level that the head reads: distance of its cells in pixels, ...
    node.STRIDES = [16, 32, 64, 100, 150, 300]
    # ... sides of its first prior box in pixels, and of the second, the square root of the product, ...
    node.MIN_SIZES = [60.0, 105.0, 150.0, 195.0, 240.0, 285.0]
    node.MAX_SIZES = [105.0, 150.0, 195.0, 240.0, 285.0, 330.0]
    # ... and aspect ratios, each and its inverse, of the others.
    node.ASPECT_RATIOS = [[2.0, 3.0]] * 6
    # Depthwise-separable heads (SSDLite), but for the last level.
    node.LITE_HEAD = True
    # Channels of the backbone are those of the paper times this.
    node.WIDTH = 1.0
    # Channels of the extra levels on any other backbone than VGG16 and SSD's MobileNetV2, each half as wide as
    # the one before, from the last stage to the largest stride.
    node.EXTRA_CHANNELS = 256
    # VGG16: read conv4_3 (normalized) as the first level, as the original SSD300 does.
    node.CONV4_3 = False
    # Training: the lowest IoU at which a prior is an object; the number of negatives, the hardest ones, per
    # positive.
    node.IOU_THRESHOLD = 0.5
    node.NEGATIVES_PER_POSITIVE = 3.0
    # Inference: the lowest score, the largest number of candidates per class, and the threshold of
    # non-maximum suppression.
    node.SCORE_THRESH_TEST = 0.01
    node.TOPK_CANDIDATES_TEST = 200
    node.NMS_THRESH_TEST = 0.45


def check_ssd_config(cfg: CN) -> None:
    """Raise ValueError if images are not resized to the one size that an SSD takes."""
    size = cfg.MODEL.SSD.SIZE
    if list(cfg.INPUT.FIXED_SIZE) != [size, size]:
        raise ValueError(
            f"INPUT.FIXED_SIZE is {list(cfg.INPUT.FIXED_SIZE)}, but an SSD takes images of {size}x{size} pixels "
            f"(MODEL.SSD.SIZE); set it to [{size}, {size}]"
        )


def _levels(context: Context) -> list[int]:
    """The number of levels."""
    return [len(context.cfg.MODEL.SSD.STRIDES)]


RULES: dict[str, Rule] = {
    "MODEL.SSD.NUM_CLASSES": COUNT,
    "MODEL.SSD.SIZE": COUNT,
    "MODEL.SSD.STRIDES": Sequence(COUNT, least=1, rising=True),
    "MODEL.SSD.MIN_SIZES": Sequence(POSITIVE, count=_levels),
    "MODEL.SSD.MAX_SIZES": Sequence(POSITIVE, count=_levels),
    "MODEL.SSD.ASPECT_RATIOS": Sequence(Sequence(POSITIVE), count=_levels),
    "MODEL.SSD.WIDTH": POSITIVE,
    "MODEL.SSD.EXTRA_CHANNELS": COUNT,
    "MODEL.SSD.IOU_THRESHOLD": OVERLAP,
    "MODEL.SSD.NEGATIVES_PER_POSITIVE": NOT_NEGATIVE,
    "MODEL.SSD.SCORE_THRESH_TEST": FRACTION,
    "MODEL.SSD.TOPK_CANDIDATES_TEST": COUNT,
    "MODEL.SSD.NMS_THRESH_TEST": FRACTION,
}

register_detector(
    Detector(
        "SSD",
        "SSD",
        add_config=add_ssd_config,
        num_classes_key="MODEL.SSD.NUM_CLASSES",
        rules=RULES,
        check=check_ssd_config,
        modules=("distill_d2.projects.ssd",),
        registers=("build_ssd_mobilenet_v2_backbone", "build_ssd_vgg16_backbone"),
        family="distill_d2.projects.ssd.tiny:FAMILY",
    )
)
