"""Names of keypoints, and which of them a horizontal flip exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from .sample import has

_SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))


def set_keypoint_metadata(
    name: str,
    categories: Sequence[dict[str, Any]],
    keypoints: Sequence[str] | None = None,
    flips: Sequence[Sequence[str]] | None = None,
) -> None:
    """Set ``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules`` of a dataset, where its
    metadata lacks them and they are known.

    Args:
        name: of the dataset.
        categories: of a COCO json.
        keypoints: their names; None: those of the first category that has any.
        flips: pairs of names; None: those of which one says "left" and the other "right", if there are any.

    Raises:
        ValueError: a pair names a keypoint that does not exist.
    """
    metadata = MetadataCatalog.get(name)
    described = next((category for category in categories if category.get("keypoints")), {})
    names = list(keypoints or metadata.get("keypoint_names") or described.get("keypoints") or ())
    if not names:
        return
    pairs = _pairs(names) if flips is None else [tuple(pair) for pair in flips]
    unknown = sorted({key for pair in pairs for key in pair} - set(names))
    if unknown:
        raise ValueError(
            f"dataset '{name}': FLIPS names the keypoints {unknown}, which are not in {names}"
        )
    values: dict[str, Any] = {"keypoint_names": names}
    if pairs or flips is not None:
        values["keypoint_flip_map"] = pairs
    lines = [line for line in described.get("skeleton") or () if max(line) <= len(names)]
    values["keypoint_connection_rules"] = [(names[a - 1], names[b - 1], (0, 160, 255)) for a, b in lines]
    metadata.set(**{key: value for key, value in values.items() if metadata.get(key) is None})


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Keypoints on the left, each with the one on the right."""
    pairs = []
    for name in names:
        others = [name.replace(left, right) for left, right in _SIDES if left in name]
        pairs += [(name, other) for other in others if other in names]
    return pairs


def check_keypoints(dataset: str, records: Sequence[dict[str, Any]], count: int, least: int) -> None:
    """Check that a training dataset names and has the keypoints that a model with MODEL.KEYPOINT_ON learns.

    Args:
        dataset: its name.
        records: its detectron2 dicts.
        count: the model's number of keypoints.
        least: visible keypoints of an image that is trained on: MIN_KEYPOINTS_PER_IMAGE.

    Raises:
        ValueError: names or pairs are missing, the number is not the model's, or no image has enough of them.
    """
    metadata = MetadataCatalog.get(dataset)
    names = metadata.get("keypoint_names")
    if not names:
        raise ValueError(
            f"MODEL.KEYPOINT_ON is True, but dataset '{dataset}' does not name its keypoints; add KEYPOINTS: "
            "[nose, ...] to its entry in DATASETS.CUSTOM, or keypoint_names to its metadata"
        )
    if len(names) != count:
        raise ValueError(
            f"dataset '{dataset}' has {len(names)} keypoints ({', '.join(names[:5])}, ...), but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}; set it to {len(names)}"
        )
    flips = metadata.get("keypoint_flip_map")
    if flips is None:
        raise ValueError(
            f"dataset '{dataset}' does not say which keypoints a horizontal flip (INPUT.RANDOM_FLIP) exchanges; "
            "add FLIPS: [[left_eye, right_eye], ...] to its entry in DATASETS.CUSTOM ([] for none), or "
            "keypoint_flip_map to its metadata"
        )
    unknown = sorted({key for pair in dict(flips).items() for key in pair} - set(names))
    if unknown:
        raise ValueError(
            f"dataset '{dataset}': keypoint_flip_map names {unknown}; its keypoints are {list(names)}"
        )
    _check_points(dataset, records, count, least)


def _check_points(dataset: str, records: Sequence[dict[str, Any]], count: int, least: int) -> None:
    most = 0
    for record in records:
        points = [i["keypoints"] for i in record.get("annotations") or () if has(i, "keypoints")]
        wrong = next((each for each in points if len(each) != 3 * count), None)
        if wrong is not None:
            raise ValueError(
                f"dataset '{dataset}': an object of the image '{record.get('file_name')}' has {len(wrong)} "
                f"numbers as keypoints; expected x, y and visibility of {count}, {3 * count} numbers"
            )
        most = max(most, sum(visible > 0 for each in points for visible in each[2::3]))
    if most < least:
        raise ValueError(
            f"dataset '{dataset}': no image has more than {most} visible keypoints; images of fewer than "
            f"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE ({least}) are not trained on"
        )
