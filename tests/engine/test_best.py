"""The best student by a metric, and the end of a run without improvement."""

import math

import pytest
import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from runs import assert_equal, checkpoint, metrics, rewind

from distill_d2.engine import DistillTrainer
from distill_d2.engine.best import check_metric, without_improvement

OPTS = ["SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1]
OPTS += ["TEST.KEEP_BEST", "bbox/AP"]


@pytest.fixture
def scores(monkeypatch, log_every_iteration):
    """AP of each evaluation, by iteration."""
    values = [1.0, 3.0, math.nan, 2.0, 3.0, 2.0]

    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP": values[get_event_storage().iter if has_event_storage() else -1]}}

    monkeypatch.setattr(DistillTrainer, "test", classmethod(test))
    return values


def best(job):
    saved = torch.load(job.output / "model_best.pth", weights_only=True)
    return saved["model"], (saved["metadata"]["best"]["iteration"], saved["metadata"]["best"]["value"])


def test_the_best_student_is_kept(job, scores):
    job.run(opts=OPTS)
    student, of_best = best(job)
    assert of_best == (1, 3.0)
    assert_equal(student, checkpoint(job.output, "model_0000001")["model"])
    assert checkpoint(job.output)["trainer"]["iteration"] == 4
    # What a kill cut off is worse this time; the file stays, until something is better.
    rewind(job.output, "model_0000000")
    scores[1], scores[5] = 2.0, 4.0
    job.run("--resume", opts=[*OPTS, "SOLVER.MAX_ITER", 3])
    assert best(job)[1] == (1, 3.0)
    job.run("--resume", opts=OPTS)
    assert best(job)[1] == (4, 4.0)


def test_patience(job, scores):
    """The second evaluation without a better one ends the run, also one that was killed between."""
    opts = [*OPTS, "TEST.PATIENCE", 2]
    results = job.run(opts=opts)
    whole = checkpoint(job.output)
    assert (whole["trainer"]["iteration"], results["bbox"]["AP"]) == (3, 2.0)
    assert metrics(job.output)[-1]["iteration"] == 3
    rewind(job.output, "model_0000002")
    job.run("--resume", opts=opts)
    assert_equal(checkpoint(job.output)["model"], whole["model"])
    assert job.run("--resume", opts=opts)["bbox"]["AP"] == 2.0  # it had ended before
    assert checkpoint(job.output)["trainer"]["iteration"] == 3


@pytest.mark.parametrize(
    "values, count",
    [([], 0), ([math.nan, math.nan], 0), ([1.0, 1.0, math.nan], 2), ([2.0, 1.0, 3.0], 0)],
)
def test_evaluations_without_improvement(values, count):
    assert without_improvement(dict(enumerate(values))) == count


def test_wrong_metrics_are_told_before_training(job):
    job.fails(
        ValueError,
        "TEST.KEEP_BEST (train.keep_best) is 'bbox/AP5'",
        "results ['bbox/AP', ",
        "; the closest is 'bbox/AP",
        opts=["TEST.KEEP_BEST", "bbox/AP5"],
    )
    job.fails(ValueError, "TEST.PATIENCE is 2; expected 0, or a metric", opts=["TEST.PATIENCE", 2])
    job.fails(ValueError, "TEST.PATIENCE is 2", "on the way", opts=[*OPTS[-2:], "TEST.PATIENCE", 2])
    job.fails(
        ValueError, "TEST.KEEP_BEST is 'b/AP'", opts=["TEST.KEEP_BEST", "b/AP", "DATASETS.TEST", "()"]
    )
    check_metric("val/bbox/AP", {"val": {"bbox/AP"}})
    check_metric("val/bbox/AP", {"val": {"bbox/AP"}, "test": {"bbox/AP"}})
    check_metric("anything", {"val": set()})
    with pytest.raises(ValueError, match="the closest is 'test/bbox/AP'"):
        check_metric("tset/bbox/AP", {"val": {"bbox/AP"}, "test": {"bbox/AP"}})


def test_the_metric_of_a_lazy_config(lazy_job):
    lazy_job.replace("eval_period=0", "eval_period=1, keep_best='bbox/AP50'")
    lazy_job.run()
    log = (lazy_job.output / "log.txt").read_text()
    assert "No evaluation gave a finite bbox/AP50" in log
    with pytest.raises(
        ValueError, match="train.patience is 1; expected 0, or a metric in train.keep_best"
    ):
        lazy_job.run("--overwrite", "train.patience=1", "train.eval_period=0")
