"""Look at a folder, write the configs, and say what to do with them."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from detectron2.data import DatasetCatalog

from ..checkpoint import write_whole
from ..data import check_dataset, register_builtin_voc, register_custom_datasets, register_shapes
from ..data.classes import classes_of
from ..data.unreadable import skip_unreadable as leave_out
from ..engine.output_dir import check_writable
from .anchors import fit_anchors
from .backbones import PAIRS, can_be_had
from .boxes import Boxes
from .describing import describe
from .image_size import choose_size
from .layout import find_layout
from .trial import try_out
from .writing import FILES, Plan, texts

_LEAST_EPOCHS, _MOST_EPOCHS = 12, 200
_CHECKED_IMAGES = 500
_MANY_MISSED = 0.2  # of the objects


def propose(
    data: str,
    output: str,
    *,
    device: str = "cpu",
    kind: str = "",
    backbone: str = "",
    epochs: float = 0.0,
    skip_unreadable: bool = False,
    overwrite: bool = False,
) -> str:
    """Write base.yaml, teacher.yaml, student.yaml and distill.yaml for a folder of data.

    Args:
        data: the folder.
        output: where they are written; the runs' folders are below it.
        device: of torch; with a GPU the models are larger, if pretrained weights can be had.
        kind: voc, coco or yolo; "": the first that is there.
        backbone: a name in ``PAIRS``; "": by the device.
        epochs: of teacher and student; 0: by the number of images.
        skip_unreadable: leave images out that cannot be read; ``output`` lists them.
        overwrite: replace files that are there.

    Returns:
        what was found and chosen, and the next commands.

    Raises:
        OSError, ValueError: the folder is not clear, the data are wrong, or the output exists.
    """
    _check(output, backbone, epochs, overwrite)
    layout = find_layout(data, kind)
    _check_place(output, [*layout.train, *layout.val])
    check_writable(output, "--output")
    train, test = _named(data, layout.train, "train"), _named(data, layout.val, "val")
    entries = [{**e, **({"CLASSES": layout.classes} if layout.classes else {})} for e in train + test]
    register_custom_datasets(entries)
    unreadable = leave_out([entry["NAME"] for entry in entries], output) if skip_unreadable else []
    found = {entry["NAME"]: _checked(entry["NAME"], train[0]["NAME"]) for entry in entries}
    boxes = Boxes.of([record for entry in train for record in found[entry["NAME"]]])
    gpu = device.startswith("cuda")
    name, remark = _choose(backbone, gpu)
    pair = PAIRS[name]
    short, long = choose_size(boxes, pair.budget(gpu))
    plan = Plan(
        title=f"{os.path.basename(os.path.abspath(data))}: {len(boxes.images)} images for training",
        entries=entries,
        train=[entry["NAME"] for entry in train],
        test=[entry["NAME"] for entry in test],
        classes=classes_of([train[0]["NAME"]]) or [],
        pair=pair,
        anchors=fit_anchors(boxes.resized(short, long), pair.pyramids, usual=bool(pair.weights)),
        short=short,
        long=long,
        epochs=epochs or _epochs(pair.images, len(set(boxes.owners))),  # empty ones are left out
        gpu=gpu,
        skip_unreadable=skip_unreadable,
        pkd=pair.pkd or 1.0,
        output=os.path.abspath(output),
    )
    trial = None
    if not pair.missing_packages() and (
        gpu or not pair.weights
    ):  # a step of large detectors takes a minute on a CPU
        with tempfile.TemporaryDirectory() as folder:
            _write(folder, texts(plan))
            trial = try_out(folder, device)
        plan = replace(plan, pkd=pair.pkd or trial.weight or 1.0)
    _write(output, texts(plan))
    remarks = [*layout.remarks, *unreadable, *filter(None, (remark, _remark_on_anchors(plan)))]
    return describe(plan, boxes, found, trial, remarks, output)


def _check(output: str, backbone: str, epochs: float, overwrite: bool) -> None:
    there = [name for name in FILES if os.path.exists(os.path.join(output, name))]
    if there and not overwrite:
        raise ValueError(
            f"'{output}' holds {', '.join(there)}; give another --output, or --overwrite to replace them"
        )
    if backbone and backbone not in PAIRS:
        raise ValueError(f"--backbone {backbone}: there is none; expected one of {', '.join(PAIRS)}")
    if not 0 <= epochs < math.inf:
        raise ValueError(f"--epochs {epochs}: expected a number above 0")


def _check_place(output: str, entries: Sequence[dict[str, Any]]) -> None:
    """Later pictures of runs must not become images of the dataset."""
    for images in (entry["IMAGES"] for entry in entries if entry["FORMAT"] == "yolo"):
        if os.path.realpath(output).startswith(os.path.join(os.path.realpath(images), "")):
            raise ValueError(
                f"--output '{output}' is inside the folder of images '{images}', so that pictures of runs would "
                "become images of the dataset; give another folder"
            )


def _named(data: str, entries: Sequence[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """The entries with names that are not taken by other datasets."""
    register_shapes()
    register_builtin_voc()
    stem = re.sub(r"\W+", "_", os.path.basename(os.path.abspath(data))).strip("_") or "data"
    numbers = [""] if len(entries) == 1 else [f"_{number}" for number in range(1, len(entries) + 1)]
    names = [f"{stem}_{role}{number}" for number in numbers]
    taken = [name for name in names if name in DatasetCatalog.list()]
    return [{"NAME": f"my_{name}" if taken else name, **entry} for name, entry in zip(names, entries)]


def _checked(name: str, first: str) -> list[dict[str, Any]]:
    """The records of a dataset, when nothing is wrong with it and its classes are those of ``first``."""
    like = "" if name == first else first
    return check_dataset(name, check_images=_CHECKED_IMAGES, tested=True, like=like)


def _choose(backbone: str, gpu: bool) -> tuple[str, str]:
    """The pair, and what to remark on it."""
    name = backbone or ("resnet50" if gpu else "small")
    packages = PAIRS[name].missing_packages()
    if packages:
        return name, f"a run needs packages that are not installed: pip install {' '.join(packages)}"
    missing = not can_be_had(PAIRS[name].weights)
    if missing and backbone:
        return (
            name,
            f"the weights {list(PAIRS[name].weights)} cannot be had from here now; a run needs them",
        )
    if missing:
        return "small", "pretrained weights cannot be had from here, so all starts from random ones"
    return name, "" if gpu or backbone else "no GPU, so the detectors are small ones"


def _remark_on_anchors(plan: Plan) -> str:
    missed = 1 - plan.anchors.recall
    if missed < _MANY_MISSED:
        return ""
    return (
        f"{100 * missed:.0f} % of the objects are too small, too narrow or too large for the anchors in images "
        f"of {plan.short} x {plan.long} pixels, and will hardly be found"
    )


def _epochs(images_of_a_run: int, images: int) -> int:
    return min(max(round(images_of_a_run / max(images, 1)), _LEAST_EPOCHS), _MOST_EPOCHS)


def _write(folder: str, contents: Mapping[str, str]) -> None:
    for name, text in contents.items():
        write_whole(os.path.join(folder, name), partial(_put, text.encode()))


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)
