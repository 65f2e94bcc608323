"""Law 8: two processes, with find_unused_parameters=False. Each has its own images, with or without objects;
the gradients are the mean of what each would compute alone, in both."""

import pytest
import torch
from detectron2.utils import comm
from pool import same_everywhere

from distill_d2.engine.distributed import distributed
from distill_d2.testing import Cell, families, recipes, step

CELLS = [
    *((name, recipe.family) for name, recipe in recipes().items()),
    *(("PKD", name) for name in families()),
]
CELLS = list(dict.fromkeys(CELLS))
#: The number of objects in each image of each process, step by step.
STEPS = [(2, 2), (2, 0), (0, 0), (1, 2)]


def steps_of(recipe, family, weight, rank, wrap):
    """What a process computes: the losses and the gradients of each step.

    Args:
        weight: of the student's own losses.
        rank: of the images.
        wrap: what DistributedDataParallel does to a model.
    """
    kind = families()[family]
    model = Cell.of_recipe(recipes()[recipe], kind).distiller(task_loss_weight=weight)
    wrapped, results = wrap(model), []
    for objects in STEPS:
        batch = [kind.batch(2, objects=objects[rank])[rank]]
        losses = step(wrapped, batch)
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        results.append((losses, trained))
    return results


def steps_of_this_process(recipe, family, weight):
    return steps_of(recipe, family, weight, comm.get_rank(), distributed)


def steps_on_equal_images(family):
    return steps_of("PKD", family, 1.0, 0, distributed)


@pytest.mark.parametrize("recipe, family", CELLS)
def test_gradients_are_the_mean(pool, recipe, family):
    """Of the distillation alone: detectors may normalize their own losses over all processes."""
    ranks = pool.run(steps_of_this_process, recipe, family, 0.0)
    alone = [steps_of(recipe, family, 0.0, rank, lambda model: model) for rank in (0, 1)]
    for index in range(len(STEPS)):
        expected = [halves[index] for halves in alone]
        for (losses, gradients), (own, _) in zip([rank[index] for rank in ranks], expected):
            torch.testing.assert_close(losses, own, rtol=1e-4, atol=1e-6)
            mean = {name: (expected[0][1][name] + expected[1][1][name]) / 2 for name in gradients}
            torch.testing.assert_close(gradients, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", families())
def test_all_is_trained_alike(pool, family):
    """With the detector's own losses."""
    ranks = pool.run(steps_of_this_process, "FeatureMimic", family, 1.0)
    for both in zip(*ranks):
        gradients = [gradients for _, gradients in both]
        assert same_everywhere(gradients)
        assert all(gradient.isfinite().all() for gradient in gradients[0].values())


@pytest.mark.parametrize("family", families())
def test_equal_images_give_the_bits_of_one_process(pool, family):
    alone = steps_of("PKD", family, 1.0, 0, lambda model: model)
    for found in pool.run(steps_on_equal_images, family):
        torch.testing.assert_close(found, alone, rtol=0, atol=0)
