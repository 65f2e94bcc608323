"""Check what the command line says about processes and machines, before any is started."""

from __future__ import annotations

import argparse
import os
import socket
from urllib.parse import urlsplit

import torch

_EXPECTED = (
    "expected tcp://HOST:PORT, a free port of machine 0, or file:///PATH in a folder of all machines"
)


def check_processes(args: argparse.Namespace) -> int:
    """The number of processes on this machine.

    Raises:
        ValueError: a number of processes, GPUs or machines is wrong.
    """
    if args.num_procs < 1 or args.num_gpus < 0:
        raise ValueError(
            f"--num-procs {args.num_procs} --num-gpus {args.num_gpus}: expected at least one process"
        )
    if args.num_gpus > 0 and args.num_procs > 1:
        raise ValueError("--num-procs is for --num-gpus 0; with GPUs there is one process each")
    gpus = torch.cuda.device_count() if args.num_gpus > 1 else 1  # of one GPU the config decides
    if args.num_gpus > gpus:
        raise ValueError(
            f"--num-gpus {args.num_gpus}: torch sees {gpus} GPUs on this machine (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); for several processes on the CPU use "
            "--num-gpus 0 --num-procs N"
        )
    if args.num_machines < 1:
        raise ValueError(f"--num-machines {args.num_machines}: expected at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank {args.machine_rank} with --num-machines {args.num_machines}: expected a number "
            f"from 0 to {args.num_machines - 1}, another one on each machine"
        )
    return args.num_gpus or args.num_procs


def check_address(url: str, machines: int, rank: int) -> None:
    """Check the address at which processes meet.

    Args:
        url: --dist-url.
        machines: --num-machines.
        rank: --machine-rank; machine 0 listens at the address.

    Raises:
        ValueError, OSError: it cannot be used; the message says why.
    """
    if url == "auto" and machines == 1:
        return
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"--dist-url {url}: {error}; {_EXPECTED}") from error
    if parts.scheme == "tcp" and host and port:
        _check_host(url, host)
        if rank == 0:
            _check_port(url, port)
    elif parts.scheme == "file" and parts.path:
        folder = os.path.dirname(parts.path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"--dist-url {url}: the folder '{folder}' does not exist; {_EXPECTED}"
            )
    elif parts.scheme == "env":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"--dist-url {url}: the environment has no {', '.join(missing)}; set them")
    else:
        raise ValueError(f"--dist-url {url}: {_EXPECTED}")


def _check_host(url: str, host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise OSError(
            f"--dist-url {url}: the host '{host}' is not known: {error}; {_EXPECTED}"
        ) from error


def _check_port(url: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise OSError(
                f"--dist-url {url}: port {port} cannot be used on this machine ({error.strerror}); perhaps a "
                "process of an earlier run has it. Give another port, on all machines"
            ) from error
