"""Heads whose predictions are given, in the place of detectors' views, and naive terms of them."""

from __future__ import annotations

import naive_ssd as ssd
import naive_ssd_kd as naive
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

from distill_d2.losses.ssd_kd import SSDKD
from distill_d2.views import Batch, Predictions
from distill_d2.views.matching import assign_by_iou, batched_iou
from distill_d2.views.predictions import decoder_of, encoder_of

K = 3
SIZE = 64
_TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
# Two images' objects, with their classes.
OBJECTS = [
    [([3.0, 4, 22, 25], 2), ([30, 8, 60, 30], 0), ([5, 6, 21, 24], 1)],
    [([10.0, 33, 44, 61], 1)],
]


def grid(stride: int = 8, side: int = 20) -> torch.Tensor:
    """(R, 4) anchors."""
    center = (torch.arange(SIZE // stride) + 0.5) * stride
    y, x = torch.meshgrid(center, center, indexing="ij")
    middle = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return torch.cat([middle - side / 2, middle + side / 2], dim=1)


def batch(objects=OBJECTS) -> Batch:
    inputs = []
    for image in objects:
        instances = Instances(
            (SIZE, SIZE),
            gt_boxes=Boxes(torch.tensor([box for box, _ in image]).view(-1, 4)),
            gt_classes=torch.tensor([label for _, label in image], dtype=torch.int64),
        )
        inputs.append({"image": torch.empty(3, SIZE, SIZE), "instances": instances})
    return Batch(inputs, (SIZE, SIZE), iteration=0, max_iter=1)


class Head:
    """An SSD's: (N, R, K + 1) logits and (N, R, 4) deltas for anchors (R, 4), which are objects from an
    IoU of 0.3 on."""

    def __init__(self, seed: int = 0, images: int = 2, anchors: torch.Tensor | None = None):
        generator = torch.Generator().manual_seed(seed)
        self.anchors = grid() if anchors is None else anchors
        rows = len(self.anchors)
        self.logits = (2 * torch.randn(images, rows, K + 1, generator=generator)).requires_grad_()
        self.deltas = torch.randn(images, rows, 4, generator=generator).requires_grad_()

    def dense(self) -> Predictions:
        anchors = self.anchors
        return Predictions(
            logit_levels=[self.logits.unsqueeze(2)],
            delta_levels=[self.deltas.unsqueeze(2)],
            anchors=anchors,
            decode=decoder_of(_TRANSFORM),
            match=lambda boxes, valid: self._overlaps(boxes, valid),
            background=True,
            encode=encoder_of(_TRANSFORM),
            assign=lambda boxes, valid: assign_by_iou(boxes, valid, anchors),
        )

    def _overlaps(self, boxes: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        iou = torch.where(valid[..., None], batched_iou(boxes, self.anchors[None]), -1.0)
        return (iou.amax(dim=1) >= 0.3).to(torch.int8)


def terms_of(student: Head, teacher: Head, objects=OBJECTS, **settings) -> dict[str, torch.Tensor]:
    """Of dense heads, with a hint of logits."""
    loss = SSDKD(**{"hint": "logits", **settings})
    loss.heads = ["dense"]
    return loss(student, teacher, batch(objects))


def targets(head: Head, objects=OBJECTS):
    """Per image the rows that are objects, by (class, deltas)."""
    found: list[dict[int, tuple]] = []
    for image in objects:
        rows = {}
        for row, anchor in enumerate(head.anchors.tolist()):
            overlaps = [ssd.iou(box, anchor) for box, _ in image]
            if overlaps and max(overlaps) >= 0.3:
                box, label = image[overlaps.index(max(overlaps))]
                rows[row] = (label, ssd.encode(box, anchor))
        found.append(rows)
    return found


def naive_terms(student: Head, teacher: Head, objects=OBJECTS, **settings) -> dict[str, float]:
    """What ``terms_of`` should be."""
    s = {
        "mu": 0.5,
        "background_weight": 1.5,
        "object_weight": 1.0,
        "temperature": 1.0,
        "lmda": 1.0,
        "nu": 0.5,
        "margin": 0.0,
        "bounded": "box",
        "gamma": 0.5,
        "hint_form": "L2",
        "negatives_per_positive": 3.0,
        **settings,
    }
    logits, others = student.logits.tolist(), teacher.logits.tolist()
    deltas, teacher_deltas = student.deltas.tolist(), teacher.deltas.tolist()
    found = targets(student, objects)
    count = max(1, sum(map(len, found)))
    weights = [s["object_weight"]] * K + [s["background_weight"]]
    soft, pairs = 0.0, []
    for i, rows in enumerate(found):
        losses = [
            ssd.cross_entropy(row, rows[r][0] if r in rows else K) for r, row in enumerate(logits[i])
        ]
        positive = [r in rows for r in range(len(losses))]
        selected = ssd.hard_negatives(losses, positive, s["negatives_per_positive"]) | set(rows)
        for r in selected:
            soft += naive.soft(logits[i][r], others[i][r], weights, s["temperature"])[0]
        pairs += [(deltas[i][r], teacher_deltas[i][r], wanted) for r, (_, wanted) in rows.items()]
    if s["bounded"] == "box":
        bound = sum(naive.bound_per_box(*pair, s["margin"]) for pair in pairs)
    else:
        bound = naive.bound_per_batch(*(zip(*pairs) if pairs else ([], [], [])), s["margin"])
    distances = [
        a - b
        for student_rows, teacher_rows in zip(logits, others)
        for row, other in zip(student_rows, teacher_rows)
        for a, b in zip(row, other)
    ]
    form = abs if s["hint_form"] == "L1" else (lambda d: d * d)
    terms = {
        "soft": (1 - s["mu"]) * soft / count,
        "bounded": s["lmda"] * s["nu"] * bound / count,
        "hint": s["gamma"] * sum(map(form, distances)) / len(distances),
    }
    on = {"soft": s["mu"] < 1, "bounded": s["nu"] > 0, "hint": s["gamma"] > 0}
    return {f"loss_ssd_kd_{name}": term for name, term in terms.items() if on[name]}
