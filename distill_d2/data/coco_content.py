"""The content of a COCO json, and what is noted or refused of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .split import Share


@dataclass(frozen=True)
class CocoSource:
    """Where the annotations of a dataset are.

    Attributes:
        json_file: in COCO's form.
        images: the folder that its file names are relative to.
        corners: whether its boxes are x0, y0, x1, y1 instead of COCO's x, y, width, height.
        share: the part of the images that belongs to the dataset; None: all.
        classes: names of all categories in the order of their ids; the json may lack some. None: any.
    """

    json_file: str
    images: str
    corners: bool = False
    share: Share | None = None
    classes: tuple[str, ...] | None = None


@dataclass
class CocoContent:
    """The content of a json, corrected.

    Attributes:
        content: as in the file; ids, ``area``, ``iscrowd`` and ``bbox`` are complete, image sizes are numbers.
        changes: what was corrected, in words.
    """

    content: dict[str, Any]
    changes: list[str] = field(default_factory=list)

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.content.get("annotations") or []

    def note(self, count: int, change: str) -> None:
        """Note a change, in words with a place {} for how many there are, if there are any."""
        if count:
            self.changes.append(change.format(count))

    def keep(self, kept: Iterable[bool], change: str) -> None:
        """Drop the other annotations, and note how many these are."""
        before = len(self.annotations)
        self.content["annotations"] = [item for item, keep in zip(self.annotations, kept) if keep]
        self.note(before - len(self.annotations), change)

    def refuse(self, wrong: Sequence[dict[str, Any]], what: str, key: str, advice: str) -> None:
        """Raises ValueError if there are ``wrong`` annotations: how many, the first with its ``key``, and what to
        do."""
        if wrong:
            first = wrong[0]
            raise ValueError(
                f"{len(wrong)} of {len(self.annotations)} annotations {what}, the first is that of id "
                f"{first.get('id')!r}, image_id {first.get('image_id')!r}, {key} {first.get(key)!r:.80}; {advice}"
            )
