"""Read COCO json files as other tools write them: training and evaluation see the same corrected content."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

from detectron2.utils.file_io import PathManager

from .coco_annotations import mend_annotations
from .coco_content import CocoContent, CocoSource
from .coco_ids import complete_categories, mend_categories, mend_images, mend_links
from .split import Share

#: The jsons that needed no correction when they were read, and their state then; a COCO json takes long to read.
_RIGHT: dict[str, tuple[int, int]] = {}
#: What ``kept_content`` keeps; None: nothing.
_KEPT: dict[CocoSource, tuple[tuple[int, int], CocoContent]] | None = None


@contextlib.contextmanager
def kept_content() -> Iterator[None]:
    """Inside, ``read_coco`` reads a json once, as long as the file does not change."""
    global _KEPT
    _KEPT = {}
    try:
        yield
    finally:
        _KEPT = None


def read_coco(source: CocoSource) -> CocoContent:
    """Read and correct a json. Do not change what it returns.

    Raises:
        ValueError: it is not json, or cannot be corrected; the message names the file and the id.
    """
    stamp = _stamp(source.json_file)
    if _KEPT and source in _KEPT and _KEPT[source][0] == stamp:
        return _KEPT[source][1]
    try:
        found = _parse(source.json_file)
        mend_categories(found)
        mend_images(found, source.images)
        if source.share is not None:
            _take_share(found, source.share)
        if found.annotations:
            mend_links(found)
        complete_categories(found, source.classes)
        if found.annotations:
            mend_annotations(found, source.corners)
    except (KeyError, TypeError, AssertionError, ValueError, IndexError, AttributeError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(
            f"cannot read '{source.json_file}' as COCO annotations (with images, categories and annotations): "
            f"{kind}{error}"
        ) from error
    if not (found.changes or source.corners or source.share):
        _RIGHT[source.json_file] = stamp
    if _KEPT is not None:
        _KEPT[source] = stamp, found
    return found


def is_right(source: CocoSource) -> bool:
    """Whether this process has read the json as it is now, and used it without any change."""
    plain = not source.corners and source.share is None and source.json_file in _RIGHT
    return plain and _RIGHT[source.json_file] == _stamp(source.json_file)


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(PathManager.get_local_path(file))
    return status.st_mtime_ns, status.st_size


def _parse(file: str) -> CocoContent:
    with open(PathManager.get_local_path(file), "rb") as stream:
        text = stream.read()
    try:
        content = json.loads(text)  # of bytes: any of the encodings of unicode
    except json.JSONDecodeError as error:
        raise ValueError(f"JSONDecodeError: {error}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected {{images: [...], ...}}")
    for key in ("categories", "images", "annotations"):
        items = content.get(key, [] if key == "annotations" else None)
        if not isinstance(items, list):
            raise ValueError(f"it has no list '{key}'; it holds {sorted(content)[:10]}")
        wrong = [item for item in items if not isinstance(item, dict)]
        if wrong:
            raise ValueError(f"'{key}' holds {wrong[0]!r:.80}, expected {{id: ..., ...}}")
    found = CocoContent(content)
    if not text[:64].lstrip().startswith(b"{"):
        found.changes.append("a byte order mark or another encoding than utf-8 was read")
    return found


def _take_share(found: CocoContent, share: Share) -> None:
    images = found.content["images"]
    kept = share.of([item["file_name"] for item in images])
    found.content["images"] = [item for item in images if item["file_name"] in kept]
    ids = {item["id"] for item in found.content["images"]}
    if found.annotations:
        found.content["annotations"] = [i for i in found.annotations if i.get("image_id") in ids]
