"""Read COCO json files as other tools write them: training and evaluation see the same mended content."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.utils.file_io import PathManager

from .images import image_size
from .split import Share

#: The jsons that needed no mending when they were read, and their state then; a COCO json takes long to read.
_RIGHT: dict[str, tuple[int, int]] = {}
#: What ``kept_content`` keeps; None: nothing.
_KEPT: dict[CocoSource, tuple[tuple[int, int], CocoContent]] | None = None
_LARGEST_ID = 2**63 - 1  # of detectron2's evaluation in C++


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
    """The content of a json, mended.

    Attributes:
        content: as in the file; ids, ``area``, ``iscrowd`` and ``bbox`` are complete, image sizes are numbers.
        changes: what was mended, in words.
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
    """Read and mend a json. Do not change what it returns.

    Raises:
        ValueError: it is not json, or lacks what cannot be mended; the message names the file and the id.
    """
    stamp = _stamp(source.json_file)
    if _KEPT and source in _KEPT and _KEPT[source][0] == stamp:
        return _KEPT[source][1]
    try:
        found = _parse(source.json_file)
        _mend_categories(found)
        _mend_images(found, source)
        if source.share is not None:
            _take_share(found, source.share)
        if found.annotations:
            _mend_links(found)
        _complete_categories(found, source.classes)
        if found.annotations:
            _mend_masks(found)
            _mend_boxes(found, source.corners)
            _mend_numbers(found)
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
    for key in ("categories", "images"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"it has no list '{key}'; it holds {sorted(content)[:10]}")
    if not isinstance(content.get("annotations", []), list):
        raise ValueError("its 'annotations' are not a list")
    for key in ("categories", "images", "annotations"):
        wrong = [item for item in content.get(key, ()) if not isinstance(item, dict)]
        if wrong:
            raise ValueError(f"'{key}' holds {wrong[0]!r}, expected {{id: ..., ...}}")
    found = CocoContent(content)
    if not text[:64].lstrip().startswith(b"{"):
        found.changes.append("a byte order mark or another encoding than utf-8 was read")
    return found


def _mend_categories(found: CocoContent) -> None:
    items = found.content["categories"]
    if not items:
        raise ValueError("its list of categories is empty")
    for item in items:
        if item.get("id") is None or item.get("name") in (None, ""):
            raise ValueError(f"a category has no id or no name: {item}")
    _one_kind_of_id(found, items, "categories", prefer_numbers=True)
    for key in ("id", "name"):
        first: dict[Any, dict] = {}
        for item in items:
            other = first.setdefault(item[key], item)
            if other is not item:
                raise ValueError(
                    f"two categories have the {key} {item[key]!r}: {_short(other)} and {_short(item)}; give "
                    "them different ones, or remove one that has no annotations"
                )
    for item in items:
        if not isinstance(item["name"], str):
            item["name"] = str(item["name"])
            found.changes.append(f"the category's name {item['name']} is taken as text")


def _complete_categories(found: CocoContent, classes: Sequence[str] | None) -> None:
    """Add the categories of ``classes`` that the json lacks; the order of ids stays that of ``classes``."""
    items = {
        item["name"]: item for item in sorted(found.content["categories"], key=lambda item: item["id"])
    }
    lacking = [name for name in classes or () if name not in items]
    if not lacking or [name for name in classes or () if name in items] != list(items):
        return
    numbers = {items[name]["id"]: number for number, name in enumerate(classes or ()) if name in items}
    for item in found.annotations:
        item["category_id"] = numbers[item["category_id"]]
    found.content["categories"] = [
        {**items.get(name, {"name": name}), "id": number} for number, name in enumerate(classes or ())
    ]
    found.changes.append(f"its categories lack {lacking[:10]} of CLASSES")


def _short(category: dict[str, Any]) -> dict[str, Any]:
    return {key: category[key] for key in ("id", "name", "supercategory") if key in category}


def _mend_images(found: CocoContent, source: CocoSource) -> None:
    items = found.content["images"]
    for item in items:
        if item.get("id") is None:
            raise ValueError(f"the image {item.get('file_name')!r} has no id")
        if not isinstance(item.get("file_name"), str) or not item["file_name"]:
            raise ValueError(
                f"the image of id {item['id']!r} has no file_name, but {sorted(item)}"
                if item.get("file_name") is None
                else f"the image of id {item['id']!r} has the file_name {item['file_name']!r}"
            )
    _one_kind_of_id(found, items, "images")
    first: dict[Any, str] = {}
    for item in items:
        if item["id"] in first:
            repeats = len(items) - len({other["id"] for other in items})
            raise ValueError(
                f"{repeats} image ids are repeated; '{first[item['id']]}' and '{item['file_name']}' have the id "
                f"{item['id']!r}, so that annotations of one would be those of both; give each image its own"
            )
        first[item["id"]] = item["file_name"]
    _mend_sizes(found, source)
    _mend_separators(found, source)


def _mend_sizes(found: CocoContent, source: CocoSource) -> None:
    count = 0
    for item in found.content["images"]:
        if type(item.get("width")) is int and type(item.get("height")) is int:
            continue
        count += 1
        sides = [_whole(item.get(key)) for key in ("height", "width")]
        if None in sides:
            sides = list(image_size(os.path.join(source.images, item["file_name"])))
        item["height"], item["width"] = sides
    found.note(count, "{} image sizes were missing or not integers")


def _whole(value: Any) -> int | None:
    """The number of pixels that a text or float says; None if it does not."""
    try:
        return int(value) if int(value) == float(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _mend_separators(found: CocoContent, source: CocoSource) -> None:
    r"""Names of Windows, sub\image.jpg."""
    for item in found.content["images"]:
        name = item["file_name"]
        if "\\" in name and not os.path.exists(os.path.join(source.images, name)):
            item["file_name"] = name.replace("\\", "/")


def _take_share(found: CocoContent, share: Share) -> None:
    images = found.content["images"]
    kept = share.of([item["file_name"] for item in images])
    found.content["images"] = [item for item in images if item["file_name"] in kept]
    ids = {item["id"] for item in found.content["images"]}
    if found.annotations:
        found.content["annotations"] = [i for i in found.annotations if i.get("image_id") in ids]


def _one_kind_of_id(
    found: CocoContent, items: list[dict[str, Any]], key: str, prefer_numbers: bool = False
) -> None:
    """Make ids all integers or all texts: pycocotools mixes up others."""
    kinds = {type(item["id"]) for item in items}
    if kinds <= {int} or kinds == {str} and not prefer_numbers:
        return
    numbers = [_whole(item["id"]) if type(item["id"]) is not bool else None for item in items]
    if None not in numbers:
        ids: list[Any] = numbers
    elif kinds == {str}:
        return
    else:
        ids = [str(item["id"]) for item in items]
    for item, new in zip(items, ids):
        item["id"] = new
    found.changes.append(f"the ids of {key} were converted to {type(ids[0]).__name__}")


def _mend_links(found: CocoContent) -> None:
    """Ids of images and categories in annotations, of another type than there; those of no image."""
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {item["id"] for item in found.content[section]}
        lacking = [item for item in found.annotations if item.get(key) is None]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(found.annotations)} annotations have no {key}, the first is "
                f"{describe(lacking[0])}"
            )
        strange = [item for item in found.annotations if _unknown(item[key], known)]
        by_text = {str(number): number for number in known} if strange else {}
        mended = [item for item in strange if _text(item[key]) in by_text]
        for item in mended:
            item[key] = by_text[_text(item[key])]
        if mended:
            found.changes.append(f"{len(mended)} {key}s were of another type than the ids of {section}")
    labels = {item["id"] for item in found.content["categories"]}
    wrong = [item for item in found.annotations if _unknown(item["category_id"], labels)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(found.annotations)} annotations have a category_id without a category, the "
            f"first is {describe(wrong[0])} with category_id={wrong[0]['category_id']!r}; the categories' ids are "
            f"{sorted(labels)[:20]}"
        )
    images = {item["id"] for item in found.content["images"]}
    kept = [not _unknown(item["image_id"], images) for item in found.annotations]
    if not any(kept):
        raise ValueError(
            f"none of the {len(kept)} annotations belongs to an image: the first has image_id "
            f"{found.annotations[0]['image_id']!r}, the images have ids like {list(images)[:3]}"
        )
    found.keep(kept, "{} annotations of no image were dropped")


def _unknown(value: Any, known: set) -> bool:
    return isinstance(value, (list, dict)) or value not in known


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def describe(item: dict[str, Any]) -> str:
    """An annotation, for messages."""
    return f"the annotation of id {item.get('id')!r}, image_id {item.get('image_id')!r},"


def _check_rle(item: dict[str, Any], mask: dict[str, Any]) -> None:
    """pycocotools waits forever for runs that do not fill the image."""
    size, counts = mask.get("size"), mask.get("counts")
    right = isinstance(size, list) and [type(edge) for edge in size] == [int, int]
    if isinstance(counts, list):
        whole = all(type(run) is int and run >= 0 for run in counts)
        right = right and whole and sum(counts) == math.prod(size or ())
    else:
        right = right and isinstance(counts, str)
    if not right:
        raise ValueError(
            f"{describe(item)} has the RLE {mask!r:.80}; expected a size of height and width, and counts: a text, "
            "or a list whose sum is the number of pixels"
        )


def _mend_masks(found: CocoContent) -> None:
    """Polygons nested otherwise or of fewer than three points; as in detectron2, an instance without another
    polygon is dropped, but its box stays where no annotation has a mask."""
    masks = [item for item in found.annotations if item.get("segmentation")]
    nested, shortened, without = 0, 0, set()
    for item in masks:
        mask = item["segmentation"]
        if isinstance(mask, dict):
            _check_rle(item, mask)
            continue
        if not isinstance(mask, list):
            raise ValueError(
                f"{describe(item)} has the segmentation {mask!r}; expected polygons or an RLE"
            )
        polygons = _polygons(mask)
        nested += polygons != mask
        right = [
            each for each in polygons if len(each) >= 6 and not len(each) % 2 and _are_numbers(each)
        ]
        shortened += len(polygons) - len(right)
        item["segmentation"] = right
        if not right:
            without.add(id(item))
    found.note(nested, "{} polygons of another nesting were flattened")
    found.note(shortened, "{} polygons of fewer than 3 points, or not of numbers, were ignored")
    if len(without) < len(masks):
        kept = [id(item) not in without for item in found.annotations]
        found.keep(kept, "{} annotations without another polygon were dropped")


def _polygons(mask: list) -> list[list]:
    """Lists of numbers [x, y, ...] of a mask that is one, or has pairs [x, y] in it."""
    if not isinstance(mask[0], list):
        return [mask]
    if len(mask) >= 3 and all(isinstance(each, list) and len(each) == 2 for each in mask):
        return [list(itertools.chain(*mask))]
    return [
        list(itertools.chain(*each)) if each and isinstance(each[0], list) else each for each in mask
    ]


def _are_numbers(values: Iterable[Any]) -> bool:
    """Whether all are finite numbers."""
    try:
        return all(map(math.isfinite, values))
    except TypeError:
        return False


def _mend_boxes(found: CocoContent, corners: bool) -> None:
    """Boxes from masks where they lack; those without area are dropped."""
    lacking = [item for item in found.annotations if _lacks_box(item)]
    for item in lacking:
        if not item.get("segmentation"):
            raise ValueError(f"{describe(item)} has an empty bbox or none, and no mask: {sorted(item)}")
        item["bbox"] = _box_of_mask(item["segmentation"])
    found.note(len(lacking), "{} boxes were missing, those of the masks are used")
    boxes = _as_array(found)
    wrong = ~np.isfinite(boxes).all(axis=1)
    if wrong.any():
        first = found.annotations[int(wrong.argmax())]
        raise ValueError(
            f"{wrong.sum()} of {len(wrong)} boxes hold NaN or inf, the first is {describe(first)} "
            f"{first['bbox']}; remove or mend them"
        )
    if corners:
        from_masks = set(map(id, lacking))
        rows = [id(item) not in from_masks for item in found.annotations]
        boxes[rows, 2:] -= boxes[rows, :2]
        for item, box in zip(found.annotations, boxes.tolist()):
            item["bbox"] = box
    found.keep((boxes[:, 2:].min(axis=1) > 0).tolist(), "dropped {} boxes without area")


def _lacks_box(item: dict[str, Any]) -> bool:
    box = item.get("bbox")
    return box is None or isinstance(box, (list, str)) and not box


def _box_of_mask(mask: Any) -> list[float]:
    if isinstance(mask, dict):
        rle = mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
        return mask_util.toBbox(rle).tolist()
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in mask])
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def _as_array(found: CocoContent) -> np.ndarray:
    """All boxes, (N, 4), float64."""
    try:
        boxes = np.array([item["bbox"] for item in found.annotations])
    except ValueError:  # of different lengths
        boxes = np.empty(0)
    if boxes.dtype.kind in "iuf" and boxes.shape == (len(found.annotations), 4):
        return boxes.astype(np.float64)
    count = 0
    for item in found.annotations:
        try:
            box = [float(number) for number in item["bbox"]]
        except (TypeError, ValueError):
            box = []
        if len(box) != 4:
            raise ValueError(f"{describe(item)} has the bbox {item['bbox']!r}; expected 4 numbers")
        count += any(isinstance(number, str) for number in item["bbox"])
        item["bbox"] = box
    found.changes.append(f"{count} boxes of text were read as numbers")
    return np.array([item["bbox"] for item in found.annotations], np.float64)


def _mend_numbers(found: CocoContent) -> None:
    """Ids, crowd flags, areas and numbers of visible keypoints, which pycocotools needs."""
    items = found.annotations
    ignored = [item for item in items if item.get("ignore")]
    if ignored:
        raise ValueError(
            f"{len(ignored)} annotations have 'ignore', which detectron2 does not support, the first is "
            f"{describe(ignored[0])[:-1]}; set iscrowd 1 instead, or remove them"
        )
    ids = [item.get("id") for item in items]
    if not all(type(i) is int and 0 < i <= _LARGEST_ID for i in ids) or len(set(ids)) < len(ids):
        for number, item in enumerate(items, 1):
            item["id"] = number
        found.changes.append(
            "annotation ids were missing, repeated, too large or below 1 (evaluation would take those for "
            f"missed): {len(items)} were numbered from 1"
        )
    _mend_crowds(found)
    lacking = [item for item in items if not _is_area(item.get("area"))]
    for item in lacking:
        item["area"] = area(item)
    found.note(len(lacking), "{} areas were missing, those of the masks or boxes are used")
    with_points = [item for item in items if item.get("keypoints")]
    wrong = [item for item in with_points if not _are_numbers(item["keypoints"])]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(with_points)} annotations have keypoints that are not numbers, the first is "
            f"{describe(wrong[0])} with {str(wrong[0]['keypoints'])[:80]}; expected x, y, visibility, ..."
        )
    lacking = [item for item in with_points if type(item.get("num_keypoints")) is not int]
    for item in lacking:
        item["num_keypoints"] = sum(visible > 0 for visible in item["keypoints"][2::3])
    found.note(len(lacking), "{} num_keypoints were missing and are counted")


def _mend_crowds(found: CocoContent) -> None:
    lacking = [item for item in found.annotations if item.get("iscrowd") not in (0, 1)]
    for item in lacking:
        flag = item.get("iscrowd")
        if flag not in (None, "", "0", "1"):
            raise ValueError(f"{describe(item)} has iscrowd {flag!r}; expected 0 or 1")
        item["iscrowd"] = int(flag or 0)
    found.note(len(lacking), "{} iscrowd were missing or not numbers (missing: 0)")


def _is_area(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def area(item: dict[str, Any]) -> float:
    """Of an annotation in COCO's form: of its mask (polygons or RLE), or else of its box."""
    mask = item.get("segmentation")
    if isinstance(mask, dict):
        rle = mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
        return float(mask_util.area(rle))
    if mask:
        return float(sum(map(_polygon_area, mask)))
    return float(item["bbox"][2] * item["bbox"][3])


def _polygon_area(polygon: Sequence[float]) -> float:
    """By the shoelace formula."""
    points = list(zip(polygon[::2], polygon[1::2]))
    following = [*points[1:], points[0]]
    return 0.5 * abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, following)))
