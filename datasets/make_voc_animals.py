#!/usr/bin/env python3
"""Make the photos of `distill-d2 proof` of PASCAL VOC 2012: five animals, 256 pixels, in COCO's form.

    datasets/download_voc_2007_2012.sh
    datasets/make_voc_animals.py datasets/VOC2012 datasets/voc_animals

All images with a dog, cat, sheep, horse or cow are sorted by name, shuffled by ``random.Random(2026)`` and split:
2000 to train, 500 to choose settings by (val), the others to test. The longer side becomes 256 pixels (bicubic,
JPEG 85). Corners are counted from 0, not from 1 as VOC does, and scaled by the exact ratio of sizes. What VOC
calls difficult is a crowd: neither an object nor a mistake.
"""

from __future__ import annotations

import argparse
import json
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from PIL import Image

CLASSES = ("dog", "cat", "sheep", "horse", "cow")
SEED, TRAIN, VAL = 2026, 2000, 500
LONG_SIDE, QUALITY = 256, 85


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("voc", type=Path, help="with Annotations/ and JPEGImages/")
    parser.add_argument("output", type=Path, help="gets annotations/ and images/")
    args = parser.parse_args()
    if not (args.voc / "Annotations").is_dir():
        parser.error(f"'{args.voc}' has no folder Annotations; expected VOC2012")
    make(args.voc, args.output)


def make(voc: Path, output: Path, train: int = TRAIN, val: int = VAL) -> None:
    """Write the photos and their annotations.

    Args:
        train, val: numbers of images.
    """
    objects = {path.stem: animals(path) for path in sorted((voc / "Annotations").glob("*.xml"))}
    names = [name for name, found in objects.items() if found]
    random.Random(SEED).shuffle(names)
    for folder in ("annotations", "images"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    splits = {"train": names[:train], "val": names[train : train + val], "test": names[train + val :]}
    for split, chosen in splits.items():
        content = dataset(voc, output, {name: objects[name] for name in chosen})
        (output / "annotations" / f"{split}.json").write_text(json.dumps(content))
        print(f"{split}: {len(content['images'])} images, {len(content['annotations'])} boxes")


def animals(path: Path) -> list[ElementTree.Element]:
    """The objects of our classes in a file of VOC."""
    return [item for item in ElementTree.parse(path).iter("object") if item.findtext("name") in CLASSES]


def dataset(voc: Path, output: Path, objects: dict[str, list[ElementTree.Element]]) -> dict[str, Any]:
    """COCO's form of some images; writes them smaller."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, found in objects.items():
        image = Image.open(voc / "JPEGImages" / f"{name}.jpg").convert("RGB")
        ratio = LONG_SIDE / max(image.size)
        width, height = (round(side * ratio) for side in image.size)
        scale = (width / image.width, height / image.height)
        file = f"{name}.jpg"
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        small.save(output / "images" / file, quality=QUALITY)
        images.append({"id": len(images) + 1, "file_name": file, "width": width, "height": height})
        for item in found:
            annotations.append(annotation(item, scale, images[-1]["id"], len(annotations) + 1))
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def annotation(
    item: ElementTree.Element, scale: tuple[float, float], image: int, number: int
) -> dict[str, Any]:
    """An object as COCO has it; ``scale`` is of x and y."""
    box = item.find("bndbox")
    left, top, right, bottom = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))  # type: ignore
    x, y = (left - 1) * scale[0], (top - 1) * scale[1]
    width, height = (right - left + 1) * scale[0], (bottom - top + 1) * scale[1]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1 + CLASSES.index(item.findtext("name")),  # type: ignore
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": int(item.findtext("difficult") == "1"),
    }


if __name__ == "__main__":
    main()
