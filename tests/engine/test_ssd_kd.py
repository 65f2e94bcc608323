"""SSDKD end to end, as a user trains with it: the laws, resume, processes, wrong input."""

import math

import pytest
from job import Job
from promises import equals_the_baseline, last_losses, resumes_exactly, trains_and_saves
from ssd_case import config as ssd_config
from test_distiller import count_calls
from test_icd import trainer_of
from test_processes import command, run
from test_training import checkpoint
from test_wrong_input import fails

from distill_d2.testing.tiny import CLASSES, distiller_config, save_teacher, use_dataset

ONE_STAGE = {f"loss_ssd_kd_{name}" for name in ("soft", "bounded", "hint")}
TERMS = {
    "ssd": ONE_STAGE,
    "faster": ONE_STAGE | {f"loss_ssd_kd_{name}_rpn" for name in ("soft", "bounded")},
}
LEVELS = {"ssd": {"s8", "s16", "s32"}, "faster": {"p2", "p3", "p4", "p5", "p6"}}
REPOSITORY = {"BOUNDED": "batch", "HINT": "logits"}


def ssd_kd_job(folder, family="ssd", **keys):
    """A job that distils by SSDKD, with these keys of its node, and does not evaluate."""
    job = Job(folder, "faster")
    if family == "ssd":
        _use_ssds(job)
    job.config.DATASETS.TEST = ()
    node = job.config.MODEL.DISTILLER
    node.TYPES = ["SSDKD"]
    for key, value in keys.items():
        node.SSD_KD[key] = value
    return job


def _use_ssds(job):
    """A MobileNetV2 and a VGG16 of 96 pixels, with the same prior boxes."""
    sizes = {"STRIDES": [16, 32], "MIN_SIZES": [20.0, 40.0], "MAX_SIZES": [40.0, 60.0]}
    keys = {"SIZE": 96, "NUM_CLASSES": CLASSES, **sizes, "ASPECT_RATIOS": [[2.0]] * 2}
    student, teacher = ssd_config("C", WIDTH=0.25, **keys), ssd_config("B", WIDTH=0.125, **keys)
    for cfg in (student, teacher):
        cfg.VERSION, cfg.SEED = 2, 1
        cfg.INPUT.FIXED_SIZE = [96, 96]
        use_dataset(cfg, job.entry)
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2])
        cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "SOLVER.BASE_LR", 1e-3])
    output = job.config.OUTPUT_DIR
    job.config = distiller_config(student, save_teacher(teacher, job.folder / "teacher"))
    job.config.OUTPUT_DIR = output


@pytest.mark.parametrize("keys", [{}, REPOSITORY])
@pytest.mark.parametrize("family", list(TERMS))
def test_trains_logs_and_saves(tmp_path, monkeypatch, family, keys):
    logged, trained = trains_and_saves(ssd_kd_job(tmp_path, family, **keys), monkeypatch)
    assert TERMS[family] < set(logged)
    assert all(0 <= logged[name] < math.inf for name in TERMS[family])
    # Features have adapters, logits none.
    assert {name.split(".")[-2] for name in trained} == (set() if keys else LEVELS[family])


@pytest.mark.parametrize("family", list(TERMS))
@pytest.mark.parametrize("keys", [{"WEIGHT": 0.0}, {"START_ITER": 100}])
def test_student_alone_equals_the_baseline(tmp_path, family, keys):
    """Its own losses are not scaled either."""
    equals_the_baseline(ssd_kd_job(tmp_path, family, **keys))


def test_distillation_reaches_the_student(tmp_path):
    """The counterpart."""
    job = ssd_kd_job(tmp_path, MU=1.0, NU=0.0)  # the hint alone
    job.run(distill=False, opts=["OUTPUT_DIR", tmp_path / "baseline", "SOLVER.MAX_ITER", 1])
    job.run(opts=["SOLVER.MAX_ITER", 1])
    alone, distilled = (
        checkpoint(folder)["model"] for folder in (tmp_path / "baseline", job.config.OUTPUT_DIR)
    )
    differ = {name.split(".")[0] for name in alone if not alone[name].equal(distilled[name])}
    assert "backbone" in differ


def test_resumed_run_equals_uninterrupted(tmp_path):
    resumes_exactly(ssd_kd_job(tmp_path, WARMUP_ITERS=1))


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, {"backbone": 1, "head": 1}),
        ({"MU": 1.0, "NU": 0.0}, {"backbone": 1}),
        ({"WEIGHT": 0.0}, {}),
        ({"START_ITER": 1}, {}),
    ],
)
def test_teachers_head_runs_once_where_it_is_asked(tmp_path, keys, expected):
    """Law 4: a hint on features needs no head."""
    job = ssd_kd_job(tmp_path, **keys)
    trainer = trainer_of(job, opts=["SOLVER.MAX_ITER", 1])
    teacher = trainer.plain_model.teacher.model
    calls = {part: count_calls(getattr(teacher, part)) for part in ("backbone", "head")}
    trainer.train()
    assert {part: len(found) for part, found in calls.items() if found} == expected


@pytest.mark.parametrize("family", list(TERMS))
def test_two_processes(tmp_path, family):
    """Law 8: adapters that wait for START_ITER, without find_unused_parameters."""
    job = ssd_kd_job(tmp_path, family, START_ITER=1)
    job.config.SOLVER.MAX_ITER = 2
    job.config.SOLVER.IMS_PER_BATCH = 4
    (lines,) = run(command(job, "train_distill.py", "--num-procs", 2))
    assert "World size: 2" in lines
    logged = last_losses(job.config.OUTPUT_DIR)
    assert all(math.isfinite(logged[name]) for name in TERMS[family])


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MU", 1.5], "SSD_KD.MU is 1.5"),
        (["BOUNDED", "boxes"], "SSD_KD.BOUNDED is 'boxes'"),
        (["HINT", "features"], "SSD_KD.HINT is 'features'"),
        (["IN_FEATURES", "['p3']"], "no level 'p3'; its neck has"),
        (["NEGATIVES_PER_POSITIVE", -1.0], "SSD_KD.NEGATIVES_PER_POSITIVE is -1"),
    ],
)
def test_wrong_values(tmp_path, opts, message):
    job = ssd_kd_job(tmp_path)
    fails(job, (ValueError, KeyError), message, opts=[f"MODEL.DISTILLER.SSD_KD.{opts[0]}", opts[1]])
