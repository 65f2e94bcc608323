"""A loss that never acts on the student is told."""

import logging
import random

import pytest
from detectron2.utils.events import EventStorage
from torch import nn

from distill_d2.distiller.phases import TrainingPhases
from distill_d2.engine.acting import check_acting
from distill_d2.engine.hooks import BoundedHistories
from distill_d2.losses import PKD, DistillLoss, InstanceConditionalDistillation
from distill_d2.losses.base import keys_without_effect


class OfAUser(DistillLoss):
    """Its schedule is its own."""

    NODE = "OF_A_USER"

    def factor(self, iteration):
        return float(iteration % 7 == 5)


def icd(**keys):
    return InstanceConditionalDistillation(hidden_dim=16, att_heads=4, **keys)


def check(loss, max_iter, before=0):
    phases = TrainingPhases(nn.Linear(1, 1), {}, fix_backbone_before=before, fix_head_before=before)
    check_acting({"NAME": loss}, phases, max_iter)


@pytest.mark.parametrize(
    "loss, before, expected",
    [
        (lambda: icd(), 0, "add MODEL.DISTILLER.BYPASS_DISTILL 0. "),
        (lambda: icd(bypass_distill=0, distill_on=0), 0, "MODEL.DISTILLER.DISTILL_ON is 0"),
        (lambda: PKD(start_iter=1000), 0, "MODEL.DISTILLER.PKD.START_ITER is 1000"),
        (
            lambda: PKD(),
            1000,
            "add MODEL.DISTILLER.FIX_BACKBONE_BEFORE 0 MODEL.DISTILLER.FIX_HEAD_BEFORE 0. ",
        ),
    ],
)
def test_off_for_all_of_the_run(loss, before, expected):
    with pytest.raises(
        ValueError, match="NAME never acts on the student in the 1000 iterations"
    ) as caught:
        check(loss(), 1000, before)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "loss, max_iter, expected",
    [
        (lambda: icd(), 1500, "about 33% of the 1500 iterations, from iteration 1000 to 1499"),
        (lambda: icd(weight_value=0.0), 10, "INS_ATT_MIMIC.WEIGHT_VALUE is 0.0"),
        (lambda: PKD(stop_iter=100), 100000, "0% of the 100000 iterations, from iteration 0 to 99"),
        (
            lambda: PKD(weight=0.0, start_iter=100),
            10,
            "NAME distills nothing: MODEL.DISTILLER.PKD.WEIGHT is 0.0",
        ),
        (lambda: PKD(weight=4.0, warmup_iters=19), 10, "it is 2 of 4 in the last iteration"),
        (OfAUser, 70, "about 14% of the 70 iterations, from iteration 5 to 68"),
    ],
)
def test_off_for_most_of_the_run(caplog, loss, max_iter, expected):
    with caplog.at_level(logging.WARNING):
        check(loss(), max_iter)
    (line,) = caplog.messages
    assert expected in line


def test_a_part_that_stays_fixed(caplog):
    check_acting({}, TrainingPhases(nn.Linear(1, 1), {}, fix_backbone_before=10), 10)
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "MODEL.DISTILLER.FIX_BACKBONE_BEFORE is 10"
    ]


def test_losses_that_act_are_not_mentioned(caplog):
    check(icd(), 90000)
    check(PKD(warmup_iters=100), 1000, before=500)
    assert not caplog.messages


def test_keys_of_a_loss_that_is_not_used(job):
    before = keys_without_effect(job.node)
    job.node.FGFI.WEIGHT, job.node.PKD.WEIGHT = 0.3, 0.2
    assert set(keys_without_effect(job.node)) - set(before) == {"MODEL.DISTILLER.FGFI.WEIGHT"}


def test_the_run_stops(job):
    job.node.PKD.START_ITER = 4
    job.fails(ValueError, "PKD never acts on the student in the 4 iterations", "START_ITER is 4")


def test_histories_are_bounded():
    """Medians of the last 1000 and means over all are those of whole histories."""
    hook, whole = BoundedHistories(), EventStorage()
    hook.trainer = type("Trainer", (), {})()
    with EventStorage() as storage:
        for iteration in range(3500):
            hook.trainer.iter = iteration
            for each in (storage, whole):
                each.iter = iteration
                each.put_scalar("time", random.Random(iteration).random())
            hook.after_step()
        bounded, full = storage.history("time"), whole.history("time")
    assert len(bounded.values()) == 1500 and len(full.values()) == 3500
    assert bounded.median(1000) == full.median(1000) and bounded.global_avg() == full.global_avg()
    assert storage.latest_with_smoothing_hint() == whole.latest_with_smoothing_hint()
