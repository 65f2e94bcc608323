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
from coco_case import SMALL, write_coco, write_weights
from runs import ROOT, checkpoint, rewind, run_commands


def test_two_processes_train_with_adapters_and_resume(job):
    """An adapter that idles until START_ITER, without find_unused_parameters."""
    job.node.TYPES = ["FeatureMimic", "PKD"]
    job.node.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    job.node.FEATURE_MIMIC.START_ITER = 2
    job.config.SOLVER.CHECKPOINT_PERIOD = 2
    whole = job.command("train_distill.py", "--num-procs", 2)
    (output,) = run_commands(whole)
    assert "World size: 2" in output
    trained = checkpoint(job.output)["model"]
    rewind(job.output, "model_0000001")
    run_commands(job.command("train_distill.py", "--num-procs", 2, "--resume"))
    resumed = checkpoint(job.output)["model"]
    assert all(torch.allclose(trained[k], resumed[k], rtol=1e-4, atol=1e-6) for k in trained)


def test_two_machines_meet_at_the_users_address(job):
    address = ["--num-machines", 2, "--dist-url", f"file://{job.folder}/meeting"]
    machines = [job.command("train_distill.py", *address, "--machine-rank", rank) for rank in (0, 1)]
    outputs = run_commands(*machines)
    assert "World size: 2" in outputs[0]
    assert (job.output / "model_final.pth").is_file()


def test_baseline_of_a_distillation_config_then_eval_only(job):
    run_commands(job.command("train_baseline.py"))
    weights = f"{job.output}/model_final.pth"
    job.node.MODEL_DISTILLER_CONFIG = "there/is/no/teacher.yaml"
    (output,) = run_commands(job.command("train_distill.py", "--eval-only", "MODEL.WEIGHTS", weights))
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
    assert "--resume goes on from there" in output and "Traceback" not in output
    last = read(job.output, "last_checkpoint")
    assert checkpoint(job.output, last[: -len(".pth")])


def test_broken_image_ends_a_job_with_workers(job):
    """The workers ignore the signal with which python ends them; the job must not wait for ever."""
    job.config.DATASETS.CHECK_IMAGES = 0
    job.config.DATALOADER.NUM_WORKERS = 2
    broken = Path(job.entry["IMAGES"]) / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (output,) = run_commands(job.command("train_baseline.py"), expect=1)
    assert str(broken) in output


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


@pytest.fixture
def coco(tmp_path, monkeypatch):
    write_coco(tmp_path / "datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path


def reference_line(folder, script, config, *arguments):
    start = [sys.executable, str(ROOT / script), "--num-gpus", "0", "--config-file"]
    return [*start, str(ROOT / config), *arguments, *SMALL, "OUTPUT_DIR", str(folder / "output")]


def test_command_lines_of_the_reference_on_coco(coco):
    """As its README gives them, but for the sizes."""
    config = "configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    weights = write_weights("COCO-Detection/retinanet_R_50_FPN_1x.yaml", coco / "r50.pth")
    run_commands(reference_line(coco, "train_baseline.py", config, "MODEL.WEIGHTS", weights))
    config = "configs/Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml"
    weights = ["MODEL.WEIGHTS", str(coco / "output" / "model_final.pth")]
    line = reference_line(coco, "train_distill.py", config, "--resume", "--eval-only", *weights)
    assert "copypaste: AP," in run_commands(line)[0]


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("retinanet", "COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
        pytest.param("RCNN", "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", marks=pytest.mark.slow),
        pytest.param(
            *("MaskRCNN", "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_icds_command_lines_of_the_reference_on_coco(coco, student, teacher):
    config = f"configs/Distillation-ICD/{student}_R_50_R101_icd_FPN_1x.yaml"
    weights = [
        "MODEL.WEIGHTS",
        "",
        "MODEL.DISTILLER.TEACHER_WEIGHTS",
        write_weights(teacher, coco / "t.pth"),
    ]
    run_commands(reference_line(coco, "train_distill.py", config, "--resume", *weights))
    saved = torch.load(coco / "output" / "model_final.pth", weights_only=True)
    assert saved["distiller"] and saved["trainer"]["iteration"] == 1
    line = reference_line(coco, "train_distill.py", config, "--resume", "--eval-only", *weights)
    assert "copypaste: AP," in run_commands(line)[0]
