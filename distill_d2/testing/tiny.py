"""Detectors and batches small enough for tests that take milliseconds."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import FCOS, build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import nn

from distill_d2 import add_distill_config

CLASSES = 3
#: (height, width) of the images of ``tiny_batch``; three together are padded to 64x80 pixels.
SHAPES = ((48, 80), (64, 56), (56, 64))


def tiny_config(family: str = "retinanet", width: int = 8, channels: int = 16) -> CfgNode:
    """A detector of two levels and more on a SmallResNet, on the CPU.

    Args:
        family: "retinanet" (p2-p4), "faster" or "mask" (R-CNN, p2-p6).
        width: of the stem; stages double it.
        channels: of the FPN.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_STD = [58.0, 58.0, 58.0]
    cfg.MODEL.BACKBONE.NAME = "build_small_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    small = cfg.MODEL.SMALL_RESNET
    small.STEM_WIDTH = width
    small.WIDTHS = [width, 2 * width, 4 * width, 8 * width]
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.BASE_LR = 0.01
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MAX_SIZE_TRAIN = 64
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.SEED = 1
    if family == "retinanet":
        _retinanet(cfg)
    else:
        _rcnn(cfg, masks=family == "mask")
    return cfg


def _retinanet(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16.0], [32.0], [64.0]]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.RETINANET.NUM_CLASSES = CLASSES
    cfg.MODEL.RETINANET.NUM_CONVS = 1


def _rcnn(cfg: CfgNode, masks: bool) -> None:
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.SMALL_RESNET.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SMALL_RESNET.TOP_BLOCK = True
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8.0], [16.0], [32.0], [64.0], [128.0]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 5
    cfg.MODEL.MASK_ON = masks
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7


def tiny_detector(family: str = "retinanet", width: int = 8, channels: int = 16) -> nn.Module:
    """A detector of ``tiny_config``, or "fcos" (p2-p4), which detectron2 builds without a config."""
    if family != "fcos":
        return build_model(tiny_config(family, width, channels))
    cfg = tiny_config("retinanet", width, channels)
    backbone = build_backbone(cfg)
    return FCOS(
        backbone=backbone,
        head=FCOSHead(
            input_shape=list(backbone.output_shape().values()),
            num_classes=CLASSES,
            conv_dims=[channels],
        ),
        head_in_features=["p2", "p3", "p4"],
        num_classes=CLASSES,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def tiny_batch(
    count: int = 2,
    size: int = 64,
    objects: int = 2,
    masks: bool = False,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> list[dict]:
    """Random images of different shapes, landscape and portrait, as a dataset mapper returns them.

    Their common padding is not square, and a teacher that needs multiples of 32 pads further than a
    student that needs multiples of 16: rows and columns cannot be exchanged without an effect.

    Args:
        count: the number of images.
        size: scale of the shapes; at 64 the images have the shapes that ``shapes`` says.
        objects: the number of boxes of each image; they reach into its far half in both directions.
        masks: add polygon masks, the boxes' outlines.
        shapes: (height, width) in pixels, taken in turn.
    """
    generator = torch.Generator().manual_seed(0)
    batch = []
    for height, width in itertools.islice(itertools.cycle(shapes), count):
        shape = (height * size // 64, width * size // 64)
        extent = torch.tensor([shape[1], shape[0]])
        corner = torch.rand(objects, 2, generator=generator) * 0.5 * extent
        side = (0.2 + 0.3 * torch.rand(objects, 2, generator=generator)) * extent
        boxes = torch.cat([corner, corner + side], dim=1)
        instances = Instances(shape)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, CLASSES, (objects,), generator=generator)
        if masks:
            polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for box in boxes]
            instances.gt_masks = PolygonMasks(polygons)
        image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances, "height": shape[0], "width": shape[1]})
    return batch


def save_teacher(cfg: CfgNode, folder: Path) -> str:
    """Write the config and random weights of a teacher; the path of its yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(folder / "teacher.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    path = folder / "teacher.yaml"
    path.write_text(short_yaml(cfg))
    return str(path)


def short_yaml(cfg: CfgNode) -> str:
    """A config as a user writes it: the keys whose values are not the defaults. Reading all of them takes as
    long as a tiny training."""
    default = get_cfg()
    add_distill_config(default)
    changed = _changes(cfg, default)
    changed.VERSION = cfg.VERSION
    return CfgNode(changed).dump()


def _changes(cfg: CfgNode, default: CfgNode) -> CfgNode:
    changed = CfgNode()
    for name, value in cfg.items():
        known = default.get(name)
        if isinstance(value, CfgNode) and isinstance(known, CfgNode):
            value, known = _changes(value, known), CfgNode()
        if name not in default or repr(value) != repr(known):  # 1 is not 1.0
            changed[name] = value
    return changed


def distiller_config(student: CfgNode, teacher_yaml: str, types=("PKD",)) -> CfgNode:
    """The student's config, wrapped in the Distiller."""
    cfg = student.clone()
    node = cfg.MODEL.DISTILLER
    node.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    node.MODEL_LOAD_OFFICIAL = False
    node.MODEL_DISTILLER_CONFIG = teacher_yaml
    node.TYPES = list(types)
    node.PRELOAD_FPN = node.PRELOAD_HEAD = False
    return cfg


def write_dataset(folder: Path, count: int = 6) -> dict:
    """Write ``count`` images with two boxes each as a COCO dataset; its DATASETS.CUSTOM entry."""
    images: list[dict] = []
    annotations: list[dict] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for index in range(count):
        height, width = (48, 64) if index % 2 else (64, 48)
        pixels = random.randint(0, 256, (height, width, 3), dtype=np.uint8)
        name = f"{index}.png"
        cv2.imwrite(str(folder / "images" / name), pixels)
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for corner in (4, 20):
            box = [corner, corner, 16, 20]
            x, y, w, h = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1 + len(annotations) % CLASSES,
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": index + 1, "name": f"class{index}"} for index in range(CLASSES)]
    json_file = folder / "annotations.json"
    json_file.write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories})
    )
    return {
        "NAME": f"tiny_{zlib.crc32(str(folder).encode())}",
        "FORMAT": "coco",
        "JSON": str(json_file),
        "IMAGES": str(folder / "images"),
    }


def use_dataset(cfg: CfgNode, entry: dict) -> None:
    """Train and test on the dataset of ``write_dataset``."""
    cfg.DATASETS.CUSTOM = [entry]
    cfg.DATASETS.TRAIN = (entry["NAME"],)
    cfg.DATASETS.TEST = (entry["NAME"],)


def use_ghnd(cfg: CfgNode) -> None:
    """A student as those of configs/Distillation-GHND: its teacher, but for a bottleneck of two channels
    in place of the first stage, which is trained together with the stem's convolution."""
    stages = list(cfg.MODEL.SMALL_RESNET.OUT_FEATURES)
    bottleneck = cfg.MODEL.BOTTLENECK
    bottleneck.BACKBONE = cfg.MODEL.BACKBONE.NAME
    bottleneck.CHANNELS = 2
    bottleneck.ENCODER_WIDTHS = [8, 12, 8]
    bottleneck.DECODER_WIDTHS = [8, 12]
    cfg.MODEL.BACKBONE.NAME = "build_bottleneck_backbone"
    node = cfg.MODEL.DISTILLER
    node.TYPES = ["GHND"]
    node.GHND.IN_FEATURES = stages
    node.TASK_LOSS_WEIGHT = 0.0
    node.PRELOAD_NAMES = ["."]
    node.FREEZE = ["bottom_up.res[345]", "bottom_up.stem.conv1.norm"]
    cfg.SOLVER.OPTIMIZER = "Adam"
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
