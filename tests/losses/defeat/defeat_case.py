"""A step of DeFeat or FGFI by the package and by the naive version, from equal maps, heads and boxes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace

import closeness
import naive_defeat as naive
import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor

from distill_d2.losses.defeat import DeFeat
from distill_d2.testing.maps import MapDetector
from distill_d2.views import Batch, DetectorView, Predictions

WEIGHTS = [
    *("hint_neck_w", "hint_neck_back_w", "hint_bb_w", "hint_bb_back_w"),
    *("head_cls_w", "head_cls_back_w"),
]
OFF = dict.fromkeys(WEIGHTS, 0.0)
NECK = {**OFF, "hint_neck_w": 3.0, "hint_neck_back_w": 12.0}
BACKBONE = {**OFF, "hint_bb_w": 4.0, "hint_bb_back_w": 1.5}
HEAD = {**OFF, "head_cls_w": 2.0, "head_cls_back_w": 0.5}
ALL = {**NECK, "hint_bb_w": 4.0, "hint_bb_back_w": 1.5, "head_cls_w": 2.0, "head_cls_back_w": 0.5}
STAGES = {"res3": 8, "res4": 16, "res5": 32}
DENSE_LEVELS = ((6, 2), (3, 3))  # positions and anchors


close = functools.partial(closeness.close, floor=1e-06)


class _Maps(Backbone):
    """Returns a case's maps of some levels, after its bottom-up network did so with others."""

    def __init__(self, case: Case, role: str, strides: dict[str, int], bottom_up=None):
        super().__init__()
        self.case, self.role, self.strides = case, role, strides
        if bottom_up is not None:
            self.bottom_up = bottom_up

    def forward(self, _image) -> dict[str, Tensor]:
        if hasattr(self, "bottom_up"):
            self.bottom_up(None)
        return {name: self.case.maps[self.role][name] for name in self.strides}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.case.maps[self.role][name].shape[1], stride=stride)
            for name, stride in self.strides.items()
        }


class CaseView(DetectorView):
    """A view of a case's maps, anchors and heads."""

    case: Case
    offers = ("anchors", "dense", "box_head", "own_proposals")

    @property
    def num_classes(self) -> int:
        return self.case.classes

    @property
    def anchor_levels(self) -> list[str]:
        return list(self.case.anchors)

    def anchors(self) -> dict[str, Tensor]:
        return self.case.anchors

    def dense(self) -> Predictions:
        return self.case.dense_predictions(self.role)

    def sample_boxes(self, capability: str) -> tuple[Tensor, Tensor]:
        return torch.zeros(2, 4), torch.ones(2, 4)

    def sampled_proposals(self) -> list[Boxes]:
        assert self.role == "student"
        return self.case.proposals["student"]

    def own_proposals(self, batch: Batch):
        assert self.role == "teacher" and "own_proposals" in self.required
        return self.case.proposals["teacher"], self.case.labels_of("teacher")

    def box_head(self, proposals=None, classes=None) -> Predictions:
        assert "box_head" in self.required
        if proposals is None:
            assert self.role == "student"
            return self.case.box_predictions("student", "student", self.case.labels_of("student"))
        (source,) = (name for name, boxes in self.case.proposals.items() if boxes is proposals)
        return self.case.box_predictions(self.role, source, classes)


class Case:
    """Random maps, heads and ground truth of a batch, and a loss bound to them.

    Attributes:
        maps: of each role, by level or stage; logits: of each role, by source of proposals, of each
            image. The student's are leaves.
        labels: by source, for each image, the class of each row, K where it is background; of dense
            heads 1, 0 and -1.
        loss: the package's, with adapters that do something; views: to which it is bound.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        objects: Sequence[int] = (3, 1),
        padded: tuple[int, int] = (64, 96),
        strides: Sequence[int] = (4, 8, 16),
        channels: tuple[int, int] = (3, 3),
        stage_channels: tuple[int, int] = (2, 2),
        enlarged: Sequence[str] = (),
        rows: Sequence[int] = (9, 6, 4),
        classes: int = 4,
        dense: bool = False,
        iteration: int = 0,
        max_iter: int = 1,
        loss=DeFeat,
        fresh: bool = False,
        **settings,
    ):
        """
        Args:
            objects: how many each image has.
            channels, stage_channels: of the student and the teacher, of each level.
            enlarged: levels of the student that are a cell larger than the teacher's.
            fresh: adapters stay as they are made.
            rows: of each image's box head; dense: the heads are dense.
            settings: arguments of the loss.
        """
        random = np.random.default_rng(seed)
        self.classes, self.dense, self.padded = classes, dense, padded
        self.strides = {f"p{int(math.log2(stride))}": stride for stride in strides}
        self.iteration, self.max_iter = iteration, max_iter
        self.images = range(len(objects))
        self.truth = [_boxes(random, count, padded) for count in objects]
        self.rows = [_dense_rows()] * len(objects) if dense else list(rows[: len(objects)])
        self.maps: dict[str, dict[str, Tensor]] = {}
        self.logits: dict[str, dict[str, list[Tensor]]] = {}
        for role, of_level, of_stage in zip(("student", "teacher"), channels, stage_channels):
            larger = enlarged if role == "student" else ()
            self.maps[role] = {}
            for name, stride in {**self.strides, **STAGES}.items():
                size = [math.ceil(side / stride) + (name in larger) for side in padded]
                count = of_stage if name in STAGES else of_level
                shape = (len(objects), count + (name == "res5"), *size)
                self.maps[role][name] = _normal(random, *shape)
            columns = classes + (not dense)
            self.logits[role] = {
                source: [2 * _normal(random, count, columns) for count in self.rows]
                for source in ("student", "teacher")
            }
        low, high = (-1, 2) if dense else (0, classes + 1)
        self.labels = {
            source: [random.integers(low, high, count).tolist() for count in self.rows]
            for source in ("student", "teacher")
        }
        self.proposals = {
            source: [Boxes(torch.zeros(count, 4)) for count in self.rows] for source in self.labels
        }
        self.anchors = naive.square_anchors(
            {name: tuple(self.maps["teacher"][name].shape[-2:]) for name in self.strides}, self.strides
        )
        for leaf in self.leaves().values():
            leaf.requires_grad_()
        head = {"predictions": "dense" if dense else "box_head"} if loss is DeFeat else {}
        settings = {**head, **settings}
        self.loss = loss(**settings)
        defaults = {**vars(loss.Settings()), **settings}
        self.settings = SimpleNamespace(**defaults)
        self.views = [self._view(role) for role in self.maps]
        self.loss.bind(*self.views)
        with torch.no_grad():
            for parameter in () if fresh else self.loss.parameters():
                parameter.copy_(0.3 * _normal(random, *parameter.shape))

    def leaves(self) -> dict[str, Tensor]:
        found = dict(self.maps["student"])
        for source, logits in self.logits["student"].items():
            found.update({f"{source}'s rows {image}": x for image, x in enumerate(logits)})
        return found

    # The package's version.

    def _view(self, role: str) -> CaseView:
        backbone = _Maps(self, role, self.strides, _Maps(self, role, STAGES))
        view = CaseView(MapDetector(backbone), role)
        view.case = self
        return view

    def batch(self) -> Batch:
        inputs = []
        for boxes in self.truth:
            instances = Instances(self.padded, gt_boxes=Boxes(boxes))
            instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
            inputs.append({"image": torch.empty(3, *self.padded), "instances": instances})
        return Batch(inputs, self.padded, self.iteration, self.max_iter)

    def labels_of(self, source: str) -> list[Tensor]:
        return [torch.tensor(labels) for labels in self.labels[source]]

    def box_predictions(self, role: str, source: str, classes: list[Tensor] | None) -> Predictions:
        """Rows that only fill up have numbers that would be seen."""
        padded = torch.nn.utils.rnn.pad_sequence(self.logits[role][source], batch_first=True)
        valid = torch.arange(padded.shape[1]) < torch.tensor(self.rows)[:, None]
        padded = torch.where(
            valid[..., None], padded, torch.full_like(padded, 3.0 + (role == "student"))
        )
        if classes is not None:
            classes = torch.nn.utils.rnn.pad_sequence(
                classes, batch_first=True, padding_value=self.classes
            )
        return _predictions([padded[:, :, None]], background=True, valid=valid, classes=classes)

    def dense_predictions(self, role: str) -> Predictions:
        logits = torch.stack(self.logits[role]["student"])
        parts = logits.split([positions * anchors for positions, anchors in DENSE_LEVELS], dim=1)
        levels = [part.unflatten(1, shape) for part, shape in zip(parts, DENSE_LEVELS)]
        return _predictions(levels, match=self._match)

    def _match(self, boxes: Tensor, valid: Tensor) -> Tensor:
        for found, there, truth in zip(boxes, valid, self.truth):
            assert torch.equal(found[there], truth)
        return torch.tensor(self.labels["student"], dtype=torch.int8)

    def forward(self) -> dict[str, Tensor]:
        with contextlib.ExitStack() as stack:
            for view in self.views:
                stack.enter_context(view.recording())
                view.model.backbone(None)
            return self.loss(*self.views, self.batch())

    def run(self) -> dict[str, Tensor]:
        """Forward and backward from fresh gradients; the terms."""
        for tensor in [*self.leaves().values(), *self.loss.parameters()]:
            tensor.grad = None
        terms = self.forward()
        sum(terms.values()).backward()
        return terms

    # The naive version.

    def naive(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms by name, and gradients by the names of leaves and of parameters."""
        leaves = {name: x.detach().double().requires_grad_() for name, x in self.leaves().items()}
        parameters = {
            name: x.detach().double().requires_grad_() for name, x in self.loss.named_parameters()
        }
        step = naive.Step(
            student=leaves,
            teacher={name: x.double() for name, x in self.maps["teacher"].items()},
            strides={name: s for name, s in self.strides.items() if name in self._necks()},
            stages=getattr(self.settings, "bb_features", ()),
            anchors=self.anchors,
            truth=self.truth,
            padded=self.padded,
            adapters=_adapters(parameters),
            rows={source: self._naive_rows(leaves, source) for source in self.labels},
            background=not self.dense,
            iteration=self.iteration,
            max_iter=self.max_iter,
        )
        terms = (naive.defeat if type(self.loss) is DeFeat else naive.fgfi)(step, self.settings)
        total = sum(terms.values())
        if total.requires_grad:
            total.backward()
        return terms, {name: x.grad for name, x in {**leaves, **parameters}.items()}

    def _necks(self) -> Sequence[str]:
        return self.settings.in_features or list(self.strides)

    def _naive_rows(self, leaves: dict[str, Tensor], source: str) -> naive.RowSet:
        student = torch.cat([leaves[f"{source}'s rows {image}"] for image in self.images])
        teacher = torch.cat(self.logits["teacher"][source]).double()
        labels = torch.cat(self.labels_of(source))
        if self.dense:
            return naive.RowSet(student, teacher, labels == 1, labels == 0)
        background = labels == self.classes
        return naive.RowSet(student, teacher, ~background, background, labels)

    def compare(self) -> dict[str, Tensor]:
        """All terms and gradients with the naive version's; the terms."""
        terms = self.run()
        expected, gradients = self.naive()
        assert terms.keys() == expected.keys()
        for name, term in terms.items():
            assert term.dtype == torch.float32 and term.shape == (), name
            close(term, expected[name], name)
        for name, leaf in {**self.leaves(), **dict(self.loss.named_parameters())}.items():
            actual, reference = (
                torch.zeros_like(leaf) if g is None else g for g in (leaf.grad, gradients[name])
            )
            close(actual, reference, name)
        return terms


def _boxes(random: np.random.Generator, count: int, padded: tuple[int, int]) -> Tensor:
    """Of sides from a tenth of the image's to all of it; some on the right and bottom borders."""
    corner, sides = random.uniform(0, 0.7, (count, 2)), random.uniform(0.1, 1.0, (count, 2)) ** 2
    boxes = np.hstack([corner, (corner + sides).clip(max=1.0)]) * np.tile(padded[::-1], 2)
    return torch.tensor(boxes).float().view(-1, 4)


def _normal(random: np.random.Generator, *shape: int) -> Tensor:
    return torch.tensor(random.normal(size=shape).astype(np.float32))


def _dense_rows() -> int:
    return sum(positions * anchors for positions, anchors in DENSE_LEVELS)


def _predictions(levels: list[Tensor], match=None, **others) -> Predictions:
    shapes = [level.shape[:-1] for level in levels]
    return Predictions(
        logit_levels=levels,
        delta_levels=[torch.zeros(*shape, 4) for shape in shapes],
        anchors=torch.zeros(sum(shape[1] * shape[2] for shape in shapes), 4),
        decode=refuse,
        match=match or refuse,
        **others,
    )


def _adapters(parameters: dict[str, Tensor]) -> naive.Adapters:
    """Weight and bias by level, of "neck.adapters.p3.weight" or "backbone.adapters.res3.0.weight"."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        level = name.split("adapters.")[1].split(".")[0]
        found.setdefault(level, {})[name.rpartition(".")[2]] = parameter
    return {level: (parts["weight"], parts["bias"]) for level, parts in found.items()}


def refuse(*_, **__):
    raise AssertionError("this is not needed")
