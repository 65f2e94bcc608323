"""The part of a view that is the same for every detector: neck levels, backbone stages and taps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import (
    Any,
    Callable,
)

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import nn

from ..taps import Taps, map_tensors
from ..upload import contiguous
from .batch import Batch
from .predictions import Predictions

_VIEWS: dict[type, type[DetectorView]] = {}


def register_view(detector: type) -> Callable:
    """Class decorator: the view to use for this meta-architecture and its subclasses."""

    def register(view: type[DetectorView]) -> type[DetectorView]:
        _VIEWS[detector] = view
        return view

    return register


def build_view(model: nn.Module, role: str) -> DetectorView:
    """The view registered for the nearest base class of ``model``; the plain one if there is none."""
    return view_type(model)(model, role)


def view_type(model: nn.Module) -> type[DetectorView]:
    """The class of ``build_view(model, ...)``; nothing is attached to the model."""
    registered = (_VIEWS[ancestor] for ancestor in type(model).__mro__ if ancestor in _VIEWS)
    return next(registered, DetectorView)


def require_same_classes(student: DetectorView, teacher: DetectorView, loss: str) -> None:
    """Check, for a loss that compares class logits, that both detectors have the same classes.

    Raises:
        ValueError: the numbers of classes differ.
    """
    if student.num_classes == teacher.num_classes:
        return
    raise ValueError(
        f"{loss} compares class logits, but the student has {student.num_classes} classes and the "
        f"teacher {teacher.num_classes}. Use a teacher trained on the student's classes, or a loss "
        "on features (MODEL.DISTILLER.TYPES)"
    )


def require_same_boxes(student: DetectorView, teacher: DetectorView, capability: str, loss: str) -> None:
    """Check, for a loss that compares predictions row by row, that both detectors have the same
    anchors and box parametrisation.

    Raises:
        ValueError: they differ.
    """
    ours, theirs = student.sample_boxes(capability), teacher.sample_boxes(capability)
    for what, a, b in zip(("anchors", "box parametrisations"), ours, theirs):
        if a.shape != b.shape or not torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-3):
            raise ValueError(
                f"{loss} compares the {capability} predictions of student and teacher row by row, but "
                f"their {what} differ: in a sample of them the student has {_listing(a)}, the teacher "
                f"{_listing(b)}. Use a teacher of the student's kind with the same "
                "MODEL.ANCHOR_GENERATOR and BBOX_REG_WEIGHTS, or a loss on features (MODEL.DISTILLER.TYPES)"
            )


def _listing(boxes: torch.Tensor) -> str:
    first = ", ".join(f"{number:.1f}" for number in boxes[0].tolist())
    last = ", ".join(f"{number:.1f}" for number in boxes[-1].tolist())
    return f"{len(boxes)} boxes, from [{first}] to [{last}]"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of ``model`` in eval mode and without gradients; afterwards each module's mode is back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class DetectorView:
    """One detector as the losses see it; lazy, so that what nobody asks for is not computed.

    When the Distiller is built, a loss states what it will need with the ``require_*`` methods,
    which fail at once for what this detector cannot give. In a step, it reads ``features``,
    ``bottom_up``, ``level``, ``tap`` and, where the detector has them, ``dense``, ``rpn``, ``anchors``,
    ``box_head``, ``own_proposals`` and ``score_boxes``. All tensors come in float32; the student's
    carry gradients.
    """

    #: What this kind of detector offers beyond features and taps: names of methods, "dense" for one.
    offers: tuple[str, ...] = ()

    #: Whether its dense predictions have a centerness; whether they have a background class.
    has_centerness = False
    has_background = False

    #: Names of the detector's own loss terms on classes, and of those on boxes.
    class_losses: tuple[str, ...] = ("loss_cls",)
    box_losses: tuple[str, ...] = ("loss_box_reg",)

    #: Plain attributes of the detector, floats, that training changes: checkpoints keep them. The default
    #: is what detectron2's dense detectors have, a moving average of the number of positives.
    training_state: tuple[str, ...] = ("loss_normalizer",)

    def __init__(self, model: nn.Module, role: str):
        """
        Args:
            model: a detectron2 meta-architecture with a ``backbone``.
            role: "student" or "teacher", for messages.

        Raises:
            TypeError: the model has no backbone to look at.
        """
        if not isinstance(getattr(model, "backbone", None), nn.Module):
            raise TypeError(f"the {role}, a {type(model).__name__}, has no module 'backbone'")
        self.model = model
        self.role = role
        self.required: set[str] = set()
        self._levels_read: set[str] = set()
        self._taps_read: set[str] = set()
        self.taps = Taps(model)
        self.taps.add("backbone")
        #: Wraps whatever part of the detector the view runs by itself (the teacher's heads).
        self.context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self._of_step: dict[Any, Any] = {}

    def replace_model(self, model: nn.Module) -> None:
        """Look at this detector instead, which has the same modules and computes the same."""
        with self.taps.paused():
            self.model = self.taps.model = model

    # What the detector has, known when it is built.

    @property
    def num_classes(self) -> int | None:
        """Number of foreground classes; None where the kind of detector is unknown."""
        return None

    @property
    def probe_size(self) -> tuple[int, int]:
        """(H, W) in pixels of a small image that this detector's backbone takes."""
        return (2 * max(self.model.backbone.size_divisibility, 32),) * 2

    @property
    def fixed_size(self) -> int | None:
        """Height and width in pixels of all its images, where it takes no others."""
        return None

    @property
    def strides(self) -> dict[str, int]:
        """The stride in pixels of each neck level, by name."""
        return {name: shape.stride for name, shape in self.neck_shapes.items()}

    @property
    def neck_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output of the backbone (of its FPN), by name."""
        return self.model.backbone.output_shape()

    @property
    def stage_shapes(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each stage of the bottom-up network, by name."""
        bottom_up = self._bottom_up()
        channels = getattr(bottom_up, "_out_feature_channels", None)
        strides = getattr(bottom_up, "_out_feature_strides", None)
        if channels is None or strides is None:
            return bottom_up.output_shape()
        return {name: ShapeSpec(channels=channels[name], stride=strides[name]) for name in channels}

    def require_level(self, name: str) -> ShapeSpec:
        """State that the level ``name`` (of the neck, or a bottom-up stage) will be read.

        Raises:
            KeyError: there is none; the message lists those that exist.
        """
        shapes = {**self.stage_shapes, **self.neck_shapes}
        if name not in shapes:
            raise KeyError(
                f"the {self.role} ({type(self.model).__name__}) has no level '{name}'; its neck has "
                f"{list(self.neck_shapes)}, its bottom-up network {list(self.stage_shapes)}"
            )
        self.taps.add(self._level_path(name))
        self._levels_read.add(name)
        return shapes[name]

    def require_neck(self) -> None:
        """State that any level of the neck may be read."""
        self.require_tap("backbone")

    def require_tap(self, path: str) -> None:
        """State that the output of the module with this dotted name will be read.

        Raises:
            KeyError: there is none; the message lists close names.
        """
        self.taps.add(path)
        self._taps_read.add(path)

    def require(self, capability: str) -> None:
        """State that ``capability`` will be used: "dense", "rpn", "anchors", "box_head",
        "own_proposals" or "score_boxes".

        Raises:
            TypeError: this kind of detector does not have it.
        """
        if capability not in self.offers:
            raise TypeError(
                f"the {self.role} is a {type(self.model).__name__}, which has no {capability}(); "
                f"it offers features, bottom_up, tap{''.join(', ' + name for name in self.offers)}"
            )
        self.required.add(capability)

    @property
    def backbone_reads(self) -> list[str]:
        """Names of the modules whose outputs losses have stated to read, if all are the backbone or inside
        it and no more is required; otherwise, or if nothing was stated, none."""
        paths = self._taps_read.union(map(self._level_path, self._levels_read))
        inside = all(path.split(".")[0] == "backbone" for path in paths)
        return sorted(paths) if inside and not self.required else []

    def until_read(self) -> contextlib.AbstractContextManager:
        """While recording, a forward of the detector inside ends with the last of ``backbone_reads``."""
        return self.taps.stopping_after(self.backbone_reads, last="backbone")

    def probe(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Run the backbone once on a black image; the shape (C, H, W) of every level by name."""
        with evaluating(self.model.backbone), self.recording():
            self.model.backbone(self._black_image(height, width))
            names = list(self.neck_shapes) + [
                name for name in self.stage_shapes if self.taps.has(self._stage_path(name))
            ]
            return {name: tuple(self.level(name).shape[1:]) for name in names}

    def reached_parameters(self) -> set[nn.Parameter]:
        """Parameters that the levels and taps which losses read depend on; runs the backbone once."""
        backbone = self.model.backbone
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        sums: list[torch.Tensor] = []
        with evaluating(backbone), torch.enable_grad(), self.recording():
            with self.until_read():
                backbone(self._black_image(*self.probe_size))
            outputs = [self.level(name) for name in self._levels_read]
            outputs += [self.taps.output(path) for path in self._taps_read]
            map_tensors(lambda tensor: sums.append(tensor.sum()), outputs)
        trained = [value for value in sums if value.requires_grad]
        if not trained:
            return set()
        gradients = torch.autograd.grad(trained, parameters, allow_unused=True)
        return {p for p, gradient in zip(parameters, gradients) if gradient is not None}

    # What the detector computed in this step.

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what the detector computes inside; forget all of it at the end."""
        try:
            with self.taps.recording():
                yield
        finally:
            self._of_step.clear()

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """The neck's outputs by name, each (N, C, H/stride, W/stride)."""
        return {name: self.level(name) for name in self.neck_shapes}

    @property
    def bottom_up(self) -> dict[str, torch.Tensor]:
        """The required stages of the bottom-up network by name, each (N, C, H/stride, W/stride)."""
        return {
            name: self.level(name) for name in self.stage_shapes if self.taps.has(self._stage_path(name))
        }

    def level(self, name: str, *, contiguous: bool = True) -> torch.Tensor:
        """The level ``name`` of the neck, or a required bottom-up stage: (N, C, H, W).

        Args:
            contiguous: False: in whatever memory layout it was computed, which saves a copy.
        """
        return self.once((name, contiguous), lambda: self._level(name, contiguous))

    def tap(self, path: str, index: Any = None) -> Any:
        """The output of the module ``path``; ``index`` picks from a dict, tuple or list of calls."""
        output = self.once(path, lambda: map_tensors(_to_float, self.taps.output(path)))
        return output if index is None else output[index]

    def own_output(self, path: str) -> Any:
        """The output of the first run of the module ``path`` in this step: the detector's own, whatever
        else was given to it afterwards."""
        runs = self.tap(path)
        return runs[0] if isinstance(runs, list) else runs

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What ``compute()`` returned when this key was first asked for in this step."""
        if key not in self._of_step:
            self._of_step[key] = compute()
        return self._of_step[key]

    def dense(self) -> Predictions:
        """A one-stage head's predictions for all anchors or points of a batch."""
        raise TypeError(f"{type(self.model).__name__} has no dense predictions")

    def rpn(self) -> Predictions:
        """A region proposal network's predictions for all anchors; its one class is "object"."""
        raise TypeError(f"{type(self.model).__name__} has no region proposal network")

    @property
    def anchor_levels(self) -> Sequence[str]:
        """Names of the levels that ``anchors`` has."""
        raise TypeError(f"{type(self.model).__name__} has no anchors")

    def anchors(self) -> dict[str, torch.Tensor]:
        """The anchors (H, W, A, 4) of each level of a head on the neck, absolute XYXY."""
        raise TypeError(f"{type(self.model).__name__} has no anchors")

    def box_head(
        self,
        proposals: list[Boxes] | None = None,
        classes: list[torch.Tensor] | None = None,
    ) -> Predictions:
        """A box head's predictions for N images' proposals, of these classes if they are known; None:
        for ``sampled_proposals``, as the student has scored them."""
        raise TypeError(f"{type(self.model).__name__} has no box head")

    def sampled_proposals(self) -> list[Boxes]:
        """N images' proposals that the student sampled for its own loss in this step."""
        raise TypeError(f"{type(self.model).__name__} has no proposals")

    def own_proposals(self, batch: Batch) -> tuple[list[Boxes], list[torch.Tensor]]:
        """N images' proposals of a frozen detector, sampled as for its own loss, and their classes."""
        raise TypeError(f"{type(self.model).__name__} has no proposals")

    def score_boxes(self, boxes: list[Boxes]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A two-stage head's class logits and deltas on given boxes."""
        raise TypeError(f"{type(self.model).__name__} cannot score boxes")

    def sample_boxes(self, capability: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Some anchors (R, 4) of this detector, and the boxes (R, 4) that fixed deltas make of them."""
        raise TypeError(f"{type(self.model).__name__} has no {capability}()")

    def _level(self, name: str, contiguous: bool) -> torch.Tensor:
        output = self.taps.output(self._level_path(name))
        level = output[name] if isinstance(output, dict) else output
        return _to_float(level) if contiguous else level.float()

    def _bottom_up(self) -> nn.Module:
        return getattr(self.model.backbone, "bottom_up", self.model.backbone)

    def _level_path(self, name: str) -> str:
        return "backbone" if name in self.neck_shapes else self._stage_path(name)

    def _stage_path(self, name: str) -> str:
        bottom_up = self._bottom_up()
        path = "backbone" if bottom_up is self.model.backbone else "backbone.bottom_up"
        return f"{path}.{name}" if hasattr(bottom_up, name) else path

    def _black_image(self, height: int, width: int) -> torch.Tensor:
        mean = getattr(self.model, "pixel_mean", None)
        channels = 3 if mean is None else mean.numel()
        device = next(self.model.parameters()).device
        return torch.zeros(1, channels, height, width, device=device)


def _to_float(tensor: torch.Tensor) -> torch.Tensor:
    # Contiguous too: element-wise work on two memory layouts is ten times slower on a CPU.
    return contiguous(tensor.float()) if tensor.is_floating_point() else tensor
