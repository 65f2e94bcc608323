"""The config files that a run leaves in OUTPUT_DIR."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

from distill_d2 import add_distill_config
from distill_d2.engine import load_config
from distill_d2.engine.config_writing import plain_student_config, write_configs


def in_folder(monkeypatch, job):
    """The job with paths from its folder, which is the current one."""
    monkeypatch.chdir(job.folder)
    job.config.OUTPUT_DIR = "output"
    job.config.MODEL.WEIGHTS = "start.pth"
    job.node.MODEL_DISTILLER_CONFIG = "teacher/teacher.yaml"
    job.node.TEACHER_WEIGHTS = "teacher/teacher.pth"
    shutil.copy("teacher/teacher.pth", "start.pth")


def test_inference_without_the_teacher(job):
    """As a user of detectron2 does it, and with --eval-only."""
    job.run(opts=["SOLVER.MAX_ITER", 1])
    shutil.rmtree(job.folder / "teacher")
    path, weights = str(job.output / "config.yaml"), str(job.output / "model_final.pth")
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file(path)
    cfg.MODEL.WEIGHTS = weights
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert "instances" in DefaultPredictor(cfg)(np.zeros((64, 64, 3), np.uint8))
    job.config_file = str(job.folder / "copy.yaml")
    job.text = (job.output / "config.yaml").read_text()
    assert "bbox" in job.run("--eval-only", opts=["MODEL.WEIGHTS", weights])


def test_resume_from_another_folder(job, monkeypatch):
    in_folder(monkeypatch, job)
    before = job.setup()
    monkeypatch.chdir("/")
    job.config_file, job.text = (
        str(job.folder / "again.yaml"),
        (job.folder / "output/distill_config.yaml").read_text(),
    )
    after = job.setup("--resume")
    paths = (after.OUTPUT_DIR, after.MODEL.WEIGHTS, after.MODEL.DISTILLER.TEACHER_WEIGHTS)
    assert paths == tuple(
        f"{job.folder}/{name}" for name in ("output", "start.pth", "teacher/teacher.pth")
    )
    for name in ("OUTPUT_DIR", "MODEL", "DATASETS"):
        before[name], after[name] = None, None
    assert before == after


def test_to_distill_with_the_config_of_the_student(job):
    job.setup()
    with pytest.raises(
        ValueError, match="describes a student alone; to distill, take '.*/distill_config.yaml'"
    ):
        job.run("--config-file", job.output / "config.yaml", "--resume")


def test_plain_detectron2_loads_it(tmp_path):
    """Where only its own keys have other than default values."""
    cfg = load_config(
        "Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml", ["OUTPUT_DIR", str(tmp_path)]
    )
    cfg.MODEL.DISTILLER.STUDENT_META_ARCH, cfg.MODEL.META_ARCHITECTURE = "RetinaNet", "Distiller"
    write_configs(cfg, train=True)
    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "config.yaml"))
    assert (plain.MODEL.META_ARCHITECTURE, plain.SOLVER.STEPS) == ("RetinaNet", cfg.SOLVER.STEPS)
    lists_and_tuples_alike = partial(json.dumps, sort_keys=True)
    assert lists_and_tuples_alike(plain) == lists_and_tuples_alike(plain_student_config(cfg))
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    write_configs(cfg, train=False)
    assert os.path.isfile(tmp_path / "distill_config.yaml")
    write_configs(cfg, train=True)
    assert not os.path.isfile(tmp_path / "distill_config.yaml")


def test_evaluation_without_the_training_data():
    custom = "[{NAME: gone, FORMAT: images, IMAGES: /gone}, {NAME: kept, FORMAT: images, IMAGES: /}]"
    opts = ["DATASETS.CUSTOM", custom, "DATASETS.TRAIN", "[gone]", "DATASETS.TEST", "[kept]"]
    assert len(load_config("", opts, train=False).DATASETS.CUSTOM) == 2
    with pytest.raises(FileNotFoundError, match="/gone"):
        load_config("", opts)
