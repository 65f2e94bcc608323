"""Leave images out that cannot be read, where the config asks for it: DATASETS.SKIP_UNREADABLE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..checkpoint import write_whole
from .image_files import DECODERS, is_local
from .images import check_image, unreadable_allowed

LIST = "unreadable_images.txt"


def skip_unreadable(names: Sequence[str], folder: str) -> list[str]:
    """Decode each image of these datasets, and leave those out that do not exist, cannot be read, or have another
    size than their annotation. Call it in every process; the first one decodes.

    Args:
        names: of registered datasets, which are registered again without these images.
        folder: OUTPUT_DIR; the file unreadable_images.txt there lists what was left out, and why.

    Returns:
        in the first process, a sentence for the log on each dataset of which images were left out.
    """
    names = list(dict.fromkeys(names))
    found = {name: _unreadable(name) for name in names} if comm.is_main_process() else {}
    found = comm.all_gather(found)[0]
    for name in names:
        if found[name]:
            _leave_out(name, set(found[name]))
    if not comm.is_main_process() or not any(found.values()):
        return []
    return _listed(found, os.path.join(folder, LIST))


def _listed(found: dict[str, dict[str, str]], path: str) -> list[str]:
    lines = [f"{name}: {reason}\n" for name, reasons in found.items() for reason in reasons.values()]
    write_whole(path, lambda file: file.write("".join(lines).encode()))
    return [
        f"DATASETS.SKIP_UNREADABLE: {len(reasons)} images of dataset '{name}' are left out, listed in {path}; the "
        f"first: {next(iter(reasons.values()))}"
        for name, reasons in found.items()
        if reasons
    ]


def _unreadable(name: str) -> dict[str, str]:
    """What is wrong with the images of a dataset, by file name."""
    with unreadable_allowed():
        records = [
            record for record in DatasetCatalog.get(name) if "file_name" in record and is_local(record)
        ]
    with ThreadPoolExecutor(max_workers=DECODERS) as pool:
        reasons = list(pool.map(_reason, records))
    return {os.fspath(record["file_name"]): reason for record, reason in zip(records, reasons) if reason}


def _reason(record: dict[str, Any]) -> str:
    try:
        check_image(record)
    except ValueError as error:
        return str(error)
    return ""


def _leave_out(name: str, files: set[str]) -> None:
    load = unreadable_allowed()(DatasetCatalog[name])
    DatasetCatalog.pop(name)
    DatasetCatalog.register(
        name,
        lambda: [record for record in load() if os.fspath(record.get("file_name", "")) not in files],
    )
    ids = {record["image_id"] for record in load() if os.fspath(record.get("file_name", "")) in files}
    # For evaluators that read the annotations themselves.
    vars(MetadataCatalog.get(name))["left_out"] = frozenset(ids)
