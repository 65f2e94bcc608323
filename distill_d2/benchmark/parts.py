"""The parts of losses that the benchmark measures alone, beside the whole loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform

from distill_d2 import DistillLoss
from distill_d2.views import Batch, DetectorView, Predictions
from distill_d2.views.predictions import by_position, decoder_of

Compute = Callable[[DetectorView, DetectorView, Batch], dict[str, torch.Tensor]]


class Part(NamedTuple):
    """A part of a loss; ``compute`` returns {} where there is no backward. ``against`` is the name of
    another part, of which this one's time and memory are printed as ratios."""

    compute: Compute
    against: str = ""


def icd_parts(
    loss: DistillLoss, _student: DetectorView, teacher: DetectorView, batch: Batch
) -> dict[str, Part]:
    """ICD's two halves, each with its backward; what the decoder gave is there for the second."""
    with torch.no_grad():
        maps, queries, geometry = loss.read(teacher, batch)
        decoded = loss.decode(maps, queries, geometry, batch.iteration)

    def auxiliary(_student, teacher, batch):
        maps, queries, geometry = loss.read(teacher, batch)
        layers = loss.decode(maps, queries, geometry, batch.iteration)
        return loss.auxiliary_terms(layers, queries, maps)

    def value(student, _teacher, batch):
        maps = list(loss.pairs.of_student(student, geometry.level_sizes).values())
        temperature = loss.temperature(batch.iteration, batch.max_iter)
        return {"value": loss.value_term(maps, decoded, queries, geometry, temperature)}

    return {"decoder + auxiliary task": Part(auxiliary), "value loss": Part(value)}


def gid_parts(
    loss: DistillLoss, student: DetectorView, teacher: DetectorView, batch: Batch
) -> dict[str, Part]:
    """GID's selection, and its terms at the instances that were selected, each with its backward."""
    heads = loss.predictions(student, teacher) if loss.compares_heads else None
    instances = loss.instances(heads, batch)

    def selection(student, teacher, batch):
        loss.instances(loss.predictions(student, teacher), batch)
        return {}

    def at_instances(student, teacher, _batch):
        return loss.feature_terms(student, teacher, instances)

    def response(student, _teacher, batch):
        predictions = getattr(student, loss.capability)()
        return loss.response_terms(predictions, heads[1], instances, batch)

    selects = loss.settings.gi_mode != "gt"
    parts = {"selection": Part(selection)} if selects else {}
    if loss.settings.pools:
        parts["pooling, feature and relation terms"] = Part(at_instances)
    if loss.settings.responds:
        parts["response terms"] = Part(response)
    return {**parts, **selections_that_grow(loss.select, heads[0])} if selects else parts


def defeat_parts(
    loss: DistillLoss, student: DetectorView, teacher: DetectorView, batch: Batch
) -> dict[str, Part]:
    """DeFeat's terms on neck, backbone and classes; and, of what the first costs, adapters and masks."""

    def masks(student, teacher, batch):
        names = loss.neck.in_features
        sizes = {name: teacher.level(name, contiguous=False).shape[-2:] for name in names}
        loss.masks(student, batch, sizes, loss.neck.strides)
        return {}

    def adapters(student, teacher, _batch):
        sizes = [level.shape[-2:] for level in loss.neck.of_teacher(teacher).values()]
        return {name: level.sum() for name, level in loss.neck.of_student(student, sizes).items()}

    parts = {}
    if loss.neck is not None:
        parts["neck terms"] = Part(loss.neck_terms)
        parts["masks of the neck"] = Part(masks)
        if len(loss.neck.adapters):
            parts["adapters of the neck"] = Part(adapters)
    if loss.backbone is not None:
        parts["backbone terms"] = Part(loss.backbone_terms)
    if loss.compares_heads:
        parts["class terms"] = Part(loss.head_terms)
    return parts


# The side of a RetinaNet's finest level (stride 8), by how many anchors the five levels have together.
SIDES = {"5k": 20, "20k": 40, "80k": 80}
ANCHORS_PER_POSITION = 9


def selections_that_grow(select: Callable[..., Any], like: Predictions) -> dict[str, Part]:
    """GID's selection from generated predictions of more and more rows, each compared to the one before;
    classes, background and device are those of ``like``."""
    parts, before = {}, ""
    for rows, side in SIDES.items():
        images = [(8 * side, 8 * side)] * 2
        heads = [generate_predictions(side, like, seed) for seed in (0, 1)]

        def selection(*_views, heads=heads, images=images):
            select(*heads, images)
            return {}

        name = f"selection of {rows} rows"
        parts[name] = Part(selection, before)
        before = name
    return parts


def generate_predictions(side: int, like: Predictions, seed: int) -> Predictions:
    """A RetinaNet's for two images, with random logits that differ about as much as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    device, classes = like.anchors.device, like.logit_levels[0].shape[-1]
    sides = [math.ceil(side / 2**level) for level in range(5)]

    def levels(length: int) -> list[torch.Tensor]:
        shapes = [(2, ANCHORS_PER_POSITION * length, s, s) for s in sides]
        outputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        return [by_position(output, length) for output in outputs]

    return Predictions(
        logit_levels=[2 * level - 4 for level in levels(classes)],
        delta_levels=levels(4),
        anchors=generate_anchors(sides).to(device),
        decode=decoder_of(Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))),
        match=like.match,
        background=like.background,
    )


def generate_anchors(sides: Sequence[int]) -> torch.Tensor:
    """A RetinaNet's (R, 4) on square levels of these sides."""
    strides = [8 * 2**level for level in range(len(sides))]
    sizes = [[4 * stride * 2 ** (octave / 3) for octave in range(3)] for stride in strides]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides, offset=0.0
    )
    anchors = generator([torch.empty(1, 1, side, side) for side in sides])
    return torch.cat([boxes.tensor for boxes in anchors])


# Of a loss, by its registered name: its parts by row name, from (loss, student, teacher, batch).
PARTS = {
    "DeFeat": defeat_parts,
    "GID": gid_parts,
    "InstanceConditionalDistillation": icd_parts,
}
