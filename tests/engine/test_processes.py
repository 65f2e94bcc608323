"""Several processes on the CPU over gloo, real command lines, and signals to a running job."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import checkpoint, run_commands, run_forked


def test_two_machines_meet_at_the_users_address(job):
    address = ["--num-machines", 2, "--dist-url", f"file://{job.folder}/meeting"]
    machines = [job.command("train_distill.py", *address, "--machine-rank", rank) for rank in (0, 1)]
    outputs = run_forked(*machines)
    assert "processes: 2" in outputs[0]
    assert (job.output / "model_final.pth").is_file()


def test_baseline_of_a_distillation_config_then_eval_only(job):
    run_forked(job.command("train_baseline.py"))
    weights = f"{job.output}/model_final.pth"
    job.node.MODEL_DISTILLER_CONFIG = "there/is/no/teacher.yaml"
    (output,) = run_forked(job.command("train_distill.py", "--eval-only", "MODEL.WEIGHTS", weights))
    assert "copypaste: AP," in output and "Teacher: " not in output


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (1, 2)])
def test_sigterm_to_a_running_job(job, processes, workers):
    """As a scheduler sends it: to the first process, or, with data loader workers, to all."""
    job.config.SOLVER.MAX_ITER = 100000
    job.config.DATALOADER.NUM_WORKERS = workers
    arguments = job.command("train_distill.py", "--num-procs", processes)
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
        wait_for(lambda: "total_loss" in read(job.output, "metrics.json"), process, log)
        send = os.killpg if workers else os.kill
        send(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    output = log.read_text()
    assert process.returncode == 128 + signal.SIGTERM, output[-5000:]
    assert "--resume continues from there" in output and "Traceback" not in output
    last = read(job.output, "last_checkpoint")
    assert checkpoint(job.output, last[: -len(".pth")])


def test_broken_image_ends_a_job_with_workers(job):
    """Its name alone is shown, once; the worker's traceback is in the log of its process. The workers ignore the
    signal with which Python ends them; the job must not wait for ever."""
    job.config.DATASETS.CHECK_IMAGES = 0
    job.config.DATALOADER.NUM_WORKERS = 2
    for broken in Path(job.entry["IMAGES"]).iterdir():
        broken.write_bytes(broken.read_bytes()[:200])
    (output,) = run_commands(job.command("train_baseline.py", "--num-procs", 2), expect=2)
    assert output.count("or its annotations cannot be used: ") == 1 and "Traceback" not in output
    logs = "".join(path.read_text() for path in job.output.glob("log.txt*"))
    assert "detection_utils.py" in logs


def test_sigterm_before_training_stops_at_once(job):
    (output,) = run_commands(
        ["timeout", "--preserve-status", "-s", "TERM", "3", *job.command("train_distill.py")],
        expect=128 + signal.SIGTERM,
    )
    assert "model_final" not in output


def read(folder, name):
    path = folder / name
    return path.read_text() if path.exists() else ""


def wait_for(condition, process, log, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, log.read_text()[-5000:]
        time.sleep(0.2)
