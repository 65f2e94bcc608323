"""Pictures of truth and detections on the test images on which detectors differ most."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import cv2
import numpy as np
from detectron2.utils.visualizer import GenericMask

from ..data.sample import varied_sample
from ..inference import Trained
from ..inference.images import read_bgr
from ..inference.truth import Truth as TestData
from ..mistakes import UnreadableRecord
from .matching import Found, Truth, best_threshold, f1, found_by, truth_of

_LONGEST_SIDE = 640  # pixels of a picture in the page
_QUALITY = 82
_MOST_BOXES = 200
_MOST_LABELS = 20  # more hide the image


@dataclass(frozen=True)
class Seen:
    """A test image, as a dataset dict, its objects, and what each detector finds in it."""

    record: dict[str, Any]
    truth: Truth
    found: dict[str, Found]


@dataclass(frozen=True)
class Shown:
    """What is found in a few images.

    Attributes:
        images: those to show, the one with the largest difference first.
        thresholds: by detector, the least score of what is shown.
        looked_at: the number of images among which they were chosen.
    """

    images: list[Seen]
    thresholds: dict[str, float]
    looked_at: int


def images_to_show(
    models: Mapping[str, Trained], data: TestData, compared: Sequence[str], look_at: int, show: int
) -> Shown:
    """Let the detectors find objects in test images, and choose the images on which they differ most in F1.
    Images that cannot be read are left out.

    Args:
        compared: names of detectors whose difference counts; a single one: images with many mistakes.
        look_at: the most images to look at.
        show: the most images to choose.

    Raises:
        ValueError: no image can be read; a detector finds no objects at all (a semantic segmentor).
    """
    seen = []
    for record in varied_sample(data.records, look_at):
        with contextlib.suppress(UnreadableRecord):
            seen.append(_look(models, data, record, masks=False))
    if not seen:
        raise ValueError("none of the test images can be read")
    truths = [image.truth for image in seen]
    thresholds = {name: best_threshold([image.found[name] for image in seen], truths) for name in models}

    def difference(image: Seen) -> float:
        scores = [f1(image.found[name], image.truth, thresholds[name]) for name in compared]
        return max(scores) - min(scores) if len(scores) > 1 else 1 - scores[0]

    chosen = sorted(seen, key=difference, reverse=True)[:show]
    images = [_look(models, data, image.record, masks=True) for image in chosen]
    return Shown(images, thresholds, len(seen))


def _look(models: Mapping[str, Trained], data: TestData, record: dict[str, Any], masks: bool) -> Seen:
    """``masks``: keep them, which need much memory."""
    image, truth = read_bgr(record["file_name"]), truth_of(record, data.classes)
    found = {}
    for name, trained in models.items():
        instances = trained.predict([image])[0]
        if not masks and instances.has("pred_masks"):
            instances.remove("pred_masks")
        found[name] = found_by(instances, _class_names(trained, data.classes), truth)
    return Seen(record, truth, found)


def _class_names(trained: Trained, names: Sequence[str]) -> Sequence[str]:
    """A detector's classes; those of the data, by number, where it knows only numbers."""
    known = any(not name.isdigit() for name in trained.classes)
    return trained.classes if known or len(trained.classes) != len(names) else names


def picture_rows(shown: Shown) -> str:
    """The images side by side: the truth, then what each detector finds. Each image is in the page once."""
    return "".join(_row(number, image, shown.thresholds) for number, image in enumerate(shown.images))


def _row(number: int, image: Seen, thresholds: Mapping[str, float]) -> str:
    pixels = read_bgr(image.record["file_name"])
    height, width = pixels.shape[:2]
    count = len(image.truth.classes)
    masks = any(mask is not None for found in image.found.values() for mask in found.masks)
    truth, text = _truth_marks(image.truth, masks), f"{count} object{'s' * (count != 1)}"
    panels = [_panel(number, width, height, truth, "truth", text)]
    for name, found in image.found.items():
        right, wrong = found.counts(thresholds[name])
        text = f"{right} of {count} found" + f", {wrong} wrong" * (wrong > 0)
        panels.append(
            _panel(number, width, height, _marks(found, image.truth, thresholds[name]), name, text)
        )
    style = f".i{number}{{background-image:url(data:image/jpeg;base64,{_jpeg(pixels)})}}"
    title = escape(os.path.basename(image.record["file_name"]))
    row = f'<div class="panels" style="--count:{len(panels)}">{"".join(panels)}</div>'
    return f"<style>{style}</style><h3>{title}</h3>{row}"


def _panel(number: int, width: int, height: int, marks: list[_Mark], name: str, text: str) -> str:
    size = width / 20
    marks = sorted(marks[:_MOST_BOXES], key=lambda mark: mark.kind != "right")
    boxes = "".join(mark.outline() for mark in reversed(marks))  # those that are right lie above
    labels = _labels(marks, size, width, height) if len(marks) <= _MOST_LABELS else ""
    return (
        f'<figure class="panel"><svg class="picture i{number}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name)}: {escape(text)}" style="font-size:{size:.1f}px">{boxes}{labels}</svg>'
        f"<figcaption><b>{escape(name)}</b> {escape(text)}</figcaption></figure>"
    )


@dataclass(frozen=True)
class _Mark:
    """A box with a label, and the polygons of a mask; ``kind`` is "right", "wrong", "missed" or "truth"."""

    box: np.ndarray
    label: str
    kind: str
    mask: Sequence[np.ndarray] = ()

    def outline(self) -> str:
        x1, y1, x2, y2 = self.box.tolist()
        box = f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"/>'
        return f'<g class="{self.kind}">{"".join(map(_polygon, self.mask))}{box}</g>'


def _polygon(corners: np.ndarray) -> str:
    return f'<polygon points="{" ".join(f"{value:.1f}" for value in corners)}"/>'


def _labels(marks: Sequence[_Mark], size: float, width: int, height: int) -> str:
    """Labels above, below or inside their box, where the picture has room and none is yet; others are left out.

    Args:
        size: of the letters.
    """
    taken: list[tuple[float, float, float]] = []
    texts = []
    for mark in marks:
        x1, y1, _, y2 = mark.box.tolist()
        length = 0.6 * size * len(mark.label)
        x = max(0.0, min(x1, width - length))
        for y in (y1 - 0.25 * size, y2 + size, y1 + size, y2 - 0.25 * size):
            covered = any(abs(y - b) < size and x < c and a < x + length for a, b, c in taken)
            if size <= y <= height and not covered:
                taken.append((x, y, x + length))
                texts.append(
                    f'<text class="{mark.kind}" x="{x:.1f}" y="{y:.1f}">{escape(mark.label)}</text>'
                )
                break
    return "".join(texts)


def _truth_marks(truth: Truth, masks: bool) -> list[_Mark]:
    """``masks``: draw them, too."""
    return [
        _Mark(box, name, "truth", _polygons(mask) if masks else ())
        for box, name, mask in zip(truth.boxes, truth.classes, truth.masks)
    ]


def _marks(found: Found, truth: Truth, threshold: float) -> list[_Mark]:
    shown = found.scores >= threshold
    marks = [
        _Mark(
            found.boxes[row],
            f"{found.classes[row]} {found.scores[row]:.2f}",
            "right" if found.objects[row] >= 0 else "wrong",
            _polygons(found.masks[row]),
        )
        for row in np.flatnonzero(shown)
    ]
    missed = set(range(len(truth.classes))) - set(found.objects[shown].tolist())
    return marks + [_Mark(truth.boxes[row], truth.classes[row], "missed") for row in sorted(missed)]


def _polygons(mask: Any) -> list[np.ndarray]:
    """Of a mask, as a dataset or a detector has it; none without one."""
    if mask is None:
        return []
    if isinstance(mask, list):
        return [np.asarray(polygon) for polygon in mask]
    height, width = mask["size"] if isinstance(mask, dict) else mask.shape
    return GenericMask(mask, height, width).polygons


def _jpeg(pixels: np.ndarray) -> str:
    """A picture of the image as base64."""
    factor = _LONGEST_SIDE / max(pixels.shape[:2])
    if factor < 1:
        pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ValueError(f"an image of shape {pixels.shape} cannot be written as JPEG")
    return base64.b64encode(data.tobytes()).decode()
