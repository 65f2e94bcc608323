"""Detectors of projects/ in two processes, with find_unused_parameters=False (law 8)."""

import math

import pytest
from job import Job
from promises import last_losses
from test_processes import command, run

from distill_d2.testing import families
from distill_d2.testing.tiny import distiller_config, save_teacher, use_dataset

PROJECTS = ["FCOS (AdelaiDet)", "CondInst", "SOLOv2", "POTO"]


@pytest.mark.parametrize("name", PROJECTS)
def test_two_processes(tmp_path, name):
    """Each step and each process has other objects."""
    job, build = Job(tmp_path), families()[name].config
    student = build(8)
    use_dataset(student, job.entry)
    student.VERSION, student.DATASETS.TEST = 2, ()
    output = job.config.OUTPUT_DIR
    teacher = save_teacher(build(16), tmp_path / "other")
    job.config = distiller_config(student, teacher, ["InstanceConditionalDistillation"])
    job.config.MODEL.DISTILLER.INS.HIDDEN_DIM = 16
    job.config.OUTPUT_DIR = output
    (lines,) = run(command(job, "train_distill.py", "--num-procs", 2))
    assert "World size: 2" in lines
    losses = last_losses(output)
    assert "loss_icd_value" in losses and all(map(math.isfinite, losses.values()))
