"""What a dataset holds, in one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ..messages import shortened
from .classes import classes_of

_HEADER = ["dataset", "used to", "images", "objects", "classes"]


@dataclass(frozen=True)
class DatasetSummary:
    """
    Attributes:
        images: their number.
        empty: the number of images without objects.
        objects: the number of objects of each class, by its name, in the order of the classes; crowds do not
            count.
    """

    name: str
    images: int
    empty: int
    objects: dict[str, int]


def summarize(name: str, records: Sequence[dict[str, Any]]) -> DatasetSummary:
    """Count what detectron2's dicts of a dataset hold."""
    of_images = [
        [item["category_id"] for item in record.get("annotations") or () if not item.get("iscrowd", 0)]
        for record in records
    ]
    counts = Counter(label for labels in of_images for label in labels)
    names = classes_of([name]) or [str(label) for label in range(max(counts, default=-1) + 1)]
    return DatasetSummary(
        name,
        len(records),
        sum(not labels for labels in of_images),
        {label: counts[number] for number, label in enumerate(names)},
    )


def summary_table(rows: Iterable[tuple[DatasetSummary, str]]) -> str:
    """A row per dataset, with what it is used to do: "train", "test"."""
    cells = [
        [
            row.name,
            use,
            f"{row.images}{f' ({row.empty} empty)' if row.empty else ''}",
            sum(row.objects.values()),
            _classes(row.objects),
        ]
        for row, use in rows
    ]
    return tabulate(cells, headers=_HEADER, tablefmt="pipe")


def _classes(objects: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in objects.items())
    return f"{len(objects)}: {shortened(listed, 60)}" if objects else "not known"
