"""Correct the categories and images of a COCO json, and the ids by which annotations name them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .coco_content import CocoContent
from .images import image_size


def mend_categories(found: CocoContent) -> None:
    """Ids become integers where they can, names text. Raises ValueError if one is missing or repeated."""
    items = found.content["categories"]
    if not items:
        raise ValueError("its list of categories is empty")
    for item in items:
        if item.get("id") is None or item.get("name") in (None, ""):
            raise ValueError(f"a category has no id or no name: {item}")
    _one_kind_of_id(found, items, "categories", prefer_numbers=True)
    for key in ("id", "name"):
        same = _first_repeated(items, key)
        if same:
            raise ValueError(
                f"two categories have the {key} {same[0][key]!r}: {_short(same[0])} and {_short(same[1])}; give "
                "them different ones, or remove one that has no annotations"
            )
    for item in items:
        if not isinstance(item["name"], str):
            item["name"] = str(item["name"])
            found.changes.append(f"the category's name {item['name']} is taken as text")


def complete_categories(found: CocoContent, classes: Sequence[str] | None) -> None:
    """Add the categories of ``classes`` that the json lacks, if the others are in the same order."""
    items = {
        item["name"]: item for item in sorted(found.content["categories"], key=lambda item: item["id"])
    }
    kept = [name for name in classes or () if name in items]
    if classes is None or len(kept) == len(classes) or kept != list(items):
        return
    numbers = {items[name]["id"]: number for number, name in enumerate(classes) if name in items}
    for item in found.annotations:
        item["category_id"] = numbers[item["category_id"]]
    found.content["categories"] = [
        {**items.get(name, {"name": name}), "id": number} for number, name in enumerate(classes)
    ]
    lacking = [name for name in classes if name not in items]
    found.changes.append(f"its categories lack {lacking[:10]} of CLASSES")


def mend_images(found: CocoContent, folder: str) -> None:
    r"""Sizes become integers, those of the files in ``folder`` where they are missing; names of Windows,
    sub\image.jpg, paths. Raises ValueError if an id or name is missing, or an id is repeated."""
    items = found.content["images"]
    for item in items:
        if item.get("id") is None:
            raise ValueError(f"the image {item.get('file_name')!r} has no id")
        if not isinstance(item.get("file_name"), str) or not item["file_name"]:
            raise ValueError(
                f"the image of id {item['id']!r} has no file_name, or it is not text: {item}"
            )
    _one_kind_of_id(found, items, "images")
    same = _first_repeated(items, "id")
    if same:
        raise ValueError(
            f"image ids are repeated: '{same[0]['file_name']}' and '{same[1]['file_name']}' have the id "
            f"{same[0]['id']!r}, so that annotations of one would be those of both; give each image its own"
        )
    for item in items:
        name = item["file_name"]
        if "\\" in name and not os.path.exists(os.path.join(folder, name)):
            item["file_name"] = name.replace("\\", "/")
    wrong = [item for item in items if not type(item.get("width")) is type(item.get("height")) is int]
    for item in wrong:
        sides = [_whole(item.get(key)) for key in ("height", "width")]
        if None in sides:
            sides = list(image_size(os.path.join(folder, item["file_name"])))
        item["height"], item["width"] = sides
    found.note(len(wrong), "{} image sizes were missing or not integers")


def mend_links(found: CocoContent) -> None:
    """Ids of images and categories in annotations get the type that they have there; annotations of no image are
    dropped. Raises ValueError if an id is missing, if there is no such category, or if no annotation is left."""
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        lacking = [item for item in found.annotations if item.get(key) is None]
        found.refuse(lacking, f"have no {key}", key, "add it")
        strange = _unknown(found, key, section)
        by_text = {str(item["id"]): item["id"] for item in found.content[section]} if strange else {}
        mended = [item for item in strange if _text(item[key]) in by_text]
        for item in mended:
            item[key] = by_text[_text(item[key])]
        found.note(len(mended), f"{{}} {key}s were of another type than the ids of {section}")
    labels = sorted(item["id"] for item in found.content["categories"])
    found.refuse(
        _unknown(found, "category_id", "categories"),
        "have a category_id without a category",
        "category_id",
        f"the categories' ids are {labels[:20]}",
    )
    lost = _unknown(found, "image_id", "images")
    if len(lost) == len(found.annotations):
        ids = [item["id"] for item in found.content["images"][:3]]
        raise ValueError(
            f"none of the {len(lost)} annotations belongs to an image: the first has image_id "
            f"{lost[0]['image_id']!r}, the images have ids like {ids}"
        )
    dropped = set(map(id, lost))
    found.keep(
        (id(item) not in dropped for item in found.annotations), "dropped {} annotations of no image"
    )


def _unknown(found: CocoContent, key: str, section: str) -> list[dict[str, Any]]:
    """The annotations whose ``key`` is not an id of the section."""
    known = {item["id"] for item in found.content[section]}
    return [item for item in found.annotations if item[key] not in known]


def _one_kind_of_id(
    found: CocoContent, items: list[dict[str, Any]], section: str, prefer_numbers: bool = False
) -> None:
    """Make ids all integers or all texts: pycocotools mixes up others."""
    kinds = {type(item["id"]) for item in items}
    if kinds <= {int} or kinds == {str} and not prefer_numbers:
        return
    ids: list[Any] = [_whole(item["id"]) for item in items]
    if None in ids:
        if kinds == {str}:
            return
        ids = [str(item["id"]) for item in items]
    for item, new in zip(items, ids):
        item["id"] = new
    found.changes.append(f"the ids of {section} were converted to {type(ids[0]).__name__}")


def _first_repeated(items: Sequence[dict[str, Any]], key: str) -> tuple[dict, dict] | None:
    """The first two items with the same value; None if all differ."""
    first: dict[Any, dict] = {}
    for item in items:
        other = first.setdefault(item[key], item)
        if other is not item:
            return other, item
    return None


def _short(category: dict[str, Any]) -> dict[str, Any]:
    return {key: category[key] for key in ("id", "name", "supercategory") if key in category}


def _whole(value: Any) -> int | None:
    """The integer that a text or float says; None if it does not."""
    try:
        return int(value) if int(value) == float(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
