"""Run a frozen teacher, as much of it as losses read."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import torch
from torch import nn

from ..precision import native_bfloat16
from ..views import build_view
from .cache import CacheSettings, Layout, TeacherCache
from .cache.cache import Store
from .prepare import prepared_copy

logger = logging.getLogger(__name__)

_KEY = "MODEL.DISTILLER.TEACHER_AUTOCAST"
_DTYPES = {"": None, "float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PROBED = 3  # images
#: Values of TEACHER_AUTOCAST.
AUTOCAST_CHOICES = ("auto", *_DTYPES)


class Teacher:
    """A frozen detector and its view.

    It is not a Module, so it is in no parameters(), state_dict(), optimizer, DDP or EMA of the model
    that holds it. A copy shares the frozen weights, until one of the two is moved.

    Attributes:
        model: the whole detector, in eval mode, without gradients; it stays as it was loaded. Do not
            change its weights after the first step.
        view: what losses may ask of it in a step.
        input_format: channel order of its input, "BGR" or "RGB".
        classes: the names of its classes, by number; None: not known.
        cache_settings: where its outputs are to be kept.
        cache: keeps its outputs; None: it is run in each step. A trainer that knows the images sets it, see
            ``distill_d2.engine.teacher_cache``.
    """

    cache: TeacherCache | None

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        source: str = "",
        prepare: bool = True,
        autocast: str = "auto",
        compile: bool = False,
        classes: Sequence[str] | None = None,
        cache: CacheSettings | None = None,
    ):
        """
        Args:
            model: a detectron2 detector with its weights loaded.
            input_format: "BGR" or "RGB".
            source: where model and weights come from, for the log.
            prepare: run a copy with normalization folded into convolutions and the faster memory
                layout, made before the first step. Outputs stay equal within float error.
            autocast: "auto", on a GPU the precision of the student's step, else float32; "float32" or "",
                "float16", or "bfloat16".
            compile: torch.compile the backbone.
            classes: the names of its classes, by number; not used if the detector has more or fewer.
            cache: where its outputs are to be kept; None: nowhere.

        Raises:
            ValueError: unknown input_format or autocast.
        """
        if input_format not in ("BGR", "RGB"):
            raise ValueError(f"teacher input format '{input_format}'; expected 'BGR' or 'RGB'")
        if autocast not in AUTOCAST_CHOICES:
            raise ValueError(f"{_KEY} is '{autocast}'; expected one of {list(AUTOCAST_CHOICES)}")
        # Any, because Module's annotations know none of a detector's attributes.
        self.model: Any = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.source = source
        self.view = build_view(model, "teacher")
        self.view.context = self._context
        fits = classes is not None and len(classes) == self.view.num_classes
        self.classes = list(classes) if classes and fits else None
        self.cache_settings = cache or CacheSettings()
        self.cache = None
        self._lent = False
        self._prepare = prepare
        self._autocast = autocast
        self._dtype = _DTYPES.get(autocast)  # of this step; None: float32
        self._compile = compile
        self._backbone: Callable[[torch.Tensor], Any] | None = None  # what runs; None: not ready yet

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def padding(self) -> tuple[int, int]:
        """(size divisibility, square size or 0) in pixels of the input that its backbone takes."""
        backbone = self.model.backbone
        constraints = backbone.padding_constraints or {}
        divisibility = constraints.get("size_divisibility", backbone.size_divisibility)
        return max(divisibility, 1), constraints.get("square_size", 0)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply what ``nn.Module._apply`` applies (a move, a cast) to the teacher."""
        self._discard_prepared()
        self.cache = None
        self.model._apply(function)

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError if the autocast type is only emulated on ``device``."""
        if _DTYPES.get(self._autocast) is torch.bfloat16 and not native_bfloat16(device):
            raise ValueError(
                f"{_KEY} is 'bfloat16', which this {device.type} device only emulates, slower than float32; "
                "use 'float32'" + (" or 'float16'" if device.type == "cuda" else "")
            )

    def check_taps(self) -> None:
        """Raises ValueError if losses tap modules inside a backbone that is to be compiled."""
        inside = [path for path in self.view.taps.paths if path.startswith("backbone.")]
        if self._compile and inside:
            raise ValueError(
                f"MODEL.DISTILLER.TEACHER_COMPILE is True, but losses read {inside}, inside the "
                "compiled backbone; use levels of the neck, or set it to False"
            )

    def observe(
        self,
        images: Sequence[torch.Tensor],
        padded_size: tuple[int, int],
        originals: Sequence[torch.Tensor] = (),
    ) -> None:
        """Run backbone and neck, or as much of them as losses read, or take what the cache has of them.

        The view remembers the outputs, if it is recording.

        Args:
            images: N images (3, H_i, W_i) in this teacher's channel order. Each is normalized with the
                teacher's mean and std and padded with zeros, at bottom and right.
            padded_size: (H, W) of the padded images in pixels.
            originals: the same images on the host; without them the cache is not used.
        """
        self._dtype = self._precision()
        if self.cache is None or self._lent or not originals:
            self.run(images, padded_size)
        else:
            self.cache.observe(images, padded_size, originals, self._dtype)

    def run(self, images: Sequence[torch.Tensor], padded_size: tuple[int, int]) -> None:
        """As ``observe``, in the precision of its last call, without the cache."""
        backbone = self._backbone or self._make_ready()
        batch = self._batch(images, padded_size)
        with self._context(), self._until_read():
            features = backbone(batch)
            if self._compile:  # hooks of the backbone itself are not part of its compiled forward
                self.view.taps.put("backbone", features)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, another model may let it run, in a precision of its own; what prepares it for the first step is
        not decided there, and nothing is kept."""
        ready, lent = self._backbone is not None, self._lent
        self._lent = True
        try:
            yield
        finally:
            self._lent = lent
            if not ready:
                self._discard_prepared()

    def image_outputs(
        self, images: Sequence[torch.Tensor], padded_size: tuple[int, int]
    ) -> dict[str, list[Any]]:
        """The outputs of backbone, neck, and of the heads that losses read and that depend on the image alone, by
        dotted name of the module, one for each of its runs; the view, which must be recording, forgets them."""
        self.run(images, padded_size)
        self.view.run_image_heads()
        return self.view.take()

    def layout(self) -> Layout:
        """Where the tensors that losses read are in its outputs for some black images.

        Raises:
            ValueError: an output cannot be kept by image; the message names the module.
        """
        height, width = self.view.probe_size
        images = [torch.zeros(3, height, width, device=self.device)] * _PROBED
        with self.lent(), self.view.recording():
            return Layout.checked(self.view, self.image_outputs(images, (height, width)), _PROBED)

    def keep_outputs(self, store: Store, layout: Layout | None = None, **options: Any) -> None:
        """Keep what losses read of it by image from now on; call it when all losses are bound.

        Args:
            layout: of ``layout``.
            options: of TeacherCache.

        Raises: see ``layout``.
        """
        layout = layout or self.layout()
        self.cache = TeacherCache(self.view, self.run, self.image_outputs, store, layout, **options)

    @property
    def run_settings(self) -> tuple[Any, ...]:
        """What its outputs depend on besides its model, in plain values."""
        return self.input_format, self._prepare, self._compile

    def predictor(self, input_format: str) -> nn.Module:
        """The detector, with its usual predictions, for images in the channel order ``input_format``."""
        if input_format == self.input_format:
            return self.model
        return _ReversedChannels(self.model).eval()

    def describe(self) -> str:
        """One line: where it comes from, its size, and which part of it runs in each step."""
        heads, reads = sorted(self.view.required), self.view.backbone_reads
        part = "backbone and neck" + (f", and its head for {', '.join(heads)}" if heads else "")
        if self._ends_early:
            part = f"its backbone up to {', '.join(reads)}"
        count = sum(p.numel() for p in self.model.parameters())
        source = f"{self.source}; " if self.source else ""
        return f"{source}{type(self.model).__name__}, {count / 1e6:.3g} M parameters; runs {part}"

    def __getstate__(self) -> dict[str, Any]:
        self._discard_prepared()  # it is made again when needed
        return {**self.__dict__, "cache": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        # Parameters of its own, so that a move of one does not move the other, but the same memory.
        for parameter in self.model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        memo.update((id(buffer), buffer) for buffer in self.model.buffers())
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @property
    def _ends_early(self) -> bool:
        """Whether losses read stages of the bottom-up network alone."""
        reads = self.view.backbone_reads
        return bool(reads) and "backbone" not in reads

    def _until_read(self) -> contextlib.AbstractContextManager:
        return self.view.until_read() if self._ends_early else contextlib.nullcontext()

    def _precision(self) -> torch.dtype | None:
        """The autocast type for this step; None is float32."""
        if self._autocast != "auto":
            return _DTYPES[self._autocast]
        if self.device.type != "cuda" or not torch.is_autocast_enabled():  # of GPUs
            return None
        if not hasattr(torch, "get_autocast_dtype"):  # torch 2.3
            return torch.get_autocast_gpu_dtype()
        return torch.get_autocast_dtype("cuda")

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        autocast = torch.autocast(
            self.device.type, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None
        )
        with torch.no_grad(), autocast:
            yield

    def _make_ready(self) -> Callable[[torch.Tensor], Any]:
        """Prepare and compile what runs; returns the backbone."""
        self.check_device(self.device)
        model = self.model
        if self._prepare:
            with self.view.taps.paused():
                heads, tapped = bool(self.view.required), self.view.taps.paths
                model = prepared_copy(
                    self.model,
                    self._memory_format(),
                    heads=heads,
                    tapped=tapped,
                    probe_size=self.view.probe_size,
                )
            self.view.replace_model(model)
        backbone = torch.compile(model.backbone.forward) if self._compile else model.backbone
        self._backbone = backbone
        precision = str(self._dtype or torch.float32).rpartition(".")[2]
        logger.debug(f"The teacher runs in {precision} ({_KEY} is '{self._autocast}').")
        return backbone

    def _discard_prepared(self) -> None:
        self._backbone = None
        self.view.replace_model(self.model)

    def _memory_format(self) -> torch.memory_format:
        # Faster on CPUs; on GPUs only with half-precision kernels.
        if self._prepare and (self.device.type == "cpu" or self._dtype is not None):
            return torch.channels_last
        return torch.contiguous_format

    def _batch(self, images: Sequence[torch.Tensor], padded_size: tuple[int, int]) -> torch.Tensor:
        mean, std = self.model.pixel_mean, self.model.pixel_std
        batch = torch.zeros(
            (len(images), mean.numel(), *padded_size), dtype=mean.dtype, device=mean.device
        ).contiguous(memory_format=self._memory_format())
        for padded, image in zip(batch, images):
            padded[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
        return batch


class _ReversedChannels(nn.Module):
    """A detector for images whose channels come in the opposite order."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: list[dict[str, Any]]):
        return self.model([{**item, "image": item["image"].flip(0)} for item in batched_inputs])
