"""GRADIENT_RATIO: the weight of a loss by its gradient, when a training starts, in a checkpoint, step by step."""

import pytest
from runs import Job, assert_equal, checkpoint, metrics, rewind

from distill_d2 import DISTILL_LOSS_REGISTRY
from distill_d2.engine.gradient_log import read_gradients
from distill_d2.engine.gradient_ratios import _iterations

RATIO = "MODEL.DISTILLER.PKD.GRADIENT_RATIO"
PERIOD = "MODEL.DISTILLER.GRADIENT_RATIO_PERIOD"
SCHEDULE = ["SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 1]


def test_the_gradient_is_that_many_times_the_tasks_in_a_resumed_run_too(tmp_path, log_every_iteration):
    """With any weight in the config; a step's own measurements change nothing."""
    job = Job(tmp_path, evaluate=False)
    job.node.MEASURE_GRADIENTS = True
    opts = [*SCHEDULE, RATIO, 2.0, "MODEL.DISTILLER.PKD.START_ITER", 1]
    job.run(opts=[*opts, "MODEL.DISTILLER.PKD.WEIGHT", 5.0])
    whole = checkpoint(job.output)
    weight = whole["trainer"]["gradient_ratios"]["PKD"]["weight"]
    first = read_gradients(job.output)[0]
    assert first["losses"]["PKD"] == pytest.approx(2 * first["task"], rel=1e-3)
    assert first["weights"] == {"PKD": weight} == {"PKD": metrics(job.output)[0]["weight/PKD"]}
    assert f"PKD.WEIGHT is {weight:g} now" in (job.output / "log.txt").read_text()

    rewind(job.output, "model_0000000")
    with pytest.raises(
        ValueError, match=f"{RATIO} is 3.0, but the checkpoint's run has 2.0, with the weight"
    ):
        job.run("--resume", opts=[*SCHEDULE, RATIO, 3.0])
    job.run("--resume", opts=[*opts, "MODEL.DISTILLER.PKD.WEIGHT", 7.0])
    assert_equal(whole["model"], checkpoint(job.output)["model"])
    told = "PKD.WEIGHT is 7.0, in the checkpoint 5.0: GRADIENT_RATIO sets this weight"
    assert told in (job.output / "log.txt").read_text()

    job.run("--overwrite", opts=[*opts, "MODEL.DISTILLER.PKD.WEIGHT", 50.0, PERIOD, 2])
    assert_equal(whole["model"], checkpoint(job.output)["model"])
    lines = [line.get("grad_ratio/PKD") for line in metrics(job.output) if "total_loss" in line]
    assert lines[:2] == [None, None] and 0.5 < lines[2] < 8


def test_adapters_that_start_almost_at_0_are_measured_while_they_grow(tmp_path, log_every_iteration):
    job = Job(tmp_path, types=["DeFeat"], evaluate=False)
    job.node.DEFEAT.GRADIENT_RATIO = 1.0
    assert job.trainer()._ratios._due == {"DeFeat": [0, 1, 2, 4, 8, 16, 32, 64, 128, 200]}
    opts = [*SCHEDULE, "SOLVER.MAX_ITER", 5, "MODEL.DISTILLER.DEFEAT.GRADIENT_RATIO_ITERS", 3]
    job.run("--overwrite", opts=opts)
    whole, weights = checkpoint(job.output), [m.get("weight/DeFeat") for m in metrics(job.output)]
    assert weights[0] == job.node.DEFEAT.WEIGHT and all(weights[:4]) and weights[4] is None
    assert whole["trainer"]["gradient_ratios"]["DeFeat"]["weight"] == weights[3]
    rewind(job.output, "model_0000001")
    job.run("--resume", opts=opts)
    assert_equal(whole["model"], checkpoint(job.output)["model"])


def test_a_loss_that_learns_first_is_measured_again_when_it_begins_to_teach():
    icd = DISTILL_LOSS_REGISTRY.get("InstanceConditionalDistillation")
    assert _iterations(icd(bypass_distill=5, gradient_ratio_iters=1), 10) == [0, 5, 6]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("TASK_LOSS_WEIGHT", 0.0, f"{RATIO} is 1.0, but MODEL.DISTILLER.TASK_LOSS_WEIGHT is 0"),
        ("PKD.WEIGHT", 0.0, "PKD.WEIGHT is 0.0; expected above 0, because GRADIENT_RATIO is 1.0"),
        ("FREEZE", ["backbone.*"], "in the student's trained backbone and neck the gradient of its own"),
    ],
)
def test_what_no_weight_can_give(job, key, value, message):
    job.fails(ValueError, message, opts=[RATIO, 1.0, f"MODEL.DISTILLER.{key}", value])
