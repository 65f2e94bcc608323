"""A loss that is not finite, and weights that hold NaN."""

import math

import pytest
import torch
from runs import checkpoint

from distill_d2.losses import PKD


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
    job.run()
    path = spoil(job.output / "model_final.pth", "model", "backbone.fpn_output2.bias")
    for words in [["--eval-only"], []]:
        with pytest.raises(
            ValueError, match="NaN or infinity in 1 tensors: model.backbone.fpn_output2.bias"
        ) as caught:
            job.run(*words, opts=["MODEL.WEIGHTS", path, "OUTPUT_DIR", job.folder / "other"])
        assert path in str(caught.value)


def test_resume_from_a_state_with_nan(job):
    job.run()
    optimizer = ("trainer", "_trainer", "optimizer", "state", 0, "momentum_buffer")
    path = spoil(job.output / "model_final.pth", *optimizer)
    with pytest.raises(
        ValueError, match=r"1 tensors: trainer\._trainer\.optimizer\.state\.0\.momentum_buffer"
    ) as caught:
        job.run("--resume", opts=["SOLVER.MAX_ITER", 6])
    assert path in str(caught.value) and "remove this file" in str(caught.value)


def broken(self, student, teacher, batch):
    """The logarithm of 0 in the second step; the gradient is infinity times 0."""
    value = student.features["p2"].mean() * 0
    return {"loss_pkd": torch.log(value + 1 - batch.iteration)}


def broken_run(job, monkeypatch, *words):
    monkeypatch.setattr(PKD, "forward", broken)
    with pytest.raises(FloatingPointError) as caught:
        job.run(*words)
    return str(caught.value)


def test_the_images_of_the_batch_are_named(job, monkeypatch):
    text = broken_run(job, monkeypatch)
    assert "at iteration 1 these losses are not finite: {'loss_pkd': -inf}" in text
    assert text.count(job.entry["IMAGES"]) == 2 and text.count("(48x64)") == 2
    assert "hold NaN" not in text and "this batch again" not in text


def test_the_operation_is_named(job, monkeypatch):
    text = broken_run(job, monkeypatch, "--detect-anomaly")
    assert (
        "the losses ['loss_pkd'] are not finite; the first module with an output that is not finite is losses.PKD"
        in text
    )
    assert "Function 'MulBackward0' returned nan values" in text and 'features["p2"].mean() * 0' in text


def test_weights_that_diverged_are_named(job):
    with pytest.raises(FloatingPointError, match="tensors of the student hold NaN or infinity: "):
        job.run(opts=["SOLVER.BASE_LR", 1e38])


def test_the_flag_changes_nothing_else(job):
    job.run(opts=["OUTPUT_DIR", job.folder / "plain"])
    job.run("--detect-anomaly")
    plain, watched = (checkpoint(folder)["model"] for folder in (job.folder / "plain", job.output))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
