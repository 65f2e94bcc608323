"""Schedules in epochs and in fractions of a run become schedules in iterations, as detectron2 reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Callable

from detectron2.config import CfgNode, instantiate
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..data import check_datasets, training_records
from ..epochs import IN_EPOCHS, both_given, iterations_of
from ..quiet import quiet
from ..rules import COUNT_OR_0, PROBABILITY, Context, Rule, Sequence

#: The same of a LazyConfig; its schedule is in fractions already.
LAZY_IN_EPOCHS = {
    "train.max_iter": "train.epochs",
    "train.eval_period": "train.eval_epochs",
    "train.checkpointer.period": "train.checkpointer.epochs",
}
_MOST_WARMUP = 10  # a warm-up takes at most one of so many parts of a run that is given in epochs


@dataclass(frozen=True)
class Steps(Rule):
    """SOLVER.STEPS: iterations, or fractions of the run, which a run in epochs needs."""

    def expected(self, value: Any, context: Context) -> str:
        fractions = Sequence(PROBABILITY, rising=True).expected(value, context)
        iterations = Sequence(COUNT_OR_0, rising=True).expected(value, context)
        if not fractions:
            return ""
        if iterations:
            return f"{iterations}; or fractions of the run, such as (0.67, 0.89)"
        solver = context.cfg.SOLVER
        if not solver.EPOCHS or solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
            return ""
        same = tuple(round(step / solver.MAX_ITER, 3) for step in value if step < solver.MAX_ITER)
        advice = f"; {same} are those of MAX_ITER {solver.MAX_ITER}" if same else ""
        return f"fractions of the run, or () for none, with SOLVER.EPOCHS {solver.EPOCHS:g}{advice}"


def in_iterations(cfg: CfgNode) -> str:
    """Replace, in place, EPOCHS, CHECKPOINT_EPOCHS and EVAL_EPOCHS by their iterations, and STEPS that are
    fractions of the run; warm-up takes at most a tenth of a run in epochs. All processes call it together.

    Returns:
        what was replaced, a sentence; "" for nothing.

    Raises:
        ValueError, OSError: the images of DATASETS.TRAIN cannot be counted.
    """
    in_epochs = bool(cfg.SOLVER.EPOCHS)
    changes = list(_lengths(cfg))
    solver = cfg.SOLVER
    if in_epochs and solver.WARMUP_ITERS > solver.MAX_ITER // _MOST_WARMUP:
        solver.WARMUP_ITERS = solver.MAX_ITER // _MOST_WARMUP
        changes.append(f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS}, a tenth of the run")
    if _has_fractions(solver.STEPS):
        steps = (round(step * solver.MAX_ITER) for step in solver.STEPS)
        solver.STEPS = tuple(dict.fromkeys(step for step in steps if 0 < step < solver.MAX_ITER))
        changes.append(f"SOLVER.STEPS {solver.STEPS}")
    return f"The schedule in iterations: {', '.join(changes)}" if changes else ""


def lazy_options_decide(cfg: DictConfig, keys: Collection[str]) -> None:
    """Let a length in iterations, of the command line, replace one in epochs of the file. Raises ValueError if it
    gives both."""
    for key, in_epochs in LAZY_IN_EPOCHS.items():
        if key not in keys:
            continue
        if in_epochs in keys and OmegaConf.select(cfg, in_epochs):
            raise both_given("the command line", key, in_epochs)
        OmegaConf.update(cfg, in_epochs, 0)


def lazy_in_iterations(cfg: DictConfig) -> str:
    """The same for a LazyConfig: train.epochs, train.eval_epochs and train.checkpointer.epochs."""
    epochs = {key: OmegaConf.select(cfg, key, default=0) for key in LAZY_IN_EPOCHS.values()}
    if not any(epochs.values()):
        return ""
    loader = cfg.dataloader.train
    if "dataset" not in loader or "total_batch_size" not in loader:
        raise ValueError(
            f"{', '.join(key for key in epochs if epochs[key])}: epochs need dataloader.train.dataset and "
            "dataloader.train.total_batch_size, as detectron2's loader has them; give iterations"
        )
    images = _counted(lambda: len(instantiate(loader.dataset)))
    changes = [_images_and_batch(images, loader.total_batch_size)]
    for key, in_epochs in LAZY_IN_EPOCHS.items():
        if epochs[in_epochs]:
            count = iterations_of(epochs[in_epochs], images, loader.total_batch_size)
            OmegaConf.update(cfg, key, count)
            changes.append(f"{key} {count} for {in_epochs} {epochs[in_epochs]:g}")
            OmegaConf.update(cfg, in_epochs, 0)
    return f"The schedule in iterations: {', '.join(changes)}"


def _lengths(cfg: CfgNode) -> Iterator[str]:
    """Replace the lengths in epochs; what was replaced."""
    images, batch = 0, cfg.SOLVER.IMS_PER_BATCH
    for key, in_epochs in IN_EPOCHS.items():
        node, name = key.split(".")
        epochs = cfg[node][in_epochs.split(".")[1]]
        if not epochs:
            continue
        if not images:
            images = _counted(lambda: _count(cfg))
            yield _images_and_batch(images, batch)
        cfg[node][name] = iterations_of(epochs, images, batch)
        cfg[node][in_epochs.split(".")[1]] = 0.0
        yield f"{key} {cfg[node][name]} for {in_epochs} {epochs:g}"


def _images_and_batch(images: int, batch: int) -> str:
    return f"{images} images in batches of {batch}"


def _counted(count: Callable[[], int]) -> int:
    """The images, counted by the main process."""
    return comm.all_gather(count() if comm.is_main_process() else 0)[0]


def _count(cfg: CfgNode) -> int:
    try:
        with quiet():
            return len(training_records(cfg))
    except Exception:
        check_datasets(cfg)  # says what is wrong with them
        raise


def _has_fractions(steps: Any) -> bool:
    return any(isinstance(step, float) and 0 < step < 1 for step in steps)
