"""Arguments about processes, GPUs and machines: told before anything is started."""

import importlib
import socket

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from distill_d2.engine import argument_parser, launch

MODULE = importlib.import_module("distill_d2.engine.launch")  # the package has a function of this name


def never(args):
    raise AssertionError("it was started")


@pytest.fixture
def refused(monkeypatch, capsys):
    """What is printed for wrong arguments."""
    monkeypatch.setattr(MODULE, "launch_processes", never)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            launch(never, argument_parser().parse_args(["--num-gpus", "0", *map(str, words)]))
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


TWO = ("--num-machines", 2)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--num-procs", 0], "--num-procs 0 --num-gpus 0: expected at least one process"),
        (["--num-gpus", 1, "--num-procs", 2], "--num-procs is for --num-gpus 0"),
        (["--num-machines", 0], "--num-machines 0: expected at least 1"),
        (["--machine-rank", 1], "--machine-rank 1 with --num-machines 1: expected a number from 0 to 0"),
        ([*TWO, "--machine-rank", 2], "from 0 to 1"),
        ([*TWO, "--dist-url", "auto"], "--dist-url auto: expected tcp://HOST:PORT"),
        ([*TWO, "--dist-url", "127.0.0.1:1234"], "--dist-url 127.0.0.1:1234: expected tcp://"),
        ([*TWO, "--dist-url", "tcp://127.0.0.1"], "--dist-url tcp://127.0.0.1: expected tcp://"),
        (
            [*TWO, "--dist-url", "tcp://127.0.0.1:x"],
            "--dist-url tcp://127.0.0.1:x: Port could not be cast",
        ),
        (
            [*TWO, "--dist-url", "tcp://no.such.host.invalid:80"],
            "the host 'no.such.host.invalid' is not known",
        ),
        ([*TWO, "--dist-url", "file:///nowhere/at/all"], "the folder '/nowhere/at' does not exist"),
        ([*TWO, "--dist-url", "env://"], "the environment has no MASTER_ADDR, MASTER_PORT"),
        (["--num-procs", 2, "--dist-url", "tcp://127.0.0.1"], "expected tcp://"),
    ],
)
def test_wrong_arguments(refused, monkeypatch, words, expected):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert expected in refused(*words)


@pytest.mark.parametrize("gpus, wanted", [(0, 2), (3, 4)])
def test_more_gpus_than_there_are(refused, monkeypatch, gpus, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert f"--num-gpus {wanted}: torch sees {gpus} GPUs" in refused("--num-gpus", wanted)


def test_a_busy_port(refused):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} cannot be used on this machine" in refused(
            *TWO, "--dist-url", f"tcp://127.0.0.1:{port}"
        )


def test_a_machine_that_never_comes(refused, monkeypatch):
    def wait(*_, **__):
        raise ProcessRaisedException("\nTraceback\nDistStoreError: Timed out after 1801 seconds", 0, 1)

    monkeypatch.setattr(MODULE, "launch_processes", wait)
    shown = refused(*TWO, "--machine-rank", 1, "--dist-url", "tcp://127.0.0.1:29999")
    assert "machine 1 of 2 at tcp://127.0.0.1:29999: waiting for the others, up to 30 minutes" in shown
    assert "did not meet" in shown and "Timed out after 1801 seconds" in shown
