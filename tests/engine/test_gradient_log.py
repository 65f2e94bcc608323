"""OUTPUT_DIR/gradients.jsonl and what a distillation's start says of its losses; the run stays as it is."""

import pytest
from runs import assert_equal, checkpoint, rewind

from distill_d2.engine.gradient_log import read_gradients

pytestmark = pytest.mark.usefixtures("measuring")
SCHEDULE = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 1]


@pytest.fixture
def measuring(job):
    job.node.MEASURE_GRADIENTS = True


def test_each_evaluation_has_a_line_and_the_run_is_the_same_without(job):
    job.run(opts=SCHEDULE)
    lines, whole = read_gradients(job.output), checkpoint(job.output)
    assert [line["iteration"] for line in lines] == [0, 2, 4]
    first = lines[0]
    assert set(first["terms"]) == {"loss_cls", "loss_box_reg", "loss_pkd"}
    assert first["terms"]["loss_pkd"]["gradient"] == first["losses"]["PKD"] > 0 and first["task"] > 0
    assert lines[1]["terms"] != first["terms"]
    rewind(job.output, "model_0000001")
    job.run("--resume", opts=SCHEDULE)
    assert read_gradients(job.output) == lines
    job.run("--overwrite", opts=[*SCHEDULE, "MODEL.DISTILLER.MEASURE_GRADIENTS", False])
    assert not read_gradients(job.output)
    assert_equal(whole["model"], checkpoint(job.output)["model"])


@pytest.mark.parametrize("weight, words", [(1e-4, "hardly teaches"), (1e5, "may neglect")])
def test_a_loss_that_is_too_weak_or_too_strong_is_told(job, weight, words):
    job.node.PKD.WEIGHT = weight
    job.trainer(opts=["TEST.EVAL_PERIOD", 0])._gradients.start()
    log = (job.output / "log.txt").read_text()
    assert "| term " in log and "| all of the task " in log and "| loss_pkd " in log
    assert words in log and "MODEL.DISTILLER.PKD.WEIGHT" in log.rpartition(words)[2]


def test_a_step_tells_of_a_divergence(job, monkeypatch):
    def diverged(*_, **keys):
        raise FloatingPointError

    monkeypatch.setattr("distill_d2.engine.gradient_log.term_gradients", diverged)
    job.trainer(opts=["TEST.EVAL_PERIOD", 0])._gradients.start()
    assert not read_gradients(job.output)


def test_losses_that_are_off_are_not_measured(job, monkeypatch):
    monkeypatch.setattr("distill_d2.engine.gradient_log.term_gradients", None)
    job.node.PKD.WEIGHT = 0.0
    job.trainer(opts=["TEST.EVAL_PERIOD", 0])._gradients.start()
    assert not read_gradients(job.output)
