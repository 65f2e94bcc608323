"""The "shapes" dataset: coloured shapes over textured backgrounds, with boxes and masks, generated.

shapes_train and shapes_val need no download and are learnt from scratch in minutes, yet teachers and
students of different size differ on them. COCO format, below $DETECTRON2_DATASETS/shapes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock

from .custom import datasets_root

logger = logging.getLogger(__name__)

CLASSES = ("circle", "square", "triangle", "star", "cross")
#: Images and seed of each split.
SPLITS = {"train": (2000, 1), "val": (200, 2)}

_MIN_COLOUR_DISTANCE = 160  # sum over channels of |shape - mean background|, of 765
_POINTS_OF_CIRCLE = 32
_ARM = 0.33  # half width of the cross's arms, for a half length of 1
_SUBPIXEL_BITS = 4  # precision of drawn corners: 1/16 pixel


def register_shapes() -> None:
    """Register shapes_train and shapes_val; they are generated when first loaded. Idempotent."""
    root = os.path.join(datasets_root(), "shapes")
    for split in SPLITS:
        name = f"shapes_{split}"
        json_file, images = _paths(root, split)
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).json_file == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, lambda split=split: _load(root, split))
        MetadataCatalog.get(name).set(
            thing_classes=list(CLASSES),
            json_file=json_file,
            image_root=images,
            evaluator_type="coco",
        )


def _load(root: str, split: str) -> List[Dict[str, Any]]:
    generate_shapes(root, split, *SPLITS[split])
    return load_coco_json(*_paths(root, split), f"shapes_{split}")


def generate_shapes(
    root: str, split: str, num_images: int, seed: int, image_size: int = 96
) -> Tuple[str, str]:
    """Make ``num_images`` images and their annotations, unless they exist.

    The result depends on the arguments alone. Several processes may call it at once: one generates,
    the others wait. It appears complete or not at all.

    Args:
        root: folder of the dataset.
        split: name of the part; it becomes <root>/<split>/ with annotations.json and images/.
        num_images, seed: what is generated.
        image_size: side in pixels.

    Returns:
        paths of the json file and of the image folder.
    """
    json_file, images = _paths(root, split)
    if os.path.exists(json_file):
        return json_file, images
    os.makedirs(root, exist_ok=True)
    with file_lock(os.path.join(root, split)):
        if not os.path.exists(json_file):
            logger.info(f"Generating {num_images} images in {os.path.join(root, split)}")
            _generate(Path(root), split, num_images, seed, image_size)
    return json_file, images


def _paths(root: str, split: str) -> Tuple[str, str]:
    folder = os.path.join(root, split)
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _generate(root: Path, split: str, num_images: int, seed: int, size: int) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=root))
    try:
        (unfinished / "images").mkdir()
        images, annotations = [], []
        for index in range(num_images):
            pixels, objects = draw_image(np.random.default_rng([seed, index]), size)
            file = f"{index:05d}.jpg"
            quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
            cv2.imwrite(str(unfinished / "images" / file), pixels, quality)
            images.append({"id": index + 1, "file_name": file, "height": size, "width": size})
            for label, corners in objects:
                annotations.append(_annotation(len(annotations) + 1, index + 1, label, corners))
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
        content = {
            "info": {"description": f"shapes: {num_images} images, seed {seed}"},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (unfinished / "annotations.json").write_text(json.dumps(content))
        unfinished.chmod(0o755)
        unfinished.rename(root / split)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def draw_image(
    random: np.random.Generator, size: int
) -> Tuple[np.ndarray, List[Tuple[int, np.ndarray]]]:
    """One image (size, size, 3), uint8, with one to four shapes that do not touch.

    Returns:
        the image and, per shape, its class and its corners (P, 2) in pixels.
    """
    canvas = _background(random, size)
    mean = canvas.mean(axis=(0, 1))
    canvas = np.ascontiguousarray(np.clip(canvas, 0, 255).astype(np.uint8))
    taken = np.zeros((size, size), np.uint8)
    objects = []
    for _ in range(random.integers(1, 5)):
        label, corners = _free_place(random, size, taken)
        if corners is None:
            continue
        colour = random.integers(0, 256, 3)
        while np.abs(colour - mean).sum() < _MIN_COLOUR_DISTANCE:
            colour = random.integers(0, 256, 3)
        _fill(canvas, corners, colour.tolist())
        _fill(taken, corners, [1])
        objects.append((label, corners))
    return canvas, objects


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """Greyish noise of several scales, and up to two thin lines, which are no objects."""
    canvas = np.full((size, size, 3), random.uniform(60, 190), np.float32)
    for cells in (3, 8, 24):
        grey = random.normal(0, 12, (cells, cells, 1)) + random.normal(0, 4, (cells, cells, 3))
        canvas += cv2.resize(grey.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(random.integers(0, 3)):
        start, end = random.integers(0, size, (2, 2)).tolist()
        cv2.line(canvas, start, end, random.uniform(0, 255, 3).tolist(), 1)
    return canvas


def _free_place(random: np.random.Generator, size: int, taken: np.ndarray, attempts: int = 20):
    """A class and corners of a shape that touches no other; corners None if there is no room."""
    label = int(random.integers(len(CLASSES)))
    for _ in range(attempts):
        radius = size * np.exp(random.uniform(np.log(0.1), np.log(0.25)))
        centre = random.uniform(radius, size - radius, 2)
        angle = random.uniform(-0.6, 0.6)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = np.clip(_outline(label) @ turn.T * radius + centre, 0, size - 1)
        place = np.zeros_like(taken)
        _fill(place, corners, [1])
        if not (cv2.dilate(place, np.ones((3, 3), np.uint8)) & taken).any():
            return label, corners
    return label, None


def _outline(label: int) -> np.ndarray:
    """Corners (P, 2) of a shape of radius 1 around the origin, y downwards."""
    name = CLASSES[label]
    if name == "circle":
        angles = np.arange(_POINTS_OF_CIRCLE) * 2 * np.pi / _POINTS_OF_CIRCLE
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8
    if name == "triangle":
        return np.array([[0, -1], [0.87, 0.6], [-0.87, 0.6]])
    if name == "star":
        angles, radii = np.arange(10) * np.pi / 5, np.tile([1.0, 0.45], 5)
        return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
    a = _ARM
    quarter = np.array([[-a, -1], [a, -1], [a, -a]])
    turn = np.array([[0, -1], [1, 0]])  # a quarter, clockwise on the screen
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k).T for k in range(4)])


def _fill(canvas: np.ndarray, corners: np.ndarray, colour: List[int]) -> None:
    fixed_point = np.round(corners * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(canvas, [fixed_point], colour, shift=_SUBPIXEL_BITS)


def _annotation(number: int, image: int, label: int, corners: np.ndarray) -> Dict[str, Any]:
    # A pixel's centre is drawn at whole coordinates; its area reaches half a pixel further.
    (x1, y1), (x2, y2) = corners.min(axis=0), corners.max(axis=0) + 1
    x, y = corners[:, 0], corners[:, 1]
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return {
        "id": number,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
        "area": round(float(area), 2),
        "iscrowd": 0,
        "segmentation": [[round(float(v), 2) for v in (corners + 0.5).ravel()]],
    }
