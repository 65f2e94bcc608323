"""Build, load, verify, freeze and run a teacher."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from . import model_zoo
from .checkpoint import SafeCheckpointer
from .config import add_distill_config, load_yaml, student_config
from .plugins import import_detectors
from .prepare import fold_norms, native_bfloat16, prefer_onednn
from .views import build_view

_DTYPES = {"": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Keys that never change what a detector computes: normalisation constants and anchors, which come
# from the config, and batch normalisation's step counter, which evaluation does not use.
_NEUTRAL_KEYS = (r"(^|\.)pixel_(mean|std)$", r"anchor_generator\.cell_anchors", r"num_batches_tracked$")


class Teacher:
    """A frozen detector and its view. Not a Module: so that it is in no parameters(), state_dict(),
    optimizer, DDP or EMA of the model that holds it.

    Attributes:
        model: the whole detector, in eval mode, without gradients.
        view: what losses may ask of it in a step.
        input_format: channel order of its input, "BGR" or "RGB".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        source: str = "",
        prepare: bool = True,
        autocast: str = "",
        compile: bool = False,
    ):
        """
        Args:
            model: a detectron2 detector with its weights loaded.
            input_format: "BGR" or "RGB".
            source: where model and weights come from, for the log.
            prepare: fold normalisation into convolutions and choose the faster memory layout, once,
                before the first step. Outputs stay equal within float error.
            autocast: "", "float16" or "bfloat16".
            compile: torch.compile the backbone.

        Raises:
            ValueError: unknown input_format or autocast.
        """
        if input_format not in ("BGR", "RGB"):
            raise ValueError(f"teacher input format '{input_format}'; expected 'BGR' or 'RGB'")
        if autocast not in _DTYPES:
            raise ValueError(
                f"MODEL.DISTILLER.TEACHER_AUTOCAST is '{autocast}'; expected one of {list(_DTYPES)}"
            )
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.source = source
        self.view = build_view(model, "teacher")
        self.view.context = self._context
        self._prepare = prepare
        self._dtype = _DTYPES[autocast]
        self._compile = compile
        self._backbone = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def padding(self) -> tuple[int, int]:
        """(size divisibility, square size or 0) in pixels that its backbone wants of its input."""
        backbone = self.model.backbone
        constraints = backbone.padding_constraints or {}
        divisibility = constraints.get("size_divisibility", backbone.size_divisibility)
        return max(divisibility, 1), constraints.get("square_size", 0)

    def apply(self, function) -> None:
        """Apply what ``nn.Module._apply`` applies (a move, a cast) to the teacher."""
        self.model._apply(function)

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError if the autocast type is only emulated on ``device``."""
        if self._dtype is torch.bfloat16 and not native_bfloat16(device):
            raise ValueError(
                f"MODEL.DISTILLER.TEACHER_AUTOCAST is 'bfloat16', which this {device.type} device "
                "only emulates, slower than float32; use '' (float32)"
                + (" or 'float16'" if device.type == "cuda" else "")
            )

    def check_taps(self) -> None:
        """Raises ValueError if losses tap modules inside a backbone that is to be compiled."""
        inside = [path for path in self.view.taps.paths if path.startswith("backbone.")]
        if self._compile and inside:
            raise ValueError(
                f"MODEL.DISTILLER.TEACHER_COMPILE is True, but losses read {inside}, inside the "
                "compiled backbone; use levels of the neck, or set it to False"
            )

    def observe(self, images: Sequence[torch.Tensor], padded_size: tuple[int, int]) -> None:
        """Run backbone and neck, or as much of them as losses read, on N images (3, H_i, W_i) in this
        teacher's channel order.

        Each is normalised with the teacher's mean and std and padded with zeros, at bottom and
        right, to ``padded_size``. The view remembers the outputs, if it is recording.
        """
        if self._backbone is None:
            self._make_ready()
        batch = self._batch(images, padded_size)
        with self._context(), self._until_read():
            features = self._backbone(batch)
            if self._compile:  # hooks of the backbone itself are not part of its compiled forward
                self.view.taps.put("backbone", features)

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
            part = f"its backbone as far as it takes for {', '.join(reads)}"
        count = sum(p.numel() for p in self.model.parameters())
        source = f"{self.source}; " if self.source else ""
        return f"{source}{type(self.model).__name__}, {count / 1e6:.1f} M parameters; runs {part}"

    @property
    def _ends_early(self) -> bool:
        """Whether losses read stages of the bottom-up network alone."""
        reads = self.view.backbone_reads
        return bool(reads) and "backbone" not in reads

    def _until_read(self):
        return self.view.until_read() if self._ends_early else contextlib.nullcontext()

    @contextlib.contextmanager
    def _context(self):
        autocast = torch.autocast(
            self.device.type, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None
        )
        with torch.no_grad(), autocast:
            yield

    def _make_ready(self) -> None:
        self.check_device(self.device)
        if self._prepare:
            fold_norms(self.model)
            self.model.to(memory_format=self._memory_format())
            if self.device.type == "cpu":
                prefer_onednn(self.model)
        backbone = self.model.backbone
        self._backbone = torch.compile(backbone.forward) if self._compile else backbone

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


def build_teacher(cfg: CfgNode) -> Teacher:
    """The teacher that MODEL.DISTILLER of a student's config describes; see ``load_teacher``."""
    return teacher_of(cfg.MODEL.DISTILLER, cfg.MODEL.DEVICE)


def teacher_of(distiller: CfgNode, device: str) -> Teacher:
    """The teacher that a MODEL.DISTILLER node describes; see ``load_teacher``."""
    return load_teacher(
        distiller.MODEL_DISTILLER_CONFIG,
        official=distiller.MODEL_LOAD_OFFICIAL,
        weights=distiller.TEACHER_WEIGHTS,
        allow_missing=distiller.TEACHER_ALLOW_MISSING,
        device=device,
        prepare=distiller.TEACHER_PREPARE,
        autocast=distiller.TEACHER_AUTOCAST,
        compile=distiller.TEACHER_COMPILE,
    )


def load_teacher(
    config: str,
    *,
    official: bool = True,
    weights: str = "",
    allow_missing: Sequence[str] = (),
    device: str = "cpu",
    **options: Any,
) -> Teacher:
    """Build a teacher from a config's name or file, whole and frozen.

    Args:
        config: with ``official`` a name in detectron2's model zoo, whose published weights are used;
            otherwise a .yaml or .py (LazyConfig) file that names its own weights.
        weights: path or URL that replaces those of the config.
        allow_missing: regular expressions of checkpoint keys that need not fit.
        device: where to build it.
        options: prepare, autocast, compile of Teacher.

    Raises:
        FileNotFoundError: its config or weights do not exist.
        ValueError: its weights cannot be read, or do not fit the model (law 3).
    """
    plan = _plan(config, official)
    path = _find_weights(weights or plan.weights, plan.config_file)
    model = plan.build(device)
    loaded = load_teacher_weights(model, path, allow_missing)
    source = f"{plan.config_file}, {loaded} keys loaded from {path}"
    teacher = Teacher(model, input_format=plan.format_of(model), source=source, **options)
    teacher.check_device(torch.device(device))
    return teacher


def untrained_teacher(distiller: CfgNode, device: str) -> tuple[nn.Module, str]:
    """The model, with random weights, of the teacher that a MODEL.DISTILLER node describes, and its
    input format: for measurements, which need neither training nor a download."""
    plan = _plan(distiller.MODEL_DISTILLER_CONFIG, distiller.MODEL_LOAD_OFFICIAL)
    model = plan.build(device)
    return model, plan.format_of(model)


def load_teacher_weights(model: nn.Module, path: str, allow: Sequence[str] = ()) -> int:
    """Load ``path`` into ``model`` and insist that every key fits; the number of keys loaded.

    Args:
        allow: regular expressions of keys that may be missing, unexpected or mis-shaped.

    Raises:
        ValueError: some key does not fit; the message lists them.
    """
    checkpointer = SafeCheckpointer(model)
    checkpointer.load(path)
    keys = checkpointer.incompatible
    problems = {
        "missing in the file": keys.missing_keys,
        "not in the model": keys.unexpected_keys,
        "of another shape (file, model)": [f"{k} {a} {b}" for k, a, b in keys.incorrect_shapes],
    }
    allowed = [re.compile(pattern) for pattern in (*_NEUTRAL_KEYS, *allow)]
    problems = {
        kind: [name for name in names if not any(p.search(name.split(" ")[0]) for p in allowed)]
        for kind, names in problems.items()
    }
    mis_shaped = {key for key, _, _ in keys.incorrect_shapes}
    problems["missing in the file"] = [
        name for name in problems["missing in the file"] if name not in mis_shaped
    ]
    if any(problems.values()):
        raise ValueError(
            f"the teacher's weights '{path}' do not fit its config ({type(model).__name__}):\n"
            + "\n".join(_listing(kind, names) for kind, names in problems.items() if names)
            + "\nA teacher must be whole: give the weights that belong to the config "
            "(MODEL.DISTILLER.TEACHER_WEIGHTS), or excuse keys with regular expressions in "
            "MODEL.DISTILLER.TEACHER_ALLOW_MISSING"
        )
    return len(model.state_dict()) - len(set(keys.missing_keys))


def _listing(kind: str, names: list[str], most: int = 10) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"  {len(names)} keys {kind}: {', '.join(names[:most])}{more}"


@dataclass
class _Plan:
    """Where a teacher comes from, before it is built."""

    config_file: str
    config: Any
    weights: str
    input_format: str | None

    def build(self, device: str) -> nn.Module:
        if isinstance(self.config, CfgNode):
            config = student_config(self.config)
            config.MODEL.DEVICE = device
            import_detectors(config)
            return build_model(config)
        return instantiate(self.config.model).to(device)

    def format_of(self, model: nn.Module) -> str:
        """Channel order of the input of ``model``, built from this plan."""
        return self.input_format or getattr(model, "input_format", None) or "BGR"


def _plan(name: str, official: bool) -> _Plan:
    if official:
        try:
            config = detectron2_zoo.get_config(name, trained=True)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"MODEL.DISTILLER.MODEL_DISTILLER_CONFIG '{name}': {error} With MODEL_LOAD_OFFICIAL "
                "True it must be a config of detectron2's model zoo with published weights; for a "
                "file of your own set MODEL.DISTILLER.MODEL_LOAD_OFFICIAL False"
            ) from error
        return _Plan(name, config, *_weights_and_format(config))
    path = model_zoo.find_config(name)
    if path.endswith(".py"):
        config = LazyConfig.load(path)
    else:
        config = get_cfg()
        add_distill_config(config)
        load_yaml(config, path)
    return _Plan(path, config, *_weights_and_format(config))


def _weights_and_format(config: Any) -> tuple[str, str | None]:
    if isinstance(config, CfgNode):
        return config.MODEL.WEIGHTS, config.INPUT.FORMAT
    train: dict[str, Any] = config.get("train", {})
    return train.get("init_checkpoint", ""), None


def _find_weights(weights: str, config_file: str) -> str:
    if not weights:
        raise ValueError(
            f"the teacher '{config_file}' names no weights; set MODEL.WEIGHTS there (in a .py "
            "config train.init_checkpoint), or MODEL.DISTILLER.TEACHER_WEIGHTS"
        )
    beside = os.path.join(os.path.dirname(config_file), weights)
    if "://" in weights or os.path.isfile(weights):
        return weights
    if os.path.isfile(beside):
        return beside
    raise FileNotFoundError(
        f"the teacher's weights '{weights}' do not exist (looked in {os.getcwd()} and beside "
        f"{config_file}); set MODEL.DISTILLER.TEACHER_WEIGHTS"
    )
