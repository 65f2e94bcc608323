"""A golden fixture of DeFeat and FGFI in another configuration, from the naive version; nothing of the
package.

Three images, the second without boxes; four levels, of sizes that are no multiples; other channels,
classes and rows; an IoU threshold beside FGFI's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import naive_defeat as naive
import naive_masks
import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]

STRIDES = {f"P{level}": 2**level for level in (2, 3, 4, 5)}
STAGES = {f"C{level}": 2**level for level in (3, 4, 5)}
INPUTS = ("mask_gt_boxes_", "kd_gt_boxes_", "neck_", "adapt_", "bb_student_", "bb_teacher_", "cls_")
MASK_PADDED, PADDED = (160, 248), (116, 148)
MASK_BOXES = [
    [[3, 5, 113.9, 115], [3, 5, 114, 116], [-20, -60, 260, 70], [40, 7, 40, 90], [100, 50, 101, 51]],
    [],
    [[200, 99, 300, 300], [248, 20, 248, 60], [248, 160, 248, 160], [0, 9, 99, 9], [-99, 70, 150, 2e3]],
    [[-30, -20, 70, 60.5], [-5, 3, 236, 216]],
]
BOXES = [  # one is of the second level, none of those after it
    [[4, 6, 40.5, 31], [50.25, 20, 103, 71], [60, 60, 61, 61]],
    [],
    [[0, 0, 148, 116], [30, 30, 120, 44], [140, 105, 148, 116], [7, 50, 20, 70]],
]
CHANNELS, CLASSES, ROWS = 3, 3, 17
ROI_THRESHOLDS = (0.5, 0.7)

# By the case's name, the settings that are not the plain ones.
PLAIN = {
    "mask": "gt",
    "level_assign": "single",
    "finest_scale": 56.0,
    "roi_phi": 0.5,
    "loss_form": "L2",
    "neck_adapt": True,
    "reference_bugs": False,
    "decay": "none",
    "proposals": "student",
    "hint_neck_w": 0,
    "hint_neck_back_w": 0,
    "hint_bb_w": 0,
    "hint_bb_back_w": 0,
    "head_cls_w": 0,
    "head_cls_back_w": 0,
    "head_cls_t": 1,
    "head_cls_back_t": 1,
    "head_cls_rows": "decouple",
    "adapter_relu": False,
}
NECK, HEAD = {"hint_neck_w": 3, "hint_neck_back_w": 12}, {"head_cls_w": 2, "head_cls_back_w": 2}
CASES = {
    "A_defeat_neck": NECK,
    "A2_defeat_neck_noadapt": {**NECK, "neck_adapt": False},
    "A3_defeat_neck_coco_w": {"hint_neck_w": 4, "hint_neck_back_w": 16, "neck_adapt": False},
    "B_head_decouple": HEAD,
    "B2_head_decouple_T3": {
        "head_cls_w": 1.5,
        "head_cls_back_w": 0.5,
        "head_cls_t": 3,
        "head_cls_back_t": 3,
    },
    "B3_head_all": {**HEAD, "head_cls_rows": "all"},
    "B4_head_correct": {**HEAD, "head_cls_rows": "correct"},
    "B5_full_decay": {**NECK, **HEAD, "decay": "linear"},  # at a quarter of the run
    "C_fgfi": {"hint_neck_w": 3, "mask": "roi"},
    "D_all": {"hint_neck_w": 3, "mask": "one"},
    "E_bb_decouple": {"hint_bb_w": 4, "hint_bb_back_w": 16},
    "F_neck_L1": {"hint_neck_w": 3, "loss_form": "smoothL1", "reference_bugs": True},
}
WITH_MASKS = ("A_defeat_neck", "C_fgfi")


def make_fixture(seed: int = 5) -> Arrays:
    """All arrays by name, those of the recorded one."""
    arrays = {**_mask_arrays(), **_inputs(seed)}
    for case, settings in CASES.items():
        found = _case(arrays, SimpleNamespace(**{**PLAIN, **settings}), case)
        arrays.update({f"{case}_{name}": array for name, array in found.items()})
    return arrays


def is_input(name: str) -> bool:
    return name.startswith(INPUTS)


def _sizes(padded: tuple[int, int], strides: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: tuple(math.ceil(side / stride) for side in padded) for name, stride in strides.items()}


def _floats(images: Sequence[Sequence[naive_masks.Box]]):
    """As the float32 of a fixture has them."""
    return [np.float32(boxes).reshape(-1, 4).tolist() for boxes in images]


def _mask_arrays() -> Arrays:
    boxes, sizes = _floats(MASK_BOXES), _sizes(MASK_PADDED, STRIDES)
    anchors = naive_masks.square_anchors(sizes, STRIDES)
    arrays = {
        "mask_fpn_shapes": np.array(list(sizes.values()), np.int32),
        "bb_gt_mask_stride4": _bytes(naive_masks.stage_mask(boxes, MASK_PADDED)),
    }
    for image, found in enumerate(boxes):
        arrays[f"mask_gt_boxes_{image}"] = np.float32(found).reshape(-1, 4)
        levels = [naive_masks.level_of(box, len(STRIDES)) for box in found]
        arrays[f"mask_level_of_box_{image}"] = np.array(levels, np.int8)
    kinds = {"gt_mask": ("gt", 0.5)}
    kinds.update({f"roi_mask_phi{phi}": ("roi", phi) for phi in ROI_THRESHOLDS})
    for prefix, (kind, phi) in kinds.items():
        masks = naive_masks.object_masks(kind, boxes, sizes, STRIDES, anchors, threshold=phi)
        arrays.update({f"{prefix}_{level}": _bytes(mask) for level, mask in masks.items()})
    return arrays


def _inputs(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    arrays = {}
    for role in ("student", "teacher"):
        for name, size in _sizes(PADDED, STRIDES).items():
            shape = (len(BOXES), CHANNELS, *size)
            arrays[f"neck_{role}_q64_{name}"] = _quantised(random, shape, 64)
        for count, (name, size) in enumerate(_sizes(PADDED, STAGES).items()):
            shape = (len(BOXES), 2 + count, *size)
            arrays[f"bb_{role}_q64_{name}"] = _quantised(random, shape, 64)
        arrays[f"cls_{role}_q64"] = _quantised(random, (ROWS, CLASSES + 1), 100)
    for name in STRIDES:
        weight, bias = (CHANNELS, CHANNELS, 3, 3), (CHANNELS,)
        arrays[f"adapt_weight_q1024_{name}"] = _quantised(random, weight, 200)
        arrays[f"adapt_bias_q1024_{name}"] = _quantised(random, bias, 200)
    arrays["cls_labels"] = random.integers(0, CLASSES + 1, ROWS)
    for image, found in enumerate(_floats(BOXES)):
        arrays[f"kd_gt_boxes_{image}"] = np.float32(found).reshape(-1, 4)
    return arrays


def _case(arrays: Arrays, s: SimpleNamespace, case: str) -> Arrays:
    leaves = {f"neck_{name}": _read(arrays, f"neck_student_q64_{name}") for name in STRIDES}
    leaves.update({f"bb_{name}": _read(arrays, f"bb_student_q64_{name}") for name in STAGES})
    for part in ("weight", "bias"):
        for name in STRIDES:
            leaves[f"adapt_{part}_{name}"] = _read(arrays, f"adapt_{part}_q1024_{name}")
    leaves["cls"] = _read(arrays, "cls_student_q64")
    for leaf in leaves.values():
        leaf.requires_grad_()
    step = _step(arrays, leaves, s)
    terms = naive.defeat(step, s)
    total = sum(terms.values())
    total.backward()
    found = {"loss": total.detach().numpy()}
    for name, term in terms.items():
        found[name.replace("loss_defeat", "losskd")] = term.detach().numpy()
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            found[f"grad_{name}"] = leaf.grad.numpy().astype(np.float32)
    if case in WITH_MASKS:
        masks = step.level_masks(s.mask, s)
        found.update({f"mask_{name}": _bytes(mask) for name, mask in masks.items()})
    return found


def _step(arrays: Arrays, leaves: dict[str, Tensor], s: SimpleNamespace) -> naive.Step:
    sizes = _sizes(PADDED, STRIDES)
    adapters = {name: (leaves[f"adapt_weight_{name}"], leaves[f"adapt_bias_{name}"]) for name in STRIDES}
    both = leaves["cls"], _read(arrays, "cls_teacher_q64"), arrays["cls_labels"].tolist()
    teacher = {name: _read(arrays, f"neck_teacher_q64_{name}") for name in STRIDES}
    teacher.update({name: _read(arrays, f"bb_teacher_q64_{name}") for name in STAGES})
    return naive.Step(
        student={name.partition("_")[2]: x for name, x in leaves.items() if name[:2] in ("ne", "bb")},
        teacher=teacher,
        strides=STRIDES,
        stages=list(STAGES),
        anchors=naive_masks.square_anchors(sizes, STRIDES),
        truth=_floats(BOXES),
        padded=PADDED,
        adapters=adapters if s.neck_adapt else {},
        rows={
            "student": [
                naive.Row(*logits, "background" if label == CLASSES else "object", label)
                for *logits, label in zip(*both)
            ]
        },
        iteration=1,
        max_iter=4,
    )


def _quantised(random: np.random.Generator, shape: Sequence[int], scale: float) -> np.ndarray:
    return np.rint(random.normal(0, scale, shape)).astype(np.int16)


def _read(arrays: Arrays, name: str) -> Tensor:
    denominator = 1024 if "_q1024" in name else 64
    return torch.tensor(arrays[name]).double() / denominator


def _bytes(mask: Tensor) -> np.ndarray:
    return mask.numpy().astype(np.uint8)
