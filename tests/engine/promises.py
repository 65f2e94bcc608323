"""What every distillation promises of its runs, checked on a Job: the laws of tests/README.md."""

from pathlib import Path

import gid_run
import pytest
import torch
from detectron2.modeling import build_model
from test_icd import rewind, trainer_of
from test_training import assert_equal, checkpoint, metrics

from distill_d2 import teacher as teacher_module
from distill_d2.config import student_config
from distill_d2.engine import setup


def last_losses(folder):
    """The losses that a run logged last."""
    last = [line for line in metrics(folder) if "total_loss" in line][-1]
    return {name: value for name, value in last.items() if name.startswith("loss_")}


def trains_and_saves(job, monkeypatch):
    """Laws 2 and 9; the teacher's batch normalisation would show a training mode.

    Returns:
        the losses that were logged last, and the names of the losses' own parameters.
    """
    job.config.MODEL.DISTILLER.TEACHER_PREPARE = False  # so that its weights are the file's
    trainer = trainer_of(job, opts=["SOLVER.MAX_ITER", 3])
    teacher = trainer.plain_model.teacher.model
    start = {name: value.clone() for name, value in trainer.plain_model.losses.state_dict().items()}
    trainer.train()
    logged = last_losses(job.config.OUTPUT_DIR)

    assert_equal(teacher.state_dict(), torch.load(job.folder / "teacher/teacher.pth")["model"])
    assert not any(module.training for module in teacher.modules())
    saved = checkpoint(job.config.OUTPUT_DIR)
    build_model(student_config(job.config)).load_state_dict(saved["model"], strict=True)
    learnt = saved["distiller"]
    assert learnt.keys() == start.keys()
    assert not any(torch.equal(learnt[name], start[name]) for name in start)

    monkeypatch.setattr(teacher_module, "load_teacher", lambda *_, **__: pytest.fail("a teacher"))
    job.config.DATASETS.TEST = job.config.DATASETS.TRAIN
    weights = f"{job.config.OUTPUT_DIR}/model_final.pth"
    assert "AP" in job.run("--eval-only", opts=["MODEL.WEIGHTS", weights])["bbox"]
    return logged, set(start)


def equals_the_baseline(job):
    """Law 1, with what the losses train in the student's optimizer; the names of that."""
    job.config.SOLVER.CLIP_GRADIENTS.ENABLED = True
    job.config.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    job.config.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    job.run(distill=False, opts=["OUTPUT_DIR", job.folder / "baseline"])
    job.run()
    saved = checkpoint(job.config.OUTPUT_DIR)
    assert_equal(checkpoint(job.folder / "baseline")["model"], saved["model"])
    return set(saved["distiller"])


def resumes_exactly(job):
    """A run that is resumed after its first iteration equals one of two."""
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1]
    job.run(opts=options)
    whole = checkpoint(job.config.OUTPUT_DIR)
    rewind(job.config.OUTPUT_DIR, "model_0000000")
    Path(job.config.OUTPUT_DIR, "model_final.pth").unlink()
    job.run("--resume", opts=options)
    resumed = checkpoint(job.config.OUTPUT_DIR)
    assert resumed["trainer"]["iteration"] == 1
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])


def processes_share_their_gradients(job):
    """Law 8, after gid_run.py in two processes: each has its own losses, and the mean of the gradients.

    Returns:
        what each of the two saved.
    """
    model = gid_run.start(setup(job.arguments(), distill=True))
    ranks = [torch.load(f"{job.config.OUTPUT_DIR}/rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    for name, (iteration, images) in gid_run.STEPS.items():
        halves = []
        for rank, image in enumerate(images):
            torch.manual_seed(0)
            losses, gradients = gid_run.step(model, model, iteration, gid_run.image_of(*image))
            torch.testing.assert_close(ranks[rank][name][0], losses)
            halves.append({key: gradient.clone() for key, gradient in gradients.items()})
        mean = {key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}
        for rank in (0, 1):
            torch.testing.assert_close(ranks[rank][name][1], mean, rtol=1e-4, atol=1e-6)
    return ranks
