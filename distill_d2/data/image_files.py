"""Check that the image files of a dataset exist, and decode a sample of them."""

from __future__ import annotations

import collections
import functools
import logging
import os
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .images import SKIPPING, check_image

logger = logging.getLogger(__name__)

DECODERS = 4  # threads
_SEED = 0
_ADDRESS = re.compile("[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def check_image_files(name: str, dicts: Sequence[dict[str, Any]], most: int, deep: bool) -> None:
    """Check the images that records name, except for addresses, which are logged.

    Args:
        name: of the dataset.
        dicts: its records.
        most: images that are decoded; the sample is always the same.
        deep: whether they may have more than 8 bits per channel.

    Raises:
        FileNotFoundError: some do not exist.
        ValueError: images are unreadable or not as large as their annotation says: how many, and the first.
    """
    named = [record for record in dicts if "file_name" in record]
    local = [record for record in named if is_local(record)]
    if len(local) < len(named):
        first = next(record["file_name"] for record in named if not is_local(record))
        logger.warning(
            f"Dataset '{name}': {len(named) - len(local)} file names are addresses, the first is '{first}'; they "
            "are not checked, and fetched when training comes to them"
        )
    _check_existence(name, [os.fspath(record["file_name"]) for record in local])
    _decode(name, random.Random(_SEED).sample(local, min(most, len(local))), deep)


def is_local(record: dict[str, Any]) -> bool:
    """Whether the record names no image by an address, such as s3://..."""
    return not _ADDRESS.match(os.fspath(record.get("file_name", "")))


def _check_existence(name: str, files: Sequence[str]) -> None:
    """One call per folder, not per file."""
    listings: dict[str, set[str]] = {}
    missing: list[str] = []
    for file in files:
        folder, base = os.path.split(file)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listings[folder]:
            missing.append(file)
    if missing:
        found = listings[os.path.dirname(missing[0])]
        is_address = "://" in missing[0]
        hint = " (an address below a folder is not a file; download the images)" if is_address else ""
        raise FileNotFoundError(
            f"dataset '{name}': {len(missing)} of {len(files)} images do not exist, the first is '{missing[0]}'"
            f"{hint}; its folder holds {sorted(found)[:3]}, {len(found)} files in all. {SKIPPING}"
        )


def _decode(name: str, sample: Sequence[dict[str, Any]], deep: bool) -> None:
    with ThreadPoolExecutor(max_workers=DECODERS) as pool:
        found = list(pool.map(functools.partial(_remarks_or_fault, deep=deep), sample))
    faults = [str(fault) for fault in found if isinstance(fault, ValueError)]
    if faults:
        more = f"; {len(faults)} of {len(sample)} images of dataset '{name}' cannot be used"
        raise ValueError(f"{faults[0]}{more * (len(faults) > 1)}. {SKIPPING}")
    files = collections.defaultdict(list)
    for record, remarks in zip(sample, found):
        for text in remarks if isinstance(remarks, list) else ():
            files[text].append(record["file_name"])
    for text, of_text in files.items():
        logger.warning(
            f"Dataset '{name}': {len(of_text)} of {len(sample)} images {text}, the first is '{of_text[0]}'"
        )


def _remarks_or_fault(record: dict[str, Any], deep: bool) -> list[str] | ValueError:
    try:
        return check_image(record, deep)
    except ValueError as error:
        return error
