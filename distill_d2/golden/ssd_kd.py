"""Fixtures of SSD's prior boxes, matching, losses and inference, and of SSDKD, of the authors' code.

In a fixture the background is class 0; the losses here expect it as the last class. Boxes are relative
to the image. Arrays "..._q64" are whole numbers, to be divided by 64. Losses "<case>_loss" are of the
settings of CASES; gradients "..._index" and "..._values" are of some rows, those of boxes of all that
have one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.losses.ssd_kd import SSDKD
from distill_d2.losses.ssd_kd.terms import (
    per_batch_bound,
    per_box_bound,
    selected_rows,
    soft_cross_entropy,
    targets_of,
)
from distill_d2.model_zoo import get_config_file
from distill_d2.projects.ssd import SSD
from distill_d2.views import Batch, DetectorView, build_view

from . import Fixture, FixtureError, golden_kind

# By the case's name, which teacher's boxes, and the arguments of SSDKD; "hard" has no teacher.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hard": ("", {}),
    "kd_default": ("good", {}),
    "kd_badteacher": ("bad", {}),
    "kd_T2_w3_m1_l2": (
        "bad",
        {
            "mu": 0.25,
            "background_weight": 3.0,
            "object_weight": 0.5,
            "temperature": 2.0,
            "margin": 1000.0,
            "lmda": 2.0,
        },
    ),
    "kd_u1": ("good", {"mu": 1.0}),
}
_AUTHORS = {"bounded": "batch", "hint": "logits"}
# Whether student and teacher are exchanged, and the margin.
_BOUNDS = {"br_active": (False, 0.0), "br_inactive": (True, 0.0), "br_inactive_margin": (True, 100.0)}
_CONFIGS = {"ssd300": "Base-SSD300-VGG16.yaml", "kd": "Base-SSD-VGG16-teacher.yaml"}
_SHARPENED = 2.0  # times the logits, for inference
_NU, _BACKGROUND_WEIGHT = 0.5, 1.5
_EXACT = {"rtol": 0, "atol": 0}


@golden_kind(
    holds=["priors_kd_*", "match_kd_conf_t", "conf_student_q*", "gt_*", "*_loss_bare"],
    rtol=1e-5,
    atol=1e-6,
)
def ssd_kd(fixture: Fixture) -> None:
    for network in _CONFIGS:
        _compare_matching(fixture, network)
    _compare_negatives(fixture)
    for name in fixture.names("*_loss_bare"):
        case = name[: -len("_loss_bare")]
        if case not in CASES:
            raise FixtureError(f"has a case '{case}'; known are {list(CASES)}")
        _compare_case(fixture, case)
    _compare_soft(fixture)
    _compare_bounds(fixture)
    _compare_inference(fixture)


class _Levels(Backbone):
    """Empty levels, as wide as a network of these strides makes them of an image."""

    def __init__(self, size: int, strides: Sequence[int]):
        super().__init__()
        self.shapes = {f"s{stride}": ShapeSpec(channels=1, stride=stride) for stride in strides}
        self.widths = {name: -(-size // shape.stride) for name, shape in self.shapes.items()}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: torch.empty(len(images), 1, w, w) for name, w in self.widths.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes


class _Outputs(nn.Module):
    """A head that returns given rows (N, R, length) as maps per level.

    Args:
        widths: of the levels; priors: per cell of each.
    """

    def __init__(self, widths: Sequence[int], priors: Sequence[int], *outputs: torch.Tensor):
        super().__init__()
        self.widths, self.outputs = widths, outputs
        self.rows = [width * width * count for width, count in zip(widths, priors)]

    def forward(self, _features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        return tuple(self._maps(rows) for rows in self.outputs)

    def _maps(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [
            level.reshape(len(rows), width, width, -1).permute(0, 3, 1, 2)
            for level, width in zip(rows.split(self.rows, dim=1), self.widths)
        ]


class _Network:
    """An SSD whose head returns given logits (N, R, K + 1), background first, and deltas (N, R, 4)."""

    def __init__(self, network: str, role: str, logits: torch.Tensor, deltas: torch.Tensor):
        cfg = get_cfg()
        add_distill_config(cfg)
        load_yaml(cfg, get_config_file(_CONFIGS[network]))
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.SSD.WIDTH = 0.01  # the convolutions do not run
        cfg.MODEL.SSD.NUM_CLASSES = logits.shape[-1] - 1
        cfg.TEST.DETECTIONS_PER_IMAGE = logits.shape[1] * logits.shape[2]
        self.model: SSD = build_model(cfg)
        self.size = cfg.MODEL.SSD.SIZE
        self.model.backbone = levels = _Levels(self.size, cfg.MODEL.SSD.STRIDES)
        self.logits = logits.roll(-1, dims=-1)
        self.deltas = deltas
        priors = self.model.anchor_generator.num_priors
        self.model.head = _Outputs(list(levels.widths.values()), priors, self.logits, deltas)
        self.view: DetectorView = build_view(self.model, role)
        self.view.require("dense")

    def run(self) -> list[list[torch.Tensor]]:
        """One forward, which the view records; the head's outputs."""
        self.view.taps.start()
        self.features = list(self.model.backbone(self.logits).values())
        return self.model.head(self.features)


def _compare_matching(fixture: Fixture, network: str) -> None:
    (name,) = fixture.names(f"priors_{network}_*")
    batch, rows = _batch(fixture), len(fixture[name])
    classes = _numbers(fixture, "conf_student").shape[-1]
    ssd = _Network(
        network,
        "student",
        torch.zeros(len(batch.inputs), rows, classes),
        torch.zeros(len(batch.inputs), rows, 4),
    )
    ssd.run()
    predictions = ssd.view.dense()
    corners = (predictions.anchors / ssd.size).unflatten(-1, (2, 2))
    fixture.compare(name, torch.cat([corners.mean(dim=1), corners[:, 1] - corners[:, 0]], dim=1))
    objects, background, labels, deltas = targets_of(predictions, batch)
    found = torch.where(background, 0, labels + 1)
    fixture.compare(f"match_{network}_conf_t", found, **_EXACT)
    fixture.compare(f"match_{network}_pos_index", objects.nonzero(), **_EXACT)
    fixture.compare(f"match_{network}_pos_loc_t", deltas[objects], atol=1e-5)


def _compare_negatives(fixture: Fixture) -> None:
    student, batch = _student(fixture), _batch(fixture)
    student.run()
    predictions = student.view.dense()
    objects, _, labels, _ = targets_of(predictions, batch)
    ratio = student.model.negatives_per_positive
    negatives = selected_rows(predictions, objects, labels, ratio) & ~objects
    fixture.compare("hard_negative_mask", np.packbits(negatives.numpy(), axis=1), **_EXACT)


def _compare_case(fixture: Fixture, case: str) -> None:
    student, batch = _student(fixture), _batch(fixture)
    predictions = student.run()
    hard = student.model.forward_training(None, student.features, predictions, batch.instances())
    fixture.compare(f"{case}_loss_bare", sum(hard.values()))
    boxes, settings = CASES[case]
    terms = dict(hard)
    if boxes:
        teacher = _Network(
            "kd", "teacher", _numbers(fixture, "conf_teacher"), _numbers(fixture, f"loc_teacher_{boxes}")
        )
        teacher.run()
        loss = SSDKD(**_AUTHORS, **settings)
        loss.bind(student.view, teacher.view)
        weights = loss.task_weights
        terms = {name: weights[name] * term for name, term in hard.items()}
        terms.update(loss(student.view, teacher.view, batch))
    total = sum(terms.values())
    fixture.compare(f"{case}_loss", total)
    leaves = {"loc": student.deltas, "conf": student.leaf}
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
    rows = gradients["loc"].any(dim=-1).nonzero()
    fixture.compare(f"{case}_grad_loc_index", rows, **_EXACT)
    for name, actual in _some(fixture, f"{case}_grad_", gradients):
        # The more rows, the smaller each gradient.
        fixture.compare(name, actual, atol=5e-6 * float(np.abs(fixture[name]).max()))


def _some(
    fixture: Fixture, prefix: str, gradients: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The gradients that the fixture has: of all rows, or of those that it names."""
    for part, gradient in gradients.items():
        if f"{prefix}{part}" in fixture.arrays:
            yield f"{prefix}{part}", gradient
        if f"{prefix}{part}_values" in fixture.arrays:
            image, row = fixture.tensor(f"{prefix}{part}_index").long().unbind(dim=1)
            yield f"{prefix}{part}_values", gradient[image, row]


def _compare_soft(fixture: Fixture) -> None:
    for name in fixture.names("soft_T*_loss"):
        temperature = float(re.match(r"soft_T(.+)_loss", name).group(1))
        leaf = fixture.tensor("soft_logits_student").requires_grad_()
        pair = (leaf, fixture.tensor("soft_logits_teacher"))
        student, teacher = (logits.roll(-1, dims=-1) / temperature for logits in pair)
        total = soft_cross_entropy(student, teacher, 1.0, _BACKGROUND_WEIGHT).sum()
        fixture.compare(name, total)
        fixture.compare(name.replace("_loss", "_grad"), *torch.autograd.grad(total, leaf))


def _compare_bounds(fixture: Fixture) -> None:
    pair = [fixture.tensor("br_student"), fixture.tensor("br_teacher")]
    truth = fixture.tensor("br_gt")
    rows = torch.ones(1, len(truth), dtype=torch.bool)
    for name, (exchanged, margin) in _BOUNDS.items():
        student, teacher = pair[::-1] if exchanged else pair
        student = student.clone().requires_grad_()
        total = _NU * per_batch_bound((student - truth)[None], (teacher - truth)[None], rows, margin)
        fixture.compare(f"{name}_loss", total)
        fixture.compare(f"{name}_grad", *torch.autograd.grad(total, student))
    student, teacher = ((boxes - truth)[None] for boxes in pair)
    for role, boxes in (("student", student), ("teacher", teacher)):
        each = [per_box_bound(boxes, boxes, row[None], math.inf) for row in torch.eye(len(truth)).bool()]
        fixture.compare(f"paper_br_{role}_err", torch.stack(each))
    fixture.compare("paper_br_m0_sum", per_box_bound(student, teacher, rows, 0.0))
    fixture.compare("paper_br_swapped_m0_sum", per_box_bound(teacher, student, rows, 0.0))


@torch.no_grad()
def _compare_inference(fixture: Fixture) -> None:
    student = _student(fixture)
    student.run()
    predictions = student.view.dense()
    anchors, deltas = predictions.anchors, predictions.deltas[0]
    first = len(fixture["decode_img0_first100"])
    decoded = predictions.decode(deltas[:first], anchors[:first]) / student.size
    fixture.compare("decode_img0_first100", decoded, atol=1e-5)
    scores = (_SHARPENED * predictions.logits[0]).softmax(dim=-1)[:, :-1]
    found = student.model.detect(scores, deltas, anchors, (student.size, student.size))
    best = np.zeros_like(fixture["detect_top20"])
    counts = np.zeros(len(best), dtype=np.int64)
    for label in range(len(best) - 1):
        of_class = found[found.pred_classes == label]
        counts[label + 1] = len(of_class)
        boxes = of_class.pred_boxes.tensor / student.size
        top = torch.cat([of_class.scores[:, None], boxes], dim=1)[: best.shape[1]]
        best[label + 1, : len(top)] = top
    fixture.compare("detect_counts", counts, **_EXACT)
    fixture.compare("detect_top20", best, atol=1e-5)


def _student(fixture: Fixture) -> _Network:
    """The fixture's; ``leaf`` are its logits, background first."""
    leaf = _numbers(fixture, "conf_student").requires_grad_()
    student = _Network("kd", "student", leaf, _numbers(fixture, "loc_student").requires_grad_())
    student.leaf = leaf
    return student


def _batch(fixture: Fixture) -> Batch:
    inputs = []
    for index in range(len(fixture.names("gt_*"))):
        truth, size = fixture.tensor(f"gt_{index}").view(-1, 5), (300, 300)
        instances = Instances(size, gt_boxes=Boxes(truth[:, :4] * 300), gt_classes=truth[:, 4].long())
        inputs.append({"image": torch.empty(3, *size), "instances": instances})
    return Batch(inputs, (300, 300), iteration=0, max_iter=1)


def _numbers(fixture: Fixture, prefix: str) -> torch.Tensor:
    """The floating-point numbers of an array "<prefix>_q64"."""
    (name,) = fixture.names(f"{prefix}_q*")
    return fixture.tensor(name).float() / int(re.search(r"_q(\d+)", name).group(1))
