"""The part of a view that is the same for every detector: neck levels, backbone stages and taps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Callable

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


class DetectorView:
    """One detector as the losses see it; lazy, so that only what a loss asks for is computed.

    When the Distiller is built, a loss states what it will need with the ``require_*`` methods,
    which raise an error for what this detector cannot give. In a step, it reads ``features``,
    ``bottom_up``, ``level``, ``tap`` and, where the detector has them, ``dense``, ``rpn``, ``anchors``,
    ``box_head``, ``own_proposals`` and ``score_boxes``. All tensors come in float32; the student's
    carry gradients.
    """

    #: What this kind of detector offers beyond features and taps: names of methods, "dense" for one.
    offers: tuple[str, ...] = ()

    #: Which of these run a head that depends on the image alone, and whose outputs a tap remembers; what is
    #: below it gives only shapes then. What else is offered may read any level of the neck.
    image_heads: tuple[str, ...] = ()

    #: Whether its dense predictions have a centerness; whether they have a background class.
    has_centerness = False
    has_background = False

    #: Names of the detector's own loss terms on classes, and of those on boxes.
    class_losses: tuple[str, ...] = ("loss_cls",)
    box_losses: tuple[str, ...] = ("loss_box_reg",)

    #: Dotted names of the detector's numbers, floats or tensors, that training changes and its state_dict
    #: lacks: checkpoints keep them. The default is what detectron2's dense detectors have, a moving average
    #: of the number of positives.
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
        self.model: Any = model  # Module's annotations know none of a detector's attributes
        self.role = role
        self.required: set[str] = set()
        #: What compares this detector's class logits with another's by number: losses' names or keys.
        self.compared_by: list[str] = []
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

    @property
    def reads(self) -> tuple[list[str], ...]:
        """What losses have stated to read: levels, taps and capabilities, each in order."""
        return sorted(self._levels_read), sorted(self._taps_read), sorted(self.required)

    def reads_entry(self, path: str, name: str) -> bool:
        """Whether the numbers of the entry ``name`` of the dict that the module ``path`` returns are read."""
        if path in self._taps_read or name in self._levels_read:
            return True
        return path == "backbone" and not self.required <= {*self.image_heads, "anchors"}

    def run_image_heads(self) -> None:
        """Run the ``image_heads`` that losses read on what the backbone computed; taps remember the outputs."""
        for capability in self.image_heads:
            if capability in self.required:
                getattr(self, capability)()

    def take(self) -> dict[str, list[Any]]:
        """All recorded outputs by module, one for each of its runs; the view forgets them."""
        taken = self.taps.take()
        self._of_step.clear()
        return taken

    def outputs_read(self) -> list[Any]:
        """The recorded outputs, levels and taps, that losses have stated to read."""
        levels = [self.level(name) for name in self._levels_read]
        return levels + [self.taps.output(path) for path in self._taps_read]

    def until_read(self) -> contextlib.AbstractContextManager:
        """While recording, a forward of the detector inside ends with the last of ``backbone_reads``."""
        return self.taps.stopping_after(self.backbone_reads, last="backbone")

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
            name: self.level(name) for name in self.stage_shapes if self.taps.has(self.stage_path(name))
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

    def _bottom_up(self) -> Any:
        return getattr(self.model.backbone, "bottom_up", self.model.backbone)

    def _level_path(self, name: str) -> str:
        return "backbone" if name in self.neck_shapes else self.stage_path(name)

    def stage_path(self, name: str) -> str:
        """The dotted name of the module whose output is, or has, the bottom-up stage ``name``."""
        bottom_up = self._bottom_up()
        path = "backbone" if bottom_up is self.model.backbone else "backbone.bottom_up"
        return f"{path}.{name}" if hasattr(bottom_up, name) else path


def _to_float(tensor: torch.Tensor) -> torch.Tensor:
    # Contiguous too: element-wise work on two memory layouts is ten times slower on a CPU.
    return contiguous(tensor.float()) if tensor.is_floating_point() else tensor
