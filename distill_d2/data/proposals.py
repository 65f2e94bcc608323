"""Files of precomputed proposals (DATASETS.PROPOSAL_FILES_*), read without running their code."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
from detectron2.data import build as detectron2_build
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..checkpoint import read_arrays

logger = logging.getLogger(__name__)

_OF_DETECTRON_1 = {"indexes": "ids", "scores": "objectness_logits"}
_KEYS = ("ids", "boxes", "objectness_logits")
_KIND = "file of proposals"
_MODES = [BoxMode.XYXY_ABS.value, BoxMode.XYWH_ABS.value]


def load_proposals(dataset_dicts: list[dict[str, Any]], proposal_file: str) -> list[dict[str, Any]]:
    """detectron2's load_proposals_into_dataset, through an unpickler that knows numpy arrays alone.

    Args:
        dataset_dicts: of one dataset; the proposals of each image are added, the best first.
        proposal_file: path or address of a pickled dict: ids (I), boxes (I arrays (N, 4)),
            objectness_logits (I arrays (N,)), bbox_mode (by default XYXY_ABS).

    Raises:
        OSError, ValueError: the file cannot be read, or does not fit the dataset; the message names it.
    """
    logger.info(f"Loading proposals from {proposal_file}")
    proposals = read_proposals(proposal_file)
    places = {str(name): place for place, name in enumerate(proposals["ids"])}
    missing = [r["image_id"] for r in dataset_dicts if str(r["image_id"]) not in places]
    if missing:
        raise ValueError(
            f"the {_KIND} '{proposal_file}' lacks {len(missing)} of the dataset's {len(dataset_dicts)} images, "
            f"the first has the id {missing[0]!r}; its ids begin with {list(places)[:3]}. Give one file for each "
            "dataset, in the order of the datasets"
        )
    for record in dataset_dicts:
        place = places[str(record["image_id"])]
        boxes, logits = proposals["boxes"][place], proposals["objectness_logits"][place]
        order = logits.argsort()[::-1]
        record["proposal_boxes"] = boxes[order]
        record["proposal_objectness_logits"] = logits[order]
        record["proposal_bbox_mode"] = proposals["bbox_mode"]
    return dataset_dicts


def read_proposals(path: str) -> dict[str, Any]:
    """The content of a file of proposals: ids, boxes, objectness_logits, and bbox_mode as a BoxMode.

    Raises:
        OSError, ValueError: it cannot be read, or holds something else; the message names it.
    """
    local = PathManager.get_local_path(path) if "://" in path else path
    if not os.path.isfile(local):
        raise FileNotFoundError(f"the {_KIND} '{path}' does not exist")
    content = read_arrays(local, _KIND)
    if not isinstance(content, dict):
        raise ValueError(f"the {_KIND} '{path}' holds a {type(content).__name__}, not a dict of {_KEYS}")
    proposals = {_OF_DETECTRON_1.get(str(key), str(key)): value for key, value in content.items()}
    lacking = [key for key in _KEYS if key not in proposals]
    if lacking:
        raise ValueError(f"the {_KIND} '{path}' lacks {lacking}; it has {sorted(map(str, content))}")
    _check_lengths(proposals, path)
    mode = proposals.get("bbox_mode", BoxMode.XYXY_ABS.value)
    if mode not in _MODES:
        raise ValueError(f"the {_KIND} '{path}' has bbox_mode {mode!r}; expected one of {_MODES}")
    proposals["bbox_mode"] = BoxMode(mode)
    return proposals


def _check_lengths(proposals: dict[str, Any], path: str) -> None:
    lists = {key: proposals[key] for key in _KEYS}
    lengths = {
        key: len(v) if isinstance(v, (list, tuple, np.ndarray)) else f"not a list, but {v!r:.50}"
        for key, v in lists.items()
    }
    if len(set(lengths.values())) > 1 or not isinstance(lengths["ids"], int):
        raise ValueError(
            f"the {_KIND} '{path}': expected lists of one length, an entry for each image; found {lengths}"
        )
    for name, boxes, logits in zip(*lists.values()):
        shapes = [getattr(value, "shape", type(value).__name__) for value in (boxes, logits)]
        if shapes != [(np.size(logits), 4), (np.size(logits),)]:
            raise ValueError(
                f"the {_KIND} '{path}': image {name!r} has boxes and objectness_logits of {shapes}; expected "
                "arrays of (N, 4) and (N,)"
            )
        if not all(value.dtype.kind in "fiu" and np.isfinite(value).all() for value in (boxes, logits)):
            raise ValueError(
                f"the {_KIND} '{path}': image {name!r} has boxes or objectness_logits that are not finite numbers"
            )


# detectron2's function unpickles whatever the file names. Replaced there, all that reach it are safe: yaml
# and LazyConfigs, training and tests.
detectron2_build.load_proposals_into_dataset = load_proposals
