"""The "shapes" dataset: generated images of colored shapes on textured backgrounds, with boxes and masks.

shapes_train and shapes_val need no download. A detector learns them from scratch in minutes, and larger
detectors learn them better. They are in COCO format, below $DETECTRON2_DATASETS/shapes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock

from .custom_entries import datasets_root

logger = logging.getLogger(__name__)

CLASSES = ("circle", "square", "triangle", "star", "cross")
#: Images and seed of each split.
SPLITS = {"train": (2000, 1), "val": (200, 2)}

_RECIPE = 1  # increase it when the same seed gives other images
_MIN_COLOR_DISTANCE = 160  # sum over channels of |shape - mean background|, of 765
_POINTS_OF_CIRCLE = 32
_ARM = 0.33  # half width of the cross's arms, for a half length of 1
_SUBPIXEL_BITS = 4  # precision of drawn corners: 1/16 pixel
_SMOOTHING = 4  # shapes are drawn this much larger and averaged: smooth edges, on the annotated line


def register_shapes() -> None:
    """Register shapes_train and shapes_val, below $DETECTRON2_DATASETS as it is now.

    They are generated when first loaded. Another call only changes the folder.
    """
    root = os.path.join(datasets_root(), "shapes")
    for split in SPLITS:
        name = f"shapes_{split}"
        json_file, images = _paths(root, split)
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).get("json_file") == json_file:
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


def _load(root: str, split: str) -> list[dict[str, Any]]:
    try:
        generate_shapes(root, split, *SPLITS[split])
    except OSError as error:
        raise OSError(
            f"shapes_{split} cannot be generated in '{root}': {error}. Set $DETECTRON2_DATASETS to a "
            "folder that can be written to"
        ) from error
    return load_coco_json(*_paths(root, split), f"shapes_{split}")


def generate_shapes(
    root: str, split: str, num_images: int, seed: int, image_size: int = 96
) -> tuple[str, str]:
    """Make ``num_images`` images and their annotations, unless they exist.

    The result depends on the arguments alone, except for ``root`` and ``split``. Several processes
    may call it at once: one generates, the others wait. It appears complete or not at all.

    Args:
        root: folder of the dataset.
        split: name of the part; it becomes <root>/<split>/ with annotations.json and images/.
        num_images: number of images.
        seed: of the random numbers.
        image_size: side in pixels.

    Returns:
        paths of the json file and of the image folder.

    Raises:
        ValueError: the folder holds something else, for example another number of images.
        OSError: it cannot be written.
    """
    info = {"recipe": _RECIPE, "num_images": num_images, "seed": seed, "image_size": image_size}
    folder = os.path.join(root, split)
    if not os.path.exists(folder):
        os.makedirs(root, exist_ok=True)
        with file_lock(folder):
            if not os.path.exists(folder):
                logger.info(f"Generating {num_images} images in {folder}")
                _remove_unfinished(Path(root), split)
                _generate(Path(root), split, info)
    json_file, images = _paths(root, split)
    if _info(json_file) != info:
        raise ValueError(
            f"'{folder}' holds {_info(json_file) or 'no shapes dataset'}, expected {info}; remove that "
            "folder to generate it again"
        )
    return json_file, images


def _paths(root: str, split: str) -> tuple[str, str]:
    folder = os.path.join(root, split)
    return os.path.join(folder, "annotations.json"), os.path.join(folder, "images")


def _info(json_file: str) -> dict[str, int] | None:
    try:
        with open(json_file) as file:
            return json.load(file)["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unfinished(split: str) -> str:
    """The first part of the names of folders under construction."""
    return f".{split}.unfinished-"


def _remove_unfinished(root: Path, split: str) -> None:
    """Remove folders that killed processes left. The caller holds the lock, so no other process writes."""
    for folder in root.glob(f"{_unfinished(split)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _generate(root: Path, split: str, info: dict[str, int]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=_unfinished(split), dir=root))
    try:
        (unfinished / "images").mkdir()
        content = _write_images(unfinished / "images", info)
        (unfinished / "annotations.json").write_text(json.dumps(content))
        unfinished.chmod(0o755)
        unfinished.rename(root / split)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_images(folder: Path, info: dict[str, int]) -> dict[str, Any]:
    size = info["image_size"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(info["num_images"]):
        pixels, objects = draw_image(np.random.RandomState([info["seed"], index]), size)
        file = f"{index:05d}.jpg"
        if not cv2.imwrite(str(folder / file), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"cannot write '{folder / file}'")
        images.append({"id": index + 1, "file_name": file, "height": size, "width": size})
        for label, corners in objects:
            annotations.append(_annotation(len(annotations) + 1, index + 1, label, corners))
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def draw_image(
    random: np.random.RandomState, size: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One image (size, size, 3), uint8, with one to four shapes that do not touch.

    Returns:
        the image and, per shape, its class and its corners (P, 2), (x, y) in pixels from the image's
        upper left corner.
    """
    canvas = _background(random, size)
    mean = canvas.mean(axis=(0, 1))
    taken = np.zeros((size, size), np.uint8)
    objects = []
    for _ in range(random.randint(1, 5)):
        label = random.randint(len(CLASSES))
        corners = _free_place(random, label, taken)
        if corners is None:
            continue
        color = random.randint(0, 256, 3)
        while np.abs(color - mean).sum() < _MIN_COLOR_DISTANCE:
            color = random.randint(0, 256, 3)
        cover = _cover(corners, size)
        canvas += cover[:, :, None] * (color - canvas)
        taken |= cover > 0
        objects.append((label, corners))
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), objects


def _background(random: np.random.RandomState, size: int) -> np.ndarray:
    """Grayish noise of several scales, and up to two thin lines, which are not objects."""
    canvas = np.full((size, size, 3), random.uniform(60, 190), np.float32)
    for cells in (3, 8, 24):
        gray = random.normal(0, 12, (cells, cells, 1)) + random.normal(0, 4, (cells, cells, 3))
        canvas += cv2.resize(gray.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(random.randint(0, 3)):
        start, end = random.randint(0, size, (2, 2)).tolist()
        cv2.line(canvas, start, end, random.uniform(0, 255, 3).tolist(), 1)
    return np.clip(canvas, 0, 255)


def _free_place(
    random: np.random.RandomState, label: int, taken: np.ndarray, attempts: int = 20
) -> np.ndarray | None:
    """Corners (P, 2) of a shape inside the image that touches no other; None if no place was found."""
    size = len(taken)
    for _ in range(attempts):
        radius = size * np.exp(random.uniform(np.log(0.1), np.log(0.25)))
        center = random.uniform(radius, size - radius, 2)
        angle = random.uniform(-0.6, 0.6)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = _outline(label) @ turn.T * radius + center
        place = cv2.dilate((_cover(corners, size) > 0).astype(np.uint8), np.ones((3, 3), np.uint8))
        if not (place & taken).any():
            return corners
    return None


def _outline(label: int) -> np.ndarray:
    """Corners (P, 2) of a shape within radius 1 of the origin, y downwards."""
    name = CLASSES[label]
    if name == "circle":
        angles = np.arange(_POINTS_OF_CIRCLE) * 2 * np.pi / _POINTS_OF_CIRCLE
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.7
    if name == "triangle":
        return np.array([[0, -1], [0.866, 0.5], [-0.866, 0.5]])
    if name == "star":
        angles, radii = np.arange(10) * np.pi / 5, np.tile([1.0, 0.45], 5)
        return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
    a = _ARM
    quarter = np.array([[-a, -0.94], [a, -0.94], [a, -a]])
    turn = np.array([[0, -1], [1, 0]])  # a quarter, clockwise on the screen
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k).T for k in range(4)])


def _cover(corners: np.ndarray, size: int) -> np.ndarray:
    """The fraction of each pixel that a shape covers, (size, size), 0 to 1."""
    large = np.zeros((size * _SMOOTHING, size * _SMOOTHING), np.uint8)
    # OpenCV puts a pixel's center at whole coordinates; its edge is half a pixel before.
    points = np.round((corners * _SMOOTHING - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(large, [points], 255, shift=_SUBPIXEL_BITS)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA) / np.float32(255)


def _annotation(number: int, image: int, label: int, corners: np.ndarray) -> dict[str, Any]:
    (x1, y1), (x2, y2) = corners.min(axis=0), corners.max(axis=0)
    area = cv2.contourArea(corners.astype(np.float32))
    return {
        "id": number,
        "image_id": image,
        "category_id": int(label) + 1,
        "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
        "area": round(float(area), 2),
        "iscrowd": 0,
        "segmentation": [[round(float(v), 2) for v in corners.ravel()]],
    }
