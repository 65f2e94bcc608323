"""With GRADIENT_RATIO 1 the gradient of every registered loss is the task's, also in two processes."""

import dataclasses

import pytest
from pool import same_everywhere

from distill_d2.balance import weights_by_ratio
from distill_d2.engine.distributed import distributed
from distill_d2.engine.gradient_ratios import ratios_in_step
from distill_d2.gradients import term_gradients
from distill_d2.testing import Cell, families, recipes
from distill_d2.testing.cells import gradients_of, losses_of


def weighed(recipe, family):
    """A Distiller whose loss has the ratio 1, its weight by name, and a batch."""
    model, batch = (
        Cell.of_recipe(recipes()[recipe], families()[family]).distiller(),
        families()[family].batch(),
    )
    (loss,) = model.losses.values()
    loss.settings = dataclasses.replace(loss.settings, gradient_ratio=1.0)
    weights = weights_by_ratio(model, list(model.losses), [batch])
    (loss.applied_weight,) = weights.values()
    return model, weights, batch


def weights_of(recipe, family):
    return weighed(recipe, family)[1]


@pytest.mark.parametrize("recipe", recipes())
def test_measured_anew(recipe):
    model, weights, batch = weighed(recipe, recipes()[recipe].family)
    assert term_gradients(model, batch).ratio(*weights) == pytest.approx(1, rel=2e-3)
    model.gradient_ratio_period, model.phases.supported_by_trainer = 1, True
    losses = losses_of(model, batch)
    (ratio,) = ratios_in_step(model, losses, lambda loss: loss).values()
    assert ratio > 0
    sum(losses.values()).backward()  # the graph is still there


def step_with(period):
    """The gradients of a step in which each ``period``-th one is measured, and what was measured."""
    model, _, batch = weighed("PKD", "RetinaNet")
    model.gradient_ratio_period, model.phases.supported_by_trainer = period, True
    losses = losses_of(distributed(model), batch)
    ratios = ratios_in_step(model, losses, lambda loss: loss)
    sum(losses.values()).backward()
    return gradients_of(model), ratios


def test_two_processes(pool):
    """Whose detector averages over them; a step's own measurement leaves DistributedDataParallel's gradients."""
    case = "PKD", "FCOS (AdelaiDet)"
    assert pool.run(weights_of, *case) == [weights_of(*case)] * 2
    measured, plain = pool.run(step_with, 1), pool.run(step_with, 2)
    assert [list(ratios) for _, ratios in measured + plain] == [["grad_ratio/PKD"]] * 2 + [[]] * 2
    assert same_everywhere([gradients for gradients, _ in measured + plain])
