"""A step of GID by the package and by the naive version, from equal maps, predictions and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import naive_gid as naive
import numpy as np
import torch
import torch.nn.functional as F
from closeness import close
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from naive_gid import Heads, Rows
from torch import Tensor

from distill_d2.losses.gid import GID
from distill_d2.testing.maps import GivenView, view_of
from distill_d2.views import Batch, Predictions
from distill_d2.views.matching import match_by_iou
from distill_d2.views.predictions import decoder_of

TERMS = naive.TERMS
# Terms of one magnitude.
EVEN = {**dict.fromkeys(TERMS.values(), 1.0), "pooler_resolution": 2}
OFF = dict.fromkeys(TERMS.values(), 0.0)
DENSE_MATCHER = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
BOX_HEAD_MATCHER = Matcher([0.5], [0, 1])


def only(*names: str, **settings) -> dict[str, float]:
    """Settings that leave the terms of these short names: "feature", "relation", "cls", "reg"."""
    wanted = {weight: 1.0 for weight in OFF if weight.split("_")[-2] in names}
    return {**EVEN, **OFF, **wanted, **settings}


def random_boxes(random: np.random.Generator, count: int, size: tuple[int, int], least=0.1) -> Tensor:
    """(count, 4) boxes inside an image (height, width), of sides from ``least`` to 0.6 of its."""
    corner = random.uniform(0, 0.4, (count, 2))
    boxes = np.hstack([corner, corner + random.uniform(least, 0.6, (count, 2))])
    return torch.tensor(boxes * np.tile(size[::-1], 2)).float().reshape(-1, 4)


def naive_step(
    teacher: Heads,
    student: Heads,
    rows: Rows | None,
    sizes: Sequence[tuple[int, int]],
    truth: list[Tensor],
    strides: dict[str, int],
    settings: dict,
    adapter: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda maps: maps,
) -> tuple[dict[str, Tensor], Heads]:
    """The weighted terms in float64, after their backward, and the student's inputs as leaves."""
    s = GID.Settings(**settings)
    instances = naive.all_instances(teacher, student, rows, sizes, truth, s)
    leaf = lambda x: x.detach().double().requires_grad_()  # noqa: E731
    maps = {name: leaf(level) for name, level in student.maps.items()}
    leaves = Heads(leaf(student.logits), leaf(student.deltas), maps)
    adapted = leaves._replace(maps=adapter(maps) if s.feature_weight or s.relation_weight else maps)
    terms = naive.terms(teacher.double(), adapted, instances, rows, truth, strides, s)
    total = sum(terms.values())
    if total.requires_grad:
        total.backward()
    return terms, leaves


# --------------------------------------------------------------------------------------- random steps


class HeadsView(GivenView):
    """A view of given maps and predictions, called dense, rpn and box_head."""

    has_centerness = True

    def __init__(self, model, role: str, predictions: Predictions):
        super().__init__(model, role, predictions)
        self.offers = ("dense", "rpn", "box_head")

    def rpn(self) -> Predictions:
        return self.predictions

    def box_head(self, proposals=None, classes=None) -> Predictions:
        assert (proposals is None) == (self.role == "student")
        return self.predictions

    def sampled_proposals(self) -> list[Boxes]:
        return []


def heads_view(maps: dict[str, Tensor], role: str, predictions: Predictions) -> HeadsView:
    view = HeadsView(view_of(maps, role).model, role, predictions)
    view.taps.start()
    view.model.backbone(None)
    return view


class Case:
    """Random maps, predictions and ground truth of a batch, and a GID bound to them.

    Attributes:
        teacher, student: the inputs; the student's are leaves.
        rows: what the naive version needs besides.
        loss: the package's.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        objects: Sequence[int] = (2, 1),
        sizes: Sequence[tuple[int, int]] = ((60, 90), (64, 80), (50, 96)),
        padded: tuple[int, int] = (64, 96),
        strides: Sequence[int] = (8, 16, 32),
        classes: int = 3,
        channels: tuple[int, int] = (4, 4),
        centerness: bool = False,
        ltrb: bool = False,
        proposals: Sequence[int] = (),
        class_specific: bool = False,
        **settings,
    ):
        """
        Args:
            objects: how many each image has.
            channels: of the student's and the teacher's maps.
            ltrb: boxes are distances to their sides, as FCOS's.
            proposals: of each image, as a box head's; () for two anchors per position of all levels.
            settings: arguments of the loss, other than EVEN.
        """
        random = np.random.default_rng(seed)
        self.strides = {f"p{int(np.log2(s))}": s for s in strides}
        self.sizes, self.padded = list(sizes[: len(objects)]), padded
        self.truth = [random_boxes(random, n, z) for n, z in zip(objects, self.sizes)]
        self.settings = {**EVEN, **settings}
        self.level_positions = [] if proposals else [_grid(padded, s) for s in strides]
        self.rows = self._rows(random, ltrb, proposals)
        shape = self.rows.anchors.shape[:2]
        tensor = lambda *shape, scale=1.0: torch.tensor(  # noqa: E731
            random.normal(0, scale, shape).astype(np.float32)
        )
        columns = classes + bool(proposals)
        base = tensor(*shape, columns, scale=1.5) - 1.0
        models = []
        for count in channels:
            models.append(
                Heads(
                    base + tensor(*shape, columns, scale=0.7),
                    tensor(*shape, 4 * classes if class_specific else 4, scale=0.2) + 0.4 * ltrb,
                    {
                        name: tensor(shape[0], count, *_grid(padded, s))
                        for name, s in self.strides.items()
                    },
                    tensor(*shape) if centerness else None,
                )
            )
        self.student, self.teacher = models
        if proposals:
            predictions = "box_head"
            self.settings = {"predictions": predictions, **self.settings}
        self.transform = Box2BoxTransformLinear(True) if ltrb else Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
        for leaf in self.leaves().values():
            leaf.requires_grad_()
        self.loss = GID(**self.settings)
        self.loss.bind(*self.views())

    def _rows(self, random, ltrb: bool, proposals: Sequence[int]) -> Rows:
        decode = naive.decode_ltrb if ltrb else naive.decode_deltas
        label = naive.labels_by(BOX_HEAD_MATCHER if proposals else DENSE_MATCHER)
        images = len(self.sizes)
        if not proposals:
            anchors = torch.cat([_anchors(self.padded, s) for s in self.strides.values()])
            anchors = anchors.expand(images, *anchors.shape)
            return Rows(anchors, [anchors.shape[1]] * images, False, decode, label)
        boxes = []
        for count, size, truth in zip(proposals, self.sizes, self.truth):
            near = truth.repeat_interleave(2, dim=0)[:count]
            near = near + torch.tensor(random.normal(0, 3, near.shape)).float().clamp(-4, 4)
            boxes.append(torch.cat([near, random_boxes(random, count - len(near), size, least=0.2)]))
        anchors = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
        return Rows(anchors, list(proposals), True, decode, label)

    def leaves(self) -> dict[str, Tensor]:
        return {"logits": self.student.logits, "deltas": self.student.deltas, **self.student.maps}

    # The package's version.

    def batch(self) -> Batch:
        inputs = []
        for boxes, size in zip(self.truth, self.sizes):
            instances = Instances(size)
            instances.gt_boxes = Boxes(boxes)
            instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
            inputs.append({"image": torch.empty(3, *size), "instances": instances})
        return Batch(inputs, self.padded, iteration=0, max_iter=1)

    def predictions(self, model: Heads) -> Predictions:
        anchors, counts, valid = self.rows.anchors, self.rows.counts, None
        matcher = DENSE_MATCHER
        if self.rows.background:
            matcher = BOX_HEAD_MATCHER
            valid = torch.arange(anchors.shape[1]) < torch.tensor(counts)[:, None]
        else:
            anchors = anchors[0]
        centerness = [] if model.centerness is None else self._levels(model.centerness[..., None])
        return Predictions(
            logit_levels=self._levels(model.logits),
            delta_levels=self._levels(model.deltas),
            anchors=anchors,
            decode=decoder_of(self.transform),
            match=lambda boxes, kept: match_by_iou(matcher, boxes, kept, anchors),
            centerness_levels=centerness,
            background=self.rows.background,
            valid=valid,
        )

    def _levels(self, values: Tensor) -> list[Tensor]:
        """(N, R, X) to (N, P, A, X) of each level."""
        if self.rows.background:
            return [values.unsqueeze(2)]
        rows = [2 * height * width for height, width in self.level_positions]
        return [part.unflatten(1, (-1, 2)) for part in values.split(rows, dim=1)]

    def views(self) -> tuple[HeadsView, HeadsView]:
        views = []
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            views.append(heads_view(model.maps, role, self.predictions(model)))
        return views[0], views[1]

    def forward(self) -> dict[str, Tensor]:
        return self.loss(*self.views(), self.batch())

    def step(self) -> dict[str, Tensor]:
        """Forward and backward from fresh gradients; the terms."""
        for tensor in [*self.leaves().values(), *self.loss.parameters()]:
            tensor.grad = None
        terms = self.forward()
        sum(terms.values()).backward()
        return terms

    def instances(self):
        """The package's selection."""
        heads = self.predictions(self.student), self.predictions(self.teacher)
        return self.loss.instances(heads, self.batch())

    # The naive version.

    def naive_instances(self) -> list[naive.Instances]:
        inputs = self.teacher, self.student, self.rows, self.sizes, self.truth
        return naive.all_instances(*inputs, GID.Settings(**self.settings))

    def naive(self):
        """Terms by name, and the student's inputs with their gradients."""
        inputs = self.teacher, self.student, self.rows, self.sizes, self.truth, self.strides
        return naive_step(*inputs, self.settings, self._adapted)

    def _adapted(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.loss.pairs.adapters:
            return maps
        self.adapters = {
            name: [p.detach().double().requires_grad_() for p in (adapter.weight, adapter.bias)]
            for name, adapter in self.loss.pairs.adapters.items()
        }
        adapted = {}
        for name, level in maps.items():
            weight, bias = self.adapters.get(name) or self.adapters["shared"]
            adapted[name] = F.conv2d(level, weight, bias, padding=weight.shape[-1] // 2)
        return adapted

    def compare(self) -> dict[str, Tensor]:
        """All terms and gradients with the naive version's; the terms."""
        terms = self.step()
        expected, leaves = self.naive()
        compare_terms(terms, expected)
        gradients = {"logits": leaves.logits.grad, "deltas": leaves.deltas.grad}
        gradients.update({name: level.grad for name, level in leaves.maps.items()})
        for name, leaf in self.leaves().items():
            close(or_zero(leaf), or_zero(leaf, gradients[name]), name)
        for name, parameters in (self.adapters if expected and self._has_adapters() else {}).items():
            for actual, reference in zip(self.loss.pairs.adapters[name].parameters(), parameters):
                close(actual.grad, or_zero(reference), name)
        return terms

    def _has_adapters(self) -> bool:
        return self.loss.settings.pools and bool(self.loss.pairs.adapters)


def or_zero(leaf: Tensor, *gradient: Tensor | None) -> Tensor:
    """The gradient of a leaf, or the given one; zeros for None."""
    (found,) = gradient or (leaf.grad,)
    return torch.zeros_like(leaf) if found is None else found


def compare_terms(terms: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.dtype == torch.float32 and term.shape == (), name
        close(term, expected[name], name)


def _grid(padded: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-padded[0] // stride), -(-padded[1] // stride)


def _anchors(padded: tuple[int, int], stride: int) -> Tensor:
    """Two per position, (y, x, anchor): a wide and a high one."""
    height, width = _grid(padded, stride)
    boxes = []
    for y in range(height):
        for x in range(width):
            cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
            for w, h in ((1.7, 1.2), (1.1, 1.6)):
                boxes.append([cx - w * stride, cy - h * stride, cx + w * stride, cy + h * stride])
    return torch.tensor(boxes)


def plain_predictions(
    logits: Sequence, boxes: Sequence, *, background: bool = False, **others
) -> Predictions:
    """One image's rows with these logits (R, K) and boxes (R, 4): anchors are boxes, decoding adds."""
    logits, boxes = torch.tensor(logits).float(), torch.tensor(boxes).float()
    return Predictions(
        logit_levels=[logits[None, :, None]],
        delta_levels=[boxes[None, :, None]],
        anchors=torch.zeros(len(boxes), 4),
        decode=lambda deltas, anchors: anchors + deltas,
        match=refuse,
        background=background,
        **others,
    )


def refuse(*_, **__):
    raise AssertionError("this is not needed")


def dense_rows(outputs: Sequence[Tensor], length: int) -> Tensor:
    """A head's levels (N, A length, H, W) as (N, R, length), in the order (level, y, x, anchor)."""
    rows = []
    for output in outputs:
        images, _, height, width = output.shape
        rows.append(
            output.view(images, -1, length, height, width)
            .permute(0, 3, 4, 1, 2)
            .reshape(images, -1, length)
        )
    return torch.cat(rows, dim=1)
