"""Every configuration key that distill_d2 adds to detectron2's."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import downgrade_config, upgrade_config
from detectron2.config.compat import guess_version

from . import plugins
from .config_files import ConfigFiles, read_config
from .config_values import set_values
from .imports import check_note
from .losses import DISTILL_LOSS_REGISTRY, DistillLoss, key_comments

EXTRA_KEY = "EXTRA_CFG"


def add_distill_config(cfg: CN) -> None:
    """Add the keys of distill_d2 to a detectron2 config, in place.

    Register your own losses and detectors before this call: a loss's node, ``MODEL.DISTILLER.<METHOD>``,
    comes with its registration, a detector's keys with its description (see ``distill_d2.plugins``).
    ``dump`` prints a config with a comment above each key of the losses.
    """
    from . import distiller as _  # noqa: F401  registers the meta-architecture; it imports this module

    for detector in plugins.detectors().values():
        detector.add_config(cfg)

    # More yaml files, merged after --config-file and before the command line's KEY VALUE pairs.
    cfg.EXTRA_CFG = []

    # The student's optimizer, a class of torch.optim by name: "SGD" as detectron2 builds it, "AdamW",
    # "Adam", ... Its CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the joint norm of all gradients
    # is limited.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # More arguments of that class, such as {betas: [0.9, 0.99]}.
    cfg.SOLVER.OPTIMIZER_ARGS = CN(new_allowed=True)
    # The learning rate of the bottom-up network, all that is below the FPN or another neck, is this times BASE_LR;
    # of a detector without a neck that of its backbone.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0
    # The rates of the bottom-up network's layers, of a model of timm or detectron2's ViT, are multiplied by this
    # once more per layer, from the last one down to the stem, such as 0.7. 1: they are not.
    cfg.SOLVER.LAYER_DECAY = 1.0

    # A step's IMS_PER_BATCH images go through the models in this many parts, whose gradients are averaged: for
    # batches that the memory does not hold at once.
    cfg.SOLVER.ACCUMULATE = 1
    # The decay of a moving average of the student's weights, such as 0.999, which is evaluated and saved in
    # their place; smaller in the first steps. 0: none.
    cfg.SOLVER.EMA = 0.0
    # The length of the run in epochs, passes over the images of DATASETS.TRAIN; above 0 it replaces MAX_ITER.
    # With it STEPS are fractions of the run, such as (0.67, 0.89), which they may be without it, too, and
    # WARMUP_ITERS is at most a tenth of the run. CHECKPOINT_EPOCHS replaces CHECKPOINT_PERIOD likewise, and
    # EVAL_EPOCHS TEST.EVAL_PERIOD.
    cfg.SOLVER.EPOCHS = 0.0
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0
    cfg.TEST.EVAL_EPOCHS = 0.0

    # The images of an evaluation that go through the model at a time, in each process: all of one padded size, so
    # that detections are those of image by image, within float rounding.
    cfg.TEST.IMS_PER_BATCH = 1

    # The metric, of those that evaluations log, whose best student is kept as OUTPUT_DIR/model_best.pth, such as
    # "bbox/AP" (of several datasets "my_val/bbox/AP"); "": none is kept. Higher is better.
    cfg.TEST.KEEP_BEST = ""
    # The run ends after this many evaluations in a row without a better one by that metric; 0: it does not.
    cfg.TEST.PATIENCE = 0

    # The model that is trained has its weights in channels_last and, on a CPU, oneDNN's kernels for 1x1
    # convolutions. Results are equal within float rounding; checkpoints are as without it.
    cfg.MODEL.FAST_KERNELS = False

    # The dataset mapper, a name in distill_d2.data.DATASET_MAPPER_REGISTRY; "": detectron2's, with the
    # augmentations below.
    cfg.INPUT.MAPPER = ""
    # Augmentations in training: "default", detectron2's, or a name in AUGMENTATION_REGISTRY, such as "ssd":
    # photometric distortion, expansion with the mean color, and a random crop, before detectron2's flip.
    cfg.INPUT.AUGMENTATIONS = "default"
    # [height, width]: images are resized to exactly this, instead of by MIN_SIZE_* and MAX_SIZE_*.
    cfg.INPUT.FIXED_SIZE = []
    # False: images are not flipped, for every RANDOM_FLIP. True for IS_ROTATE is refused: images are
    # never rotated. (Keys of AdelaiDet.)
    cfg.INPUT.HFLIP_TRAIN = True
    cfg.INPUT.IS_ROTATE = False
    cfg.INPUT.SSD = CN()
    # The largest factor by which an expansion multiplies the sides of an image.
    cfg.INPUT.SSD.EXPAND_MAX_RATIO = 4.0
    # A crop's IoU with some object is at least one of these, or any, or the whole image is kept.
    cfg.INPUT.SSD.CROP_MIN_IOUS = [0.1, 0.3, 0.5, 0.7, 0.9]

    # Datasets to register, a list of {NAME, FORMAT: voc, coco, yolo or images, ...}; see docs/own_data.md.
    cfg.DATASETS.CUSTOM = []
    # Before training, annotations, images, classes, mapper and evaluators are tried: "all"; "none" skips this.
    cfg.DATASETS.CHECK = "all"
    # How many images of each dataset are decoded then to find unreadable ones (0: none, nor is the mapper tried).
    cfg.DATASETS.CHECK_IMAGES = 500
    # Decode every image first, and leave those out that do not exist or cannot be read; OUTPUT_DIR/
    # unreadable_images.txt lists them. In an evaluation their objects count as missed.
    cfg.DATASETS.SKIP_UNREADABLE = False

    # Metrics in Weights & Biases too (--wandb does the same), where it is installed; NAME "": OUTPUT_DIR's.
    cfg.WANDB = CN({"ENABLED": False, "PROJECT": "distill_d2", "NAME": ""})
    # And in MLflow; TRACKING_URI "": where its environment variable says, or its default.
    cfg.MLFLOW = CN({"ENABLED": False, "EXPERIMENT": "distill_d2", "NAME": "", "TRACKING_URI": ""})

    cfg.MODEL.DISTILLER = distiller = CN()
    # The student's meta-architecture, when MODEL.META_ARCHITECTURE is "Distiller".
    distiller.STUDENT_META_ARCH = ""
    # The distillation losses to use, by registered name.
    distiller.TYPES = ["InstanceConditionalDistillation"]
    # Weight of the student's own losses; 0 is pure distillation: the student runs only as far as a loss
    # reads it, needs no ground truth if no loss does, and what no loss reaches is not trained.
    distiller.TASK_LOSS_WEIGHT = 1.0
    # Regular expressions of names in the student's state_dict: parameters that are not trained, and
    # running statistics of norms that stay.
    distiller.FREEZE = []

    # The teacher's config: a name in detectron2's model zoo, or a .yaml or .py file of your own.
    distiller.MODEL_DISTILLER_CONFIG = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    # True: the config is a model zoo name, and its published weights are used. False: a file, found
    # beside the config that names it, in configs/, or by absolute path, with its own weights. A file whose name
    # the zoo does not have needs no False.
    distiller.MODEL_LOAD_OFFICIAL = True
    # The teacher's weights, a path or URL; empty: those that its config names.
    distiller.TEACHER_WEIGHTS = ""
    # Regular expressions of checkpoint keys that may be missing, unexpected or mis-shaped.
    distiller.TEACHER_ALLOW_MISSING = []
    # Run a copy of the teacher with frozen normalization folded into convolutions and with the faster
    # memory layout (same outputs).
    distiller.TEACHER_PREPARE = True
    # Precision of the teacher: "auto" (on a GPU that of the student's step, see SOLVER.AMP, else
    # float32), "float32" (or ""), "float16" or "bfloat16".
    distiller.TEACHER_AUTOCAST = "auto"
    # torch.compile of the teacher's backbone; each new input shape costs a compilation.
    distiller.TEACHER_COMPILE = False
    # Where the teacher's outputs are kept, so that it is run once for each image: "memory", of each process, or
    # a folder, which runs with the same teacher share, also at the same time; "": nowhere. For images that are
    # the same in each pass over the data but for flips: one INPUT.MIN_SIZE_TRAIN or FIXED_SIZE, no crops.
    distiller.TEACHER_CACHE = ""
    # The most that is kept, in gigabytes; for the images that do not fit, the teacher is run in each step.
    distiller.TEACHER_CACHE_GB = 4.0
    # Keep float16, half the size. Not exact: outputs are rounded to 11 bits.
    distiller.TEACHER_CACHE_HALF = False
    # Measure how strongly each term pulls on the student, on twelve training images: before training, and with
    # each evaluation in it (OUTPUT_DIR/gradients.jsonl).
    distiller.MEASURE_GRADIENTS = True
    # Above 0: in every this many steps, measure on the step's own images the gradient of each loss in units of
    # the task's (grad_ratio/<loss> in metrics.json). Such a step has a backward pass more for each loss, and one
    # for the task.
    distiller.GRADIENT_RATIO_PERIOD = 0
    # Evaluate the teacher on DATASETS.TEST too, on the student's images: with --eval-only, and before
    # training.
    distiller.EVAL_TEACHER = False

    # Start the student from the teacher's FPN (all of its backbone but the bottom-up network) ...
    distiller.PRELOAD_FPN = True
    # ... and from the teacher's heads; tensors whose shapes differ are skipped and listed.
    distiller.PRELOAD_HEAD = True
    # ... and from all other tensors of its state_dict whose names match one of these regular expressions.
    distiller.PRELOAD_NAMES = []

    # A checkpoint from which a fresh run takes the losses' own parameters (of ICD: the decoder) ...
    distiller.PRELOAD_TEACHER = ""
    # ... "all" of them, or "teacher_only" those that the distillation itself does not train.
    distiller.PRELOAD_TYPE = "teacher_only"

    # This many iterations first, in which only losses that can be pretrained learn; the student and
    # all schedules start after them.
    distiller.PRETRAIN_TEACHER_ITERS = 0
    # The student's backbone is not trained in the first this many iterations (of the student's) ...
    distiller.FIX_BACKBONE_BEFORE = 0
    # ... and everything of the student outside its backbone in the first this many.
    distiller.FIX_HEAD_BEFORE = 0
    # The optimizer of losses that train their parameters by one of their own.
    distiller.SOLVER = solver_config()

    for name, loss in DISTILL_LOSS_REGISTRY:
        if not (isinstance(loss, type) and issubclass(loss, DistillLoss)):
            raise TypeError(
                f"the registered loss '{name}' is {loss!r}; expected a subclass of DistillLoss"
            )
        loss.add_config(distiller)


def solver_config() -> CN:
    """The node MODEL.DISTILLER.SOLVER with its defaults."""
    solver = CN()
    # As the student's SOLVER.OPTIMIZER and OPTIMIZER_ARGS.
    solver.OPTIMIZER = "ADAMW"
    solver.OPTIMIZER_ARGS = CN(new_allowed=True)
    # detectron2's schedules WarmupCosineLR or WarmupMultiStepLR.
    solver.LR_SCHEDULER_NAME = "WarmupCosineLR"
    # Taken from the student's SOLVER, whatever is set here (with a LazyConfig: MAX_ITER from
    # train.max_iter, STEPS from here).
    solver.MAX_ITER = -1
    solver.STEPS = (30000,)
    # One learning rate and one weight decay for all parameters.
    solver.BASE_LR = 1e-4
    solver.WEIGHT_DECAY = 1e-4
    # Used by SGD only.
    solver.MOMENTUM = 0.9
    solver.NESTEROV = False
    # Not used; they exist so that the reference's yaml files load.
    solver.WEIGHT_DECAY_NORM = 0.0
    solver.WEIGHT_DECAY_BIAS = 1e-4
    solver.BIAS_LR_FACTOR = 1.0
    solver.NUM_DECAYS = 3
    # The learning rate at the end of WarmupCosineLR.
    solver.BASE_LR_END = 0.0
    # The factor of WarmupMultiStepLR at each of STEPS.
    solver.GAMMA = 0.1
    # Start at WARMUP_FACTOR times the rate; WARMUP_METHOD is "linear" or "constant".
    solver.WARMUP_FACTOR = 1.0
    solver.WARMUP_ITERS = 10
    solver.WARMUP_METHOD = "linear"
    # Squeeze the schedule into the iterations after warm-up, instead of starting it at iteration 0.
    solver.RESCALE_INTERVAL = False
    # CLIP_TYPE "full_model" limits the joint norm of all gradients, "norm" each one's, "value" elements.
    solver.CLIP_GRADIENTS = CN()
    solver.CLIP_GRADIENTS.ENABLED = True
    solver.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    solver.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    solver.CLIP_GRADIENTS.NORM_TYPE = 2.0
    return solver


def dump(cfg: CN) -> str:
    """A whole config as yaml, with a comment above each key of the losses."""
    comments = key_comments()
    lines: list[str] = []
    path: list[str] = []
    for line in cfg.dump().splitlines():
        found = re.match(r"( *)(\w+):", line)
        if found:
            indent, name = found.groups()
            path[len(indent) // 2 :] = [name]
            start = indent + "# "
            comment = comments.get(".".join(path), "")
            lines += textwrap.wrap(comment, 100, initial_indent=start, subsequent_indent=start)
        lines.append(line)
    return "\n".join(lines) + "\n"


def load_yaml(cfg: CN, path: str) -> ConfigFiles:
    """Merge a yaml file, and its _BASE_, into ``cfg``, and let its detector complete it. No code runs: see
    ``distill_d2.safe_yaml``.

    Returns:
        the files that were read.

    Raises:
        FileNotFoundError, OSError, ValueError: a file does not exist; it is not yaml, or holds a tag that is
            not read; a value has the wrong type; its run was started with an --import that is missing here.
        KeyError: a key that does not exist.
    """
    check_note(os.path.dirname(path) or ".")
    content = read_config(path)
    values = content.values
    if isinstance(values.get(EXTRA_KEY), str):
        values[EXTRA_KEY] = [values[EXTRA_KEY]]
    version = values["VERSION"] if "VERSION" in values else _guessed_version(values, path)
    if type(version) is not int or not 1 <= version <= cfg.VERSION:
        raise ValueError(
            f"{content.naming('VERSION')}: VERSION is {version!r}; expected 1 or {cfg.VERSION}"
        )
    old = cfg if version == cfg.VERSION else downgrade_config(cfg, version)
    set_values(old, values, lambda key: f"{content.naming(key)}: ")
    if old is not cfg:
        new = upgrade_config(old)
        cfg.clear()
        cfg.update(new)
    plugins.complete(cfg)
    return content


def student_config(cfg: CN) -> CN:
    """A copy of ``cfg`` that describes its student alone, as an ordinary detectron2 config.

    Raises:
        ValueError: META_ARCHITECTURE is "Distiller" and STUDENT_META_ARCH is empty.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        if cfg.MODEL.DISTILLER.STUDENT_META_ARCH in ("", "Distiller"):
            raise ValueError(
                'MODEL.META_ARCHITECTURE is "Distiller", so MODEL.DISTILLER.STUDENT_META_ARCH must '
                "name the student's architecture, e.g. RetinaNet or GeneralizedRCNN"
            )
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.DISTILLER.STUDENT_META_ARCH
    return cfg


def _guessed_version(values: dict[str, Any], path: str) -> int:
    return guess_version(
        {name: value for name, value in values.items() if isinstance(value, dict)}, path
    )
