"""Choose few records of a dataset that stand for all of it."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Hashable, Sequence
from typing import Any

_SEED = 0


def varied_sample(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` records of all kinds in turn, each kind in a random but fixed order; all of them, in
    their own order, if there are not more. See ``record_kind``."""
    if len(records) <= count:
        return list(records)
    order = random.Random(_SEED).sample(range(len(records)), len(records))
    kinds: dict[Hashable, list[int]] = {}
    for index in [0, len(records) - 1, *order]:  # faults at the ends are common
        kinds.setdefault(record_kind(records[index]), []).append(index)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    distinct = dict.fromkeys(index for index in turns if index is not None)
    return [records[index] for index in itertools.islice(distinct, count)]


def record_kind(record: dict[str, Any]) -> Hashable:
    """What a mapper may treat differently: the suffix of the image, and whether it has objects, crowds, masks
    (polygons or RLE, of all or some objects) and keypoints."""
    found = objects(record)
    masks = {type(item.get("segmentation")).__name__ for item in found if has(item, "segmentation")}
    return (
        os.path.splitext(str(record.get("file_name")))[1].lower(),
        len(found) > 0,
        len(found) < len(record.get("annotations") or ()),
        tuple(sorted(masks)),
        tuple({has(item, "segmentation") for item in found}),
        tuple({has(item, "keypoints") for item in found}),
    )


def objects(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations of a record that are not crowds."""
    return [item for item in record.get("annotations") or () if not item.get("iscrowd")]


def has_objects(record: dict[str, Any]) -> bool:
    return bool(objects(record))


def has(item: dict[str, Any], key: str) -> bool:
    """Whether an annotation has a mask or keypoints, as a list, dict or array, that are not empty."""
    value = item.get(key)
    return value is not None and len(value) > 0
