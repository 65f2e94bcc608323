"""OUTPUT_DIR belongs to one run: it is not mixed with another's files, and two do not write there at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from detectron2.utils import comm

from ..checkpoint import LAST, PARTIAL, run_checkpoints, write_whole
from ..run_files import BEST, COMMANDS, EVALUATIONS, GRADIENTS, METRICS, TEACHER_FOLDER

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_PROBE_BYTES = 1 << 16
# What a kill may leave.
_BEGUN = tuple(name + PARTIAL for name in ("model_*.pth", LAST, METRICS, GRADIENTS))
_FILES = (_LOCK, METRICS, GRADIENTS, EVALUATIONS, COMMANDS, LAST, "log.txt", "config.yaml", *_BEGUN)
_INFERENCE = ("inference", f"{TEACHER_FOLDER}/inference")
_FOLDERS = (TEACHER_FOLDER, *_INFERENCE)
_BUSY = (errno.EACCES, errno.EAGAIN)  # another process has the lock
_PATIENCE = 15.0  # seconds in which the processes of a killed run end
# What else a run writes, beside checkpoints and metrics; its log and config are kept, and continued.
_WRITTEN = (
    "events.out.tfevents.*",
    BEST,
    EVALUATIONS,
    f"{TEACHER_FOLDER}/{EVALUATIONS}",
    GRADIENTS,
    COMMANDS,
    "wandb_id.txt",
    "mlflow_id.txt",
    "unreadable_images.txt",
    *(
        f"{folder}/**/{name}"
        for folder in _INFERENCE
        for name in ("coco_instances_results.json", "instances_predictions.pth", "*_coco_format.json")
    ),
)
_held: dict[str, TextIO] = {}


def claim(folder: str, key: str, args: Any, weights: Callable[[], Iterable[str]]) -> None:
    """Check that a run may write to a folder, create it, and keep other runs out until this process ends or
    calls ``release``. Call it before anything is written. --eval-only neither needs nor locks the folder.

    Args:
        key: the config key of the folder, for messages.
        args: of ``argument_parser``.
        weights: returns paths that this run reads, which --overwrite must not remove.

    Raises:
        ValueError: another run's checkpoints or metrics are there, and neither --resume nor --overwrite is
            given; another run is writing there; a folder has the name of one of a run's files, or a file
            that of a folder.
        OSError: nothing can be written there.
    """
    if args.resume and args.overwrite:
        raise ValueError(
            "--resume continues the run in a folder, --overwrite removes it; give one of them"
        )
    if not (args.resume or args.eval_only):
        _check_used(folder, key, args.overwrite, weights)
    _check_kinds(folder, key)
    check_writable(folder, key)
    if comm.is_main_process() and not args.eval_only:
        _lock(folder, key, _PATIENCE if args.resume else 0.0)
        _remove_partial(folder)


def release(folder: str) -> None:
    """Let other runs write to the folder. Does nothing where this process does not hold it."""
    file = _held.pop(os.path.realpath(folder), None)
    if file is not None:
        file.close()


def remove_run(folder: str) -> None:
    """Remove the checkpoints, metrics, events and results of earlier runs, and nothing else."""
    paths = _of_a_run(folder)
    for path in paths:
        os.remove(path)
    if paths:
        names = ", ".join(os.path.relpath(path, folder) for path in paths[:5])
        logger.warning(f"--overwrite: removed {len(paths)} files of an earlier run in {folder}: {names}")


@contextlib.contextmanager
def kept(path: str, active: bool) -> Iterator[None]:
    """Inside, the main process may overwrite a file; afterwards it holds again what it held, if ``active``."""
    content = None
    if active and comm.is_main_process() and os.path.isfile(path):
        with open(path, "rb") as file:
            content = file.read()
    try:
        yield
    finally:
        if content is not None:
            write_whole(path, lambda file: file.write(content))


def _check_used(folder: str, key: str, overwrite: bool, weights: Callable[[], Iterable[str]]) -> None:
    if overwrite:
        removed = {os.path.realpath(path) for path in _of_a_run(folder)}
        needed = [path for path in weights() if path and os.path.realpath(path) in removed]
        if needed:
            raise ValueError(
                f"--overwrite would remove '{needed[0]}', which this run reads; copy it to another folder, or use "
                f"another {key}"
            )
        return
    found = [os.path.basename(path) for path in run_checkpoints(folder)]
    metrics = os.path.join(folder, METRICS)
    if os.path.isfile(metrics) and os.path.getsize(metrics):
        found.append(METRICS)
    if found:
        raise ValueError(
            f"{key} '{folder}' holds {', '.join(found[:3])}{', ...' * (len(found) > 3)} of another run. Give "
            "--resume to continue that run, --overwrite to remove its files, or another folder"
        )


def _check_kinds(folder: str, key: str) -> None:
    folders = [path for name in _FILES for path in _matches(folder, name) if os.path.isdir(path)]
    files = [path for name in _FOLDERS for path in _matches(folder, name) if os.path.isfile(path)]
    wrong = [f"'{path}' is a folder; a run writes a file" for path in folders]
    wrong += [f"'{path}' is a file; a run writes a folder" for path in files]
    if wrong:
        raise ValueError(f"{key}: {wrong[0]} of this name. Move it, or use another folder")


def check_writable(path: str, key: str) -> None:
    """Create the folder. Raises OSError if nothing can be written to it."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".writable-{os.getpid()}")
        write_whole(probe, lambda file: file.write(bytes(_PROBE_BYTES)))
        os.remove(probe)
    except OSError as error:
        raise OSError(f"{key} '{path}' cannot be written to: {error}") from error


def _lock(folder: str, key: str, patience: float) -> None:
    """Keep other processes out. The kernel ends the lock with this process, however that ends; unlike those of
    flock, locks of fcntl are not inherited by worker processes, which may live a little longer.

    Args:
        patience: seconds to wait for a lock.
    """
    place, path = os.path.realpath(folder), os.path.join(folder, _LOCK)
    if place in _held:
        return
    file = open(path, "a+")
    try:
        _lock_within(file, patience)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if error.errno in _BUSY:
            raise ValueError(
                f"{key} '{folder}': another run is writing there ({owner}). Wait for it, end it, or use another "
                "folder"
            ) from error
        logger.warning(f"{path} cannot be locked ({error}): nothing keeps a second run out of {folder}")
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
    file.flush()
    _held[place] = file


def _lock_within(file: TextIO, seconds: float) -> None:
    """Raises OSError if the file cannot be locked in this time."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _BUSY or time.monotonic() > end:
                raise
        time.sleep(0.2)


def _remove_partial(folder: str) -> None:
    """Remove what a killed run had begun to write."""
    for name in _BEGUN:
        for path in _matches(folder, name):
            os.remove(path)


def _of_a_run(folder: str) -> list[str]:
    others = [path for name in (LAST, METRICS, *_WRITTEN) for path in _matches(folder, name)]
    return [*run_checkpoints(folder), *filter(os.path.isfile, others)]


def _matches(folder: str, pattern: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True))
