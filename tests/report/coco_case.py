"""A small made-up dataset in COCO's form, with detections of it."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CLASSES = ["dog", "cat", "sheep"]
_SIDE = 200


def dataset(images=8, seed=0):
    """Up to five objects an image, some of them small, some crowds; the last class is rare."""
    generator = np.random.default_rng(seed)
    annotations = []
    for image in range(1, images + 1):
        for _ in range(generator.integers(0, 6)):
            corner, size = generator.uniform(0, 100, 2), generator.uniform(10, 100, 2)
            label = int(generator.choice([1, 2, 3], p=[0.5, 0.4, 0.1]))
            annotations.append(
                dict(image_id=image, category_id=label, bbox=[*corner, *size], area=float(size.prod()))
            )
    for number, item in enumerate(annotations, start=1):
        item.update(id=number, iscrowd=int(number % 7 == 0), bbox=[float(x) for x in item["bbox"]])
    return {
        "images": [
            dict(id=i, width=_SIDE, height=_SIDE, file_name=f"{i}.jpg") for i in range(1, images + 1)
        ],
        "categories": [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)],
        "annotations": annotations,
    }


def detections(content, noise=6.0, seed=0):
    """Objects with shifted corners, and as many wrong boxes. Scores repeat: the order of equal ones counts."""
    generator = np.random.default_rng(seed)
    found = []
    for item in content["annotations"]:
        for box in (item["bbox"], generator.uniform(5, 100, 4)):
            shifted = np.maximum(np.add(box, generator.normal(0, noise, 4)), 1.0)
            found.append(
                dict(
                    image_id=item["image_id"],
                    category_id=item["category_id"],
                    bbox=[float(x) for x in shifted],
                    score=float(generator.integers(1, 10)) / 10,
                )
            )
    return found


def copied(content, found, counts):
    """Dataset and detections with each image as often as ``counts`` says; its copies follow each other."""
    images, annotations, results = [], [], []
    for image, count in zip(content["images"], counts):
        for copy in range(count):
            key = image["id"] * 100 + copy
            images.append({**image, "id": key})
            for items, copies in ((content["annotations"], annotations), (found, results)):
                copies += [
                    {**item, "image_id": key} for item in items if item["image_id"] == image["id"]
                ]
    for number, item in enumerate(annotations, start=1):
        item["id"] = number
    return {**content, "images": images, "annotations": annotations}, results


def coco(content):
    api = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def evaluated(content, found):
    """COCOeval after its evaluation of boxes."""
    with contextlib.redirect_stdout(io.StringIO()):
        items = [dict(item) for item in content["annotations"]]  # COCO writes into them
        truth = coco({**content, "annotations": items})
        evaluation = COCOeval(truth, truth.loadRes([dict(item) for item in found]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
