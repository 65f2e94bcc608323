"""Processes that torchrun or srun has started, each with the same command.

Both say in the environment which of them a process is. After a restart the run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed as dist

from ..mistakes import EXIT_STATUS, Message, ending_on_mistakes

_TORCHRUN = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
}
_FIRST_HOST = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
_FIRST_PORT = 20000  # of the ports that jobs of SLURM use without MASTER_PORT


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        launcher: "torchrun" or "srun".
        rank, world_size: among all processes.
        local_rank, local_size: among those of this machine.
        restarts: how often the processes were started again.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    restarts: int


def find_place() -> Place | None:
    """This process's place, from the environment; None if neither torchrun nor srun started it.

    Raises:
        ValueError: the environment is incomplete.
    """
    # A cluster that sets RANK and WORLD_SIZE for machines, not for processes, sets no LOCAL_RANK.
    if all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _of_torchrun()
    # In a batch script, outside of srun, SLURM_PROCID is set, but the number of tasks of the step is not.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _of_srun()
    return None


def _of_torchrun() -> Place:
    numbers = {field: _number(name) for field, name in _TORCHRUN.items() if name in os.environ}
    numbers.setdefault("local_size", numbers["world_size"])
    _check_address("torchrun", "start the processes by torchrun")
    return Place("torchrun", **numbers, restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def _of_srun() -> Place:
    tasks, machines = _number("SLURM_STEP_NUM_TASKS"), int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if tasks % machines:
        raise ValueError(
            f"srun started {tasks} processes on {machines} machines; expected as many on each: give srun "
            "--ntasks-per-node"
        )
    if machines == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    job = int(os.environ.get("SLURM_JOB_ID", 0))
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _FIRST_PORT))
    _check_address("srun", f"write in the batch script: {_FIRST_HOST}")
    return Place(
        "srun",
        rank=_number("SLURM_PROCID"),
        world_size=tasks,
        local_rank=_number("SLURM_LOCALID"),
        local_size=tasks // machines,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} is '{text}'; expected a number")
    return int(text)


def _check_address(launcher: str, advice: str) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"{launcher}: the environment has no {' and no '.join(missing)}; {advice}")


def join(main: Callable, args: argparse.Namespace, place: Place) -> None:
    """Meet the other processes, and run ``main(args)`` in this one.

    Raises:
        ValueError: the arguments start processes, too; there are fewer GPUs than processes.
        SystemExit: 2 after a user's mistake, which one of the processes prints; 128 + signal number.
    """
    _check_arguments(args, place)
    _prepare(args, place)
    if place.world_size == 1:
        main(args)
        return
    gpu = args.num_gpus > 0
    if gpu:
        torch.cuda.set_device(_gpu(place))
    store, rank, size = next(
        dist.rendezvous("env://", place.rank, place.world_size, timeout=DEFAULT_TIMEOUT)
    )
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # The agent of torchrun keeps its store after a restart. Where the agents are several they count restarts
        # on their own: see docs/several_machines.md.
        store = dist.PrefixStore(f"distill_d2/{place.restarts}", store)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(place.local_size)
    comm.synchronize()
    message = _SharedMessage()
    with ending_on_mistakes(debug=args.debug, message=message), _leaving(message):
        main(args)


def _check_arguments(args: argparse.Namespace, place: Place) -> None:
    given = [f"--num-gpus {args.num_gpus}"] * (args.num_gpus not in (0, 1, place.local_size))
    given += [f"--num-procs {args.num_procs}"] * (args.num_procs not in (1, place.local_size))
    given += [f"--num-machines {args.num_machines}"] * (args.num_machines > 1)
    given += [f"--dist-url {args.dist_url}"] * (args.dist_url is not None)
    if given:
        raise ValueError(
            f"{' '.join(given)}: {place.launcher} has started {place.world_size} processes, {place.local_size} on "
            "this machine, and says where they meet; leave it out (--num-gpus 0 is for the CPU)"
        )


def _prepare(args: argparse.Namespace, place: Place) -> None:
    if args.num_gpus:
        args.num_gpus = place.local_size
    if place.restarts and not args.eval_only:
        args.resume, args.overwrite = True, False


def _gpu(place: Place) -> int:
    """The index of this process's GPU, which is its only one where the launcher gives each its own."""
    found = torch.cuda.device_count()
    if place.local_rank < found:
        return place.local_rank
    if found == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    raise ValueError(
        f"{place.launcher} has started {place.local_size} processes on this machine, but torch sees {found} GPUs "
        f"(CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start one process "
        "per GPU, or give --num-gpus 0 for the CPU"
    )


class _SharedMessage(Message):
    """The message of the first process that ends on a mistake; the others stay silent. It lies in the store
    through which all machines' processes met."""

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store()

    def write(self, text: str) -> None:
        with contextlib.suppress(
            RuntimeError
        ):  # the process that keeps the store has ended, with its message
            if self._store.add("distill_d2/mistake", 1) == 1:
                print(text, file=sys.stderr, flush=True)

    def read(self) -> str:
        """Not empty if a process ended on a mistake."""
        try:
            return "printed" if self._store.check(["distill_d2/mistake"]) else ""
        except RuntimeError:
            return ""


@contextlib.contextmanager
def _leaving(message: _SharedMessage) -> Iterator[None]:
    """Leave together: gloo aborts a process that ends while another one still talks to it."""
    try:
        yield
    except SystemExit:  # asked to stop, as all are
        _part()
        raise
    except Exception:
        if message.read():  # it follows from the other's end
            sys.exit(EXIT_STATUS)
        raise
    _part()


def _part() -> None:
    comm.synchronize()
    dist.destroy_process_group()
