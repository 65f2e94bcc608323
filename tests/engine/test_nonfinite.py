"""A loss that is not finite, and weights that hold NaN."""

import math

import pytest
import torch
from runs import assert_equal, checkpoint

from distill_d2.losses import PKD
from distill_d2.testing import save_teacher, tiny_config

SHORT = ["SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"]


def spoil(path, *names):
    """Put a NaN into the tensor of a checkpoint at these keys."""
    entries = value = torch.load(path, weights_only=True)
    for name in names:
        value = value[name]
    value.view(-1)[0] = math.nan
    torch.save(entries, path)
    return str(path)


def test_teachers_weights_with_nan(job):
    path = spoil(job.folder / "teacher" / "teacher.pth", "model", "head.cls_score.weight")
    job.fails(ValueError, path, "NaN or infinity in 1 tensors: model.head.cls_score.weight (1 of ")


def test_students_weights_with_nan(job):
    save_teacher(tiny_config(), job.folder / "student")
    path = spoil(job.folder / "student" / "teacher.pth", "model", "backbone.fpn_output2.bias")
    words = [path, "NaN or infinity in 1 tensors: model.backbone.fpn_output2.bias"]
    for arguments in [["--eval-only"], []]:
        with pytest.raises(ValueError) as caught:
            job.run(*arguments, opts=["MODEL.WEIGHTS", path])
        assert all(word in str(caught.value) for word in words)


def test_resume_from_a_state_with_nan(job):
    job.run(opts=SHORT)
    optimizer = ("trainer", "_trainer", "optimizer", "state", 0, "momentum_buffer")
    path = spoil(job.output / "model_final.pth", *optimizer)
    words = [path, "1 tensors: trainer._trainer.optimizer.state.0.momentum_buffer", "remove this file"]
    with pytest.raises(ValueError) as caught:
        job.run("--resume")
    assert all(word in str(caught.value) for word in words)


def broken(self, student, teacher, batch):
    """The logarithm of 0 in the second step; the gradient is infinity times 0."""
    value = student.features["p2"].mean() * 0
    return {"loss_pkd": torch.log(value + 1 - batch.iteration)}


def test_images_and_operation_are_named(job, monkeypatch):
    monkeypatch.setattr(PKD, "forward", broken)
    with pytest.raises(FloatingPointError) as caught:
        job.run("--detect-anomaly")
    text = str(caught.value)
    assert "at iteration 1 these losses are not finite: {'loss_pkd': -inf}" in text
    assert text.count(job.entry["IMAGES"]) == 2 and text.count("(48x64)") == 2
    assert (
        "the losses ['loss_pkd'] are not finite; the first module with an output that is not finite is losses.PKD"
        in text
    )
    assert "Function 'MulBackward0' returned nan values" in text and 'features["p2"].mean() * 0' in text
    assert "hold NaN" not in text


def test_weights_that_diverged_are_named(job):
    with pytest.raises(
        FloatingPointError, match="tensors of the student hold NaN or infinity: "
    ) as caught:
        job.run(opts=["SOLVER.BASE_LR", 1e38])
    assert "this batch again" not in str(caught.value)


def test_the_flag_changes_nothing_else(job):
    job.run(opts=[*SHORT, "OUTPUT_DIR", job.folder / "plain"])
    job.run("--detect-anomaly", opts=SHORT)
    plain, watched = (checkpoint(folder)["model"] for folder in (job.folder / "plain", job.output))
    assert_equal(plain, watched)
