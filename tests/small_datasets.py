"""Small datasets in VOC layout, and loading those of DATASETS.CUSTOM."""

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from distill_d2.data import register_custom_datasets

OBJECT = """<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def write_voc(root, images, split="train", suffix=".jpg"):
    """``images``: {id: [(class, x1, y1, x2, y2), ...]}, each 60 x 40 pixels."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{key}\n" for key in images))
    for key, objects in images.items():
        xml = "".join(OBJECT.format(*item) for item in objects)
        size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
        (root / "Annotations" / f"{key}.xml").write_text(f"<annotation>{size}{xml}</annotation>")
        cv2.imwrite(str(root / "JPEGImages" / f"{key}{suffix}"), np.zeros((40, 60, 3), np.uint8))


def load(entry):
    register_custom_datasets([entry])
    return DatasetCatalog.get(entry["NAME"])


def assert_fails(entry, *texts, error=ValueError):
    """Loading it fails, and the message holds all texts."""
    with pytest.raises(error) as caught:
        load(entry)
    assert all(text in str(caught.value) for text in texts), caught.value
