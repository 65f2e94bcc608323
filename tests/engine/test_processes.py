"""Several processes on the CPU over gloo, real command lines, and signals to a running job."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def command(job, script, *arguments):
    job.arguments()  # writes the config
    return [
        sys.executable,
        str(ROOT / script),
        *("--num-gpus", "0", "--config-file", job.config_file),
        *map(str, arguments),
    ]


def run(*commands, expect=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for c in commands
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == expect, output[-5000:]
    return outputs


def student(folder, name="model_final"):
    return torch.load(Path(folder) / f"{name}.pth", weights_only=True)["model"]


def test_two_processes_train_with_adapters_and_resume(job):
    """Law 8: an adapter that idles until START_ITER, and no find_unused_parameters."""
    node = job.config.MODEL.DISTILLER
    node.TYPES = ["FeatureMimic", "PKD"]
    node.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    node.FEATURE_MIMIC.START_ITER = 2
    job.config.SOLVER.CHECKPOINT_PERIOD = 2
    whole = command(job, "train_distill.py", "--num-procs", 2)
    (output,) = run(whole)
    assert "World size: 2" in output
    trained = student(job.config.OUTPUT_DIR)
    (Path(job.config.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000001.pth")
    run(command(job, "train_distill.py", "--num-procs", 2, "--resume"))
    resumed = student(job.config.OUTPUT_DIR)
    assert all(torch.allclose(trained[k], resumed[k], rtol=1e-4, atol=1e-6) for k in trained)


def test_two_machines_meet_at_the_users_address(job):
    address = ["--num-machines", 2, "--dist-url", f"file://{job.folder}/meeting"]
    machines = [
        command(job, "train_distill.py", *address, "--machine-rank", rank) for rank in (0, 1)
    ]
    outputs = run(*machines)
    assert "World size: 2" in outputs[0]
    assert (Path(job.config.OUTPUT_DIR) / "model_final.pth").is_file()


def test_baseline_of_a_distillation_config_then_eval_only(job):
    run(command(job, "train_baseline.py"))
    weights = f"{job.config.OUTPUT_DIR}/model_final.pth"
    job.config.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = "there/is/no/teacher.yaml"
    (output,) = run(command(job, "train_distill.py", "--eval-only", "MODEL.WEIGHTS", weights))
    assert "copypaste: AP," in output and "Teacher" not in output


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (1, 2)])
def test_sigterm_to_a_running_job(job, processes, workers):
    """As a scheduler sends it: to the first process, or, with data loader workers, to all."""
    job.config.SOLVER.MAX_ITER = 100000
    job.config.DATALOADER.NUM_WORKERS = workers
    arguments = command(job, "train_distill.py", "--num-procs", processes)
    log = job.folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            arguments,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        wait_for(lambda: "total_loss" in read(job.config.OUTPUT_DIR, "metrics.json"), process, log)
        send = os.killpg if workers else os.kill
        send(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    output = log.read_text()
    assert process.returncode == 128 + signal.SIGTERM, output[-5000:]
    assert "--resume goes on from there" in output and "Traceback" not in output
    last = read(job.config.OUTPUT_DIR, "last_checkpoint")
    assert student(job.config.OUTPUT_DIR, last[: -len(".pth")])


def read(folder, name):
    path = Path(folder) / name
    return path.read_text() if path.exists() else ""


def wait_for(condition, process, log, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, log.read_text()[-5000:]
        time.sleep(0.2)
