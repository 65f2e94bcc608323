"""The gradients of a step's terms; measuring them leaves no trace."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from distill_d2 import Distiller, DistillLoss
from distill_d2.balance import weights_by_ratio
from distill_d2.gradients import acting_iteration, term_gradients, trained_backbone
from distill_d2.moving_numbers import settle
from distill_d2.testing import Cell, families, recipes
from distill_d2.testing.cells import gradients_of, losses_of, step

CASES = [
    ("PKD", "RetinaNet"),
    ("GID", "FCOS (AdelaiDet)"),
    ("InstanceConditionalDistillation", "Mask R-CNN"),
    ("SSDKD", "SSD"),
]


def cell(recipe, family):
    return Cell.of_recipe(recipes()[recipe], families()[family])


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients if g is not None]).norm().item()


@pytest.mark.parametrize("recipe, family", CASES)
def test_gradients_are_those_of_the_step_that_follows(recipe, family):
    batch, model = families()[family].batch(), cell(recipe, family).distiller()
    settle(model.student, batch)
    torch.manual_seed(1)  # as losses_of does
    before = torch.get_rng_state()
    measured = term_gradients(model, batch, iteration=0)
    assert torch.equal(before, torch.get_rng_state())
    losses = losses_of(model, batch)
    assert {name: term.value for name, term in measured.terms.items()} == pytest.approx(
        {name: loss.item() for name, loss in losses.items()}
    )
    (loss,) = measured.losses
    backbone = list(model.student.backbone.parameters())
    for owner, expected in (("", measured.task), (loss, measured.losses[loss])):
        total = sum(losses[name] for name, term in measured.terms.items() if term.loss == owner)
        gradients = torch.autograd.grad(total, backbone, retain_graph=True, allow_unused=True)
        assert norm(gradients) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("recipe, family", CASES[3:])
def test_measuring_between_steps_changes_nothing(recipe, family):
    batch = families()[family].batch()
    model, alone = cell(recipe, family).distiller(), cell(recipe, family).distiller()
    for each in (model, alone):
        if each is model:
            term_gradients(each, batch)
        step(each, batch)
        if each is model:
            term_gradients(each, batch)
    losses, expected = step(model, batch), step(alone, batch)
    assert {name: loss.item() for name, loss in losses.items()} == {
        name: loss.item() for name, loss in expected.items()
    }
    of_alone = gradients_of(alone)
    assert all(torch.equal(g, of_alone[name]) for name, g in gradients_of(model).items())
    buffers = dict(alone.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_new_retinanet_divides_by_the_positives_of_the_batch():
    """Not by a guess, so that the task's gradient does not grow with the number of images."""
    family = families()["RetinaNet"]
    model, batch = family.build(8).train(), family.batch()
    settle(model, batch)
    with EventStorage() as storage:
        model(batch)
    positives = storage.latest()["num_pos_anchors"][0] * len(batch)
    assert 1 < positives < 90 and model.loss_normalizer == pytest.approx(positives, rel=1e-4)
    once, twice = (term_gradients(model, images) for images in (batch, [*batch, *batch]))
    assert twice.task == pytest.approx(once.task, rel=1e-3)


def test_a_student_alone_has_only_its_own_terms():
    family = families()["RetinaNet"]
    measured = term_gradients(family.build(8).train(), family.batch())
    assert list(measured.terms) == ["loss_cls", "loss_box_reg"]
    assert measured.task > 0 and not measured.losses


def test_terms_are_measured_where_their_losses_act():
    model = cell("PKD", "RetinaNet").distiller()
    model.max_iter = 100
    model.losses["PKD"].factor = lambda iteration: min(max(iteration - 9, 0), 5) * 1.0
    assert acting_iteration(model) == 14
    family = families()["RetinaNet"]
    early = term_gradients(model, family.batch(), iteration=3)
    assert early.losses["PKD"] == 0 and early.ratio("PKD") == 0


class Linear(DistillLoss):
    """Gradients of 2 and 0.5 in each element of a tensor of the backbone."""

    def forward(self, student, teacher, batch):
        first = trained_backbone(student.model)[0].sum()
        return {"loss_linear": 2 * first, "loss_other": 0.5 * first}


@pytest.mark.parametrize("schedule", [{}, {"start_iter": 1}, {"warmup_iters": 9, "weight": 40.0}])
def test_weights_are_those_of_known_gradients(monkeypatch, schedule):
    """The task's is 3 in each element: 3 / (2 + 0.5) = 1.2, at full strength, with any WEIGHT."""
    own = Distiller._task_losses

    def task_losses(self, inputs):
        own(self, inputs)
        return {"loss_cls": 3 * trained_backbone(self)[0].sum()}

    monkeypatch.setattr(Distiller, "_task_losses", task_losses)
    family = families()["RetinaNet"]
    loss = Linear(gradient_ratio=0.5, **schedule)
    model, batch = Cell(family, loss).distiller(), family.batch()
    assert weights_by_ratio(model, ["Linear"], [batch, batch]) == {"Linear": 0.6}
    assert model.losses["Linear"].applied_weight == loss.settings.weight
    model.losses["Linear"].forward = lambda *_: {"loss_linear": torch.zeros((), requires_grad=True)}
    assert weights_by_ratio(model, ["Linear"], [batch]) == {"Linear": None}
