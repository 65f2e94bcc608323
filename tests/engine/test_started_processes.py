"""Processes that torchrun or srun starts: the environment says which one each is."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from pool import start_script
from runs import ROOT, checkpoint, metrics, rewind

SCRIPT = str(ROOT / "train_distill.py")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def of_torchrun(rank, port):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": "1"}
    return {**address, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def of_srun(rank, port):
    address = {"MASTER_PORT": port, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    return {**address, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def run(job, environment, monkeypatch, expect=0, *arguments):
    """Two processes with the environments of a launcher; their outputs."""
    words, port = job.command("train_distill.py", *arguments)[1:], free_port()
    files, processes = [job.folder / f"out{rank}" for rank in (0, 1)], []
    for rank, file in enumerate(files):
        with monkeypatch.context() as patch:
            for name, value in environment(rank, port).items():
                patch.setenv(name, value)
            processes.append(start_script(words, file))
    for process, file in zip(processes, files):
        process.join(timeout=240)
        assert process.exitcode == expect, (process.exitcode, file.read_text()[-5000:])
    return [file.read_text() for file in files]


def test_srun_trains_and_torchrun_continues_after_a_restart(job, monkeypatch):
    job.config.SOLVER.CHECKPOINT_PERIOD = 2
    run(job, of_srun, monkeypatch)
    whole = checkpoint(job.output)["model"]
    rewind(job.output, "model_0000001")
    (job.output / "model_final.pth").unlink()
    output, _ = run(job, of_torchrun, monkeypatch)
    assert "after iteration 1" in output
    assert all(tensor.equal(whole[name]) for name, tensor in checkpoint(job.output)["model"].items())


def test_one_of_them_tells_a_mistake(job, monkeypatch):
    outputs = run(job, of_srun, monkeypatch, 2, "SOLVER.BASE_LR", "-1")
    assert sum("SOLVER.BASE_LR" in output for output in outputs) == 1
    assert "Traceback" not in "".join(outputs)


@pytest.mark.parametrize(
    "environment, words, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (), "no MASTER_ADDR and no MASTER_PORT"),
        (of_torchrun(0, "1"), ("--num-procs", 3), "--num-procs 3: torchrun has started 2 processes"),
        ({**of_srun(0, "1"), "SLURM_STEP_NUM_NODES": "3"}, (), "srun started 2 processes on 3 machines"),
    ],
)
def test_wrong_environments(environment, words, message, job, monkeypatch, capsys):
    from distill_d2.engine import launch

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        launch(print, job.arguments(*words))
    assert message in capsys.readouterr().err


def torchrun(job, machines, processes):
    """Agents of torchrun, one for each machine, that train with two processes in all."""
    options = ["--nnodes", machines, "--nproc_per_node", processes, "--max_restarts", 2]
    options += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_id",
        "test",
        "--rdzv_endpoint",
        f"127.0.0.1:{free_port()}",
    ]
    start = [sys.executable, "-m", "torch.distributed.run", *map(str, options)]
    with open(job.folder / "log", "w") as log:
        return [
            subprocess.Popen(
                [*start, *job.command("train_distill.py")[1:]],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            for _ in range(machines)
        ]


def wait(agents, log):
    try:
        codes = [agent.wait(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert set(codes) == {0}, log.read_text()[-5000:]


@pytest.mark.slow
def test_two_agents_of_torchrun_as_two_machines(job):
    wait(torchrun(job, machines=2, processes=1), job.folder / "log")
    assert "processes: 2" in (job.folder / "log").read_text()
    assert checkpoint(job.output)["trainer"]["iteration"] == 3


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(job):
    job.config.SOLVER.MAX_ITER = 40
    job.config.SOLVER.CHECKPOINT_PERIOD = 10
    (agent,) = torchrun(job, machines=1, processes=2)
    while not (job.output / "model_0000009.pth").exists() and agent.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    wait([agent], job.folder / "log")
    assert re.search("Starting training from iteration [123]", (job.output / "log.txt").read_text())
    assert [line["iteration"] for line in metrics(job.output) if "total_loss" in line][-1] == 39
