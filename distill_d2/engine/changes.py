"""What a resumed run changes of the run that it continues, and what that means: one line each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

# Keys that change nothing of the training; yaml's, then LazyConfig's.
_IGNORED = re.compile(
    r"(OUTPUT_DIR|MODEL\.(WEIGHTS|DEVICE)|TEST\.|DATASETS\.(TEST|CHECK|PROPOSAL_FILES_TEST)|VERSION$|VIS_PERIOD"
    r"|SOLVER\.CHECKPOINT_PERIOD|EXTRA_CFG|CUDNN_BENCHMARK|WANDB\.|MLFLOW\."
    r"|MODEL\.TIMM\.WEIGHTS$|(MODEL\.DISTILLER|distiller)\.(EVAL_TEACHER|MEASURE_GRADIENTS|GRADIENT_RATIO_PERIOD"
    r"|TEACHER_CACHE(_GB)?$)"
    r"|train\.(output_dir|init_checkpoint|device|eval_|log_period|checkpointer|keep_best|patience)"
    r"|dataloader\.(test|evaluator)|distiller_not_used)"
)
PROCESSES, IMAGES = "the number of processes", "the training images"
# What a change of a key means. {iteration}: the first that is trained now.
_MEANINGS = [
    (PROCESSES, "random numbers and the order of images are new"),
    (IMAGES, "training goes on with the new images, in an order of their own"),
    (
        r"SOLVER\.MAX_ITER|train\.max_iter",
        "the learning rate follows the new length from {iteration} on",
    ),
    (
        r"SOLVER\.(BASE_LR|MOMENTUM|NESTEROV|WEIGHT_DECAY|BIAS_LR_FACTOR|BACKBONE_LR_FACTOR|LAYER_DECAY)"
        r"|optimizer\.",
        "without effect: the optimizer goes on with what the checkpoint has",
    ),
    (
        r"SOLVER\.IMS_PER_BATCH|dataloader\.train\.total_batch_size",
        "the order of images continues as if all batches had been of this size, so some images are skipped or "
        "come again; the learning rate stays",
    ),
    (
        r"SOLVER\.ACCUMULATE|train\.accumulate",
        "the step stays, but for rounding, batch statistics and groups of images by aspect ratio",
    ),
    (r"MODEL\.FAST_KERNELS|train\.fast_kernels", "results differ by float rounding"),
    (r"SEED|train\.seed", "without effect: the random state comes from the checkpoint"),
    (
        r"DATALOADER\.NUM_WORKERS|dataloader\.train\.num_workers",
        "augmentations draw other random numbers with workers than without",
    ),
    ("", "it holds from {iteration} on"),
]
_MOST_LINES = 20
_MOST_CHARACTERS = 80


def settings_of_run(cfg: CfgNode | DictConfig, processes: int, images: str) -> dict[str, str]:
    """All that a resumed run should have in common with the run before, as text, for a checkpoint.

    Args:
        images: describes the training images.
    """
    plain = cfg if isinstance(cfg, CfgNode) else OmegaConf.to_container(cfg, resolve=False)
    settings = {PROCESSES: str(processes), IMAGES: images}
    settings.update((key, value) for key, value in _flat(plain, "") if not _IGNORED.match(key))
    return settings


def changes(
    saved: Mapping[str, str],
    current: Mapping[str, str],
    iteration: int,
    measured_weights: Collection[str] = (),
) -> list[str]:
    """One line for each change that a user must know.

    Args:
        saved: ``settings_of_run`` of the checkpoint.
        current: that of this run.
        iteration: the first that is trained now.
        measured_weights: keys of the losses' weights that GRADIENT_RATIO sets.
    """
    lines = []
    for key in [*saved, *(key for key in current if key not in saved)]:
        before, now = saved.get(key, "not set"), current.get(key, "not set")
        if before == now or (key.lower().endswith("num_workers") and "0" not in (before, now)):
            continue
        meaning = next(text for pattern, text in _MEANINGS if re.match(pattern, key))
        if re.sub("^distiller", "MODEL.DISTILLER", key) in measured_weights:
            meaning = "GRADIENT_RATIO sets this weight, and goes on with the checkpoint's"
        meaning = meaning.format(iteration=f"iteration {iteration}")
        verb = "are" if key == IMAGES else "is"
        lines.append(
            f"--resume: {key} {verb} {_short(now)}, in the checkpoint {_short(before)}: {meaning}"
        )
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [
            f"--resume: {len(lines) - _MOST_LINES} more keys are not as in the checkpoint"
        ]
    return lines


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, _text(value)


def _text(value: Any) -> str:
    """Without addresses in memory: functions and classes by name, other objects by type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(inner)}' for key, inner in value.items())}}}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _short(text: str) -> str:
    text = text or '""'
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
