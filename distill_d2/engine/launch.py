"""Start one process per GPU, or several on the CPU."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Callable

import torch
from detectron2.engine import launch as launch_processes
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..commands.arguments import add_training_arguments
from ..known_warnings import silence_in_spawned_processes
from ..mistakes import Message, add_debug_argument, end, ending_on_mistakes, prefixed
from .interrupt import forwarding_signals
from .launch_arguments import check_address, check_processes
from .started_processes import find_place, join


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's arguments, --num-procs for several processes without GPUs, --import and others."""
    parser = argparse.ArgumentParser()
    add_debug_argument(parser)
    add_training_arguments(parser)
    return parser


def launch(main: Callable, args: argparse.Namespace) -> None:
    """Run ``main(args)`` in every process of this machine, through ``detectron2.engine.launch``; in this one, if
    torchrun or srun has started it.

    Raises:
        SystemExit: 2 after a user's mistake, whose message was printed (see ``is_mistake``), wrong arguments
            among them; 128 + signal number, after SIGINT or SIGTERM.
    """
    with ending_on_mistakes(debug=args.debug):
        if args.num_gpus == 0:  # detectron2 chooses NCCL wherever it sees a GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        place = find_place()
        if place is not None:
            join(main, args, place)
            return
        processes = check_processes(args)
        if processes * args.num_machines == 1:
            main(args)
            return
        if args.dist_url is None:
            args.dist_url = "auto" if args.num_machines == 1 else args.default_dist_url
        check_address(args.dist_url, args.num_machines, args.machine_rank)
        _launch_several(main, args, processes)


def _launch_several(main: Callable, args: argparse.Namespace, processes: int) -> None:
    machine = f"machine {args.machine_rank} of {args.num_machines} at {args.dist_url}"
    minutes = round(DEFAULT_TIMEOUT.total_seconds() / 60)
    if args.num_machines > 1:
        print(f"{machine}: waiting for the others, up to {minutes} minutes", file=sys.stderr, flush=True)
    silence_in_spawned_processes()
    # It logs that it ends the other processes, which is expected after a mistake in one of them.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with forwarding_signals() as request, tempfile.TemporaryDirectory() as folder:
        message, met = Message(folder), Path(folder) / "met"
        try:
            launch_processes(
                _run_with_others,
                processes,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, message, met),
            )
        except (ProcessExitedException, ProcessRaisedException) as error:
            if message.read():
                end(prefixed(message.read()))
            if isinstance(error, ProcessRaisedException) and not met.exists():
                end(
                    f"{machine}: its {processes} processes did not meet those of the other machines within "
                    f"{minutes} minutes. Start all machines with the same --num-machines, --num-gpus and "
                    "--dist-url, an address of machine 0 that the others reach, and each with its own "
                    f"--machine-rank: {str(error).strip().splitlines()[-1]}"
                )
            stopped = request and isinstance(error, ProcessExitedException)
            if not stopped:  # before training, or while evaluating
                raise
    if request:
        sys.exit(request.exit_code)


def _run_with_others(main: Callable, args: argparse.Namespace, message: Message, met: Path) -> None:
    met.touch()
    with ending_on_mistakes(debug=args.debug, message=message):
        main(args)
    # gloo aborts a process that ends while another one still talks to it.
    comm.synchronize()
    torch.distributed.destroy_process_group()
