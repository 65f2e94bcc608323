"""What the datasets of a run hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.sample import has_objects

_MOST_CLASSES = 10


@dataclass(frozen=True)
class DatasetSummary:
    """Counts of a dataset.

    Attributes:
        use: "train", "test", or both.
        empty: images without objects to train on.
        objects: without crowds, by class, those without any included.
    """

    name: str
    use: str
    images: int
    empty: int
    objects: dict[str, int]


def summarize(names: Iterable[str], tested: Iterable[str]) -> list[DatasetSummary]:
    """The counts of training and test datasets."""
    uses: dict[str, list[str]] = {}
    for use, group in (("train", names), ("test", tested)):
        for name in group:
            uses.setdefault(name, []).append(use)
    return [_summarize(name, ", ".join(use)) for name, use in uses.items()]


def _summarize(name: str, use: str) -> DatasetSummary:
    records = DatasetCatalog.get(name)
    counts = Counter(
        item["category_id"]
        for record in records
        for item in record.get("annotations") or ()
        if not item.get("iscrowd", 0)
    )
    known = MetadataCatalog.get(name).get("thing_classes") or []
    classes = {
        label: str(known[label]) if label < len(known) else str(label) for label in sorted(counts)
    }
    objects = {**dict.fromkeys(known, 0), **{classes[label]: counts[label] for label in classes}}
    return DatasetSummary(name, use, len(records), sum(not has_objects(r) for r in records), objects)


def describe_classes(summary: DatasetSummary) -> str:
    """The most and the least frequent classes of a dataset, one line."""
    ordered = sorted(summary.objects.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count}" for name, count in ordered[:_MOST_CLASSES])
    more = len(ordered) - _MOST_CLASSES
    if more > 0:
        name, count = ordered[-1]
        shown += f", and {more} more, down to {name} {count}"
    return shown
