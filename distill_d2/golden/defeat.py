"""Fixtures of DeFeat and FGFI: masks, losses and gradients, of the authors' code for both.

Names end in the level ("_P2", of stride 4) or stage ("_C3", of stride 8); arrays "..._q64..." are whole
numbers, to be divided by 64. Losses "<case>_loss" are of the settings of CASES.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances

from distill_d2 import DistillLoss
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.masks import level_of_boxes, stage_mask
from distill_d2.losses.object_masks import ObjectMasks
from distill_d2.testing.maps import Maps, view_of
from distill_d2.views import Batch, DetectorView, Predictions

from . import Fixture, FixtureError, golden_kind

_NO_NECK = {"hint_neck_w": 0.0, "hint_neck_back_w": 0.0}
_NO_BACK = {"hint_neck_w": 3.0, "hint_neck_back_w": 0.0}
_HEAD = {"head_cls_w": 2.0, "head_cls_back_w": 2.0}
# By the case's name, the arguments of DeFeat.
CASES: dict[str, dict[str, Any]] = {
    "A_defeat_neck": {},
    "A2_defeat_neck_noadapt": {"neck_adapt": False},
    "A3_defeat_neck_coco_w": {"neck_adapt": False, "hint_neck_w": 4.0, "hint_neck_back_w": 16.0},
    "B_head_decouple": {**_NO_NECK, **_HEAD},
    "B2_head_decouple_T3": {
        **_NO_NECK,
        "head_cls_w": 1.5,
        "head_cls_back_w": 0.5,
        "head_cls_t": 3.0,
        "head_cls_back_t": 3.0,
    },
    "B3_head_all": {**_NO_NECK, **_HEAD, "head_cls_rows": "all"},
    "B4_head_correct": {**_NO_NECK, **_HEAD, "head_cls_rows": "correct"},
    "B5_full_decay": {**_HEAD, "decay": "linear"},
    "D_all": {**_NO_BACK, "mask": "one"},
    "E_bb_decouple": {**_NO_NECK, "hint_bb_w": 4.0, "hint_bb_back_w": 16.0},
    "F_neck_L1": {**_NO_BACK, "loss_form": "smoothL1", "reference_bugs": True},
}
_FGFI_CASE = "C_fgfi"  # with FGFI's defaults
_DECAYED = (1, 4)  # iteration, and number of them: at a quarter of the run the factor is 0.75

_STAGES = {"C2": "res2", "C3": "res3", "C4": "res4", "C5": "res5"}
_TERMS = {
    "losskd_neck": ("loss_defeat_neck", "loss_fgfi"),
    "losskd_neck_back": ("loss_defeat_neck_back",),
    "losskd_bb": ("loss_defeat_bb",),
    "losskd_bb_back": ("loss_defeat_bb_back",),
    "losskd_hcls": ("loss_defeat_hcls",),
    "losskd_hcls_back": ("loss_defeat_hcls_back",),
}
_EXACT = {"rtol": 0, "atol": 0}


@golden_kind(holds=["gt_mask_P*", "kd_gt_boxes_*", "neck_student_q*"], rtol=1e-5, atol=1e-7)
def defeat(fixture: Fixture) -> None:
    _compare_masks(fixture)
    for name in fixture.names("*_loss"):
        case = name[: -len("_loss")]
        if case not in CASES and case != _FGFI_CASE:
            raise FixtureError(f"has a case '{case}'; known are {[*CASES, _FGFI_CASE]}")
        _compare_case(fixture, case)


def _compare_masks(fixture: Fixture) -> None:
    boxes = _boxes(fixture, "mask_gt_boxes_")
    names = fixture.names("gt_mask_P*")
    levels = [name.rpartition("_")[2] for name in names]
    sizes = {level: tuple(fixture[f"gt_mask_{level}"].shape[1:]) for level in levels}
    strides = {level: _stride(level) for level in levels}
    fixture.compare("mask_fpn_shapes", np.array(list(sizes.values())), **_EXACT)
    batch = _batch(boxes, _padded(sizes, strides))
    for image, per_image in enumerate(boxes):
        found = level_of_boxes(per_image[None], len(levels))[0]
        fixture.compare(f"mask_level_of_box_{image}", found, **_EXACT)
    student = view_of({}, "student", anchors=_anchors(sizes, strides))
    for level, mask in ObjectMasks("gt")(student, batch, sizes, strides).items():
        fixture.compare(f"gt_mask_{level}", mask, **_EXACT)
    for kind in sorted({name.rpartition("_")[0] for name in fixture.names("roi_mask_phi*_P*")}):
        threshold = float(kind[len("roi_mask_phi") :])
        masks = ObjectMasks("roi", threshold=threshold)(student, batch, sizes, strides)
        for level, mask in masks.items():
            fixture.compare(f"{kind}_{level}", mask, **_EXACT)
    fixture.compare("bb_gt_mask_stride4", stage_mask(batch), **_EXACT)


def _compare_case(fixture: Fixture, case: str) -> None:
    run = _Run(fixture, case)
    student, teacher = run.views()
    terms = run.loss(student, teacher, run.batch)
    terms = {name: run.loss.factor(run.batch.iteration) * term for name, term in terms.items()}
    masks = fixture.names(f"{case}_mask_*")
    if masks:
        found = run.loss.masks(student, run.batch, run.sizes, run.strides)
    fixture.compare(f"{case}_loss", sum(terms.values()))
    sum(terms.values()).backward()
    for name in fixture.names(f"{case}_losskd_*"):
        parts = _TERMS[name[len(case) + 1 :]]
        fixture.compare(name, sum(terms[term] for term in parts if term in terms))
    for name in masks:
        fixture.compare(name, found[name.rpartition("_")[2]], **_EXACT)
    for name in fixture.names(f"{case}_grad_*"):
        gradient = run.leaves[name[len(case) + len("_grad_") :]].grad
        # The larger the maps, the smaller each gradient.
        fixture.compare(name, gradient, atol=1e-6 * np.abs(fixture[name]).max())


class _Run:
    """One case: the loss, and what it reads; ``leaves`` take the gradients, by their names there."""

    def __init__(self, fixture: Fixture, case: str):
        self.fixture = fixture
        settings = {} if case == _FGFI_CASE else CASES[case]
        necks = [name.rpartition("_")[2] for name in fixture.names("neck_student_q*_P*")]
        self.leaves: dict[str, torch.Tensor] = {}
        self.student = self._maps("neck_student", "neck_") | self._maps("bb_student", "bb_")
        self.teacher = self._maps("neck_teacher") | self._maps("bb_teacher")
        self.strides = {level: _stride(level) for level in necks}
        self.sizes = {level: tuple(self.student[level].shape[-2:]) for level in necks}
        self.batch = _batch(
            _boxes(fixture, "kd_gt_boxes_"),
            _padded(self.sizes, self.strides),
            *(_DECAYED if "decay" in settings else (0, 1)),
        )
        self.loss = self._loss(case, necks, settings)
        self.predictions = None
        if getattr(self.loss, "compares_heads", False):
            self.predictions = [self._predictions("student"), self._predictions("teacher")]

    def _loss(self, case: str, necks: list[str], settings: dict[str, Any]) -> DistillLoss:
        if case == _FGFI_CASE:
            return FGFI(in_features=necks)
        stages = [_level(name) for name in self.fixture.names("bb_student_q*_C*")]
        return DeFeat(in_features=necks, bb_features=stages, **settings)

    def _maps(self, prefix: str, leaf: str = "") -> Maps:
        maps = {}
        for name in self.fixture.names(f"{prefix}_q*_[PC]*"):
            maps[_level(name)] = tensor = _numbers(self.fixture, name).requires_grad_(bool(leaf))
            self.leaves[leaf + name.rpartition("_")[2]] = tensor
        return maps

    def _predictions(self, role: str) -> Predictions:
        (name,) = self.fixture.names(f"cls_{role}_q*")
        logits = _numbers(self.fixture, name).requires_grad_(role == "student")
        if role == "student":
            self.leaves["cls"] = logits
        rows = len(logits)
        return Predictions(
            logit_levels=[logits.view(1, rows, 1, -1)],
            delta_levels=[torch.zeros(1, rows, 1, 4)],
            anchors=torch.zeros(1, rows, 4),
            decode=lambda deltas, anchors: anchors,
            match=lambda boxes, valid: torch.zeros(1, rows, dtype=torch.int8),
            background=True,
            valid=torch.ones(1, rows, dtype=torch.bool),
            classes=self.fixture.tensor("cls_labels").view(1, rows),
        )

    def views(self) -> tuple[DetectorView, DetectorView]:
        """The views of student and teacher, to which the loss is bound."""
        strides = {name: _stride(name) for name in self.student}
        heads: list[Predictions | None] = self.predictions or [None, None]
        anchors = _anchors(self.sizes, self.strides)
        student = view_of(self.student, "student", strides, heads[0], anchors)
        teacher = view_of(self.teacher, "teacher", strides, heads[1], anchors)
        self.loss.bind(student, teacher)
        self._load_adapters()
        return student, teacher

    def _load_adapters(self) -> None:
        pairs = getattr(self.loss, "neck", None) or getattr(self.loss, "pairs", None)
        for level, adapter in pairs.adapters.items() if pairs else ():
            for part, parameter in adapter.named_parameters():
                (name,) = self.fixture.names(f"adapt_{part}_q*_{level}")
                parameter.data.copy_(_numbers(self.fixture, name))
                self.leaves[f"adapt_{part}_{level}"] = parameter


def _numbers(fixture: Fixture, name: str) -> torch.Tensor:
    """The floating-point numbers of a "..._q64..." array."""
    return fixture.tensor(name).float() / int(re.search(r"_q(\d+)", name).group(1))


def _level(name: str) -> str:
    """Of "bb_student_q64_C3" res3, of "neck_student_q64_P2" P2."""
    last = name.rpartition("_")[2]
    return _STAGES.get(last, last)


def _stride(level: str) -> int:
    return 2 ** int(level.lstrip("Pres"))


def _padded(sizes: dict[str, tuple[int, int]], strides: dict[str, int]) -> tuple[int, int]:
    finest = min(sizes, key=strides.get)
    return tuple(side * strides[finest] for side in sizes[finest])


def _boxes(fixture: Fixture, prefix: str) -> list[torch.Tensor]:
    return [fixture.tensor(f"{prefix}{i}") for i in range(len(fixture.names(f"{prefix}*")))]


def _batch(
    boxes: list[torch.Tensor], padded: tuple[int, int], iteration: int = 0, max_iter: int = 1
) -> Batch:
    inputs = []
    for per_image in boxes:
        instances = Instances(padded, gt_boxes=Boxes(per_image.view(-1, 4)))
        instances.gt_classes = torch.zeros(len(instances), dtype=torch.int64)
        inputs.append({"image": torch.empty(3, *padded), "instances": instances})
    return Batch(inputs, padded, iteration, max_iter)


def _anchors(sizes: dict[str, tuple[int, int]], strides: dict[str, int]) -> Maps:
    """Three per cell, of 8 strides: the authors' Faster R-CNN has them."""
    generator = DefaultAnchorGenerator(
        sizes=[[8 * strides[name]] for name in sizes],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[strides[name] for name in sizes],
        offset=0.0,
    )
    boxes = generator([torch.empty(1, 1, *size) for size in sizes.values()])
    return {name: b.tensor.view(*size, -1, 4) for (name, size), b in zip(sizes.items(), boxes)}
