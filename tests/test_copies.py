"""Law 2: copies and pickles of the Distiller and of its student; nothing stays behind."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from detectron2.modeling import build_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distill_d2.distiller import Distiller
from distill_d2.losses import build_losses
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing import step
from distill_d2.testing.tiny import tiny_batch, tiny_config, tiny_detector

ICD = "InstanceConditionalDistillation"


def distiller(types=("PKD", "FeatureMimic", ICD)):
    """With adapters, a head that is read, and a loss with parameters of its own."""
    node = tiny_config().MODEL.DISTILLER
    node.TYPES, node.INS.HIDDEN_DIM, node.INS.ATT_HEADS = list(types), 16, 4
    torch.manual_seed(0)
    return Distiller(
        student=build_model(tiny_config()),
        teacher=Teacher(tiny_detector("retinanet", width=16, channels=24)),
        losses=build_losses(node),
        max_iter=4,
    ).train()


def hooks_of(model):
    modules = list(model.modules())
    return [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_copied_distiller_trains_on_its_own(how, stepped):
    model = distiller()
    if stepped:
        step(model, tiny_batch())
        model._steps = 0
    model.student.loss_normalizer = 100
    twin = how(model)
    expected = step(model, tiny_batch())
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    actual = step(twin, tiny_batch())
    assert list(actual) == list(expected) and all(torch.equal(actual[n], expected[n]) for n in actual)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert not set(model.parameters()) & set(twin.parameters())


@pytest.mark.parametrize("part", ["distiller", "student"])
def test_moving_averages(part):
    model = distiller(["PKD"])
    averaged_part = model if part == "distiller" else model.student
    averaged = AveragedModel(averaged_part, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    start = [p.detach().clone() for p in averaged_part.parameters()]
    averaged.update_parameters(averaged_part)  # the first is a copy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, tiny_batch())
    optimizer.step()
    averaged.update_parameters(averaged_part)
    for mean, first, last in zip(averaged.module.parameters(), start, averaged_part.parameters()):
        torch.testing.assert_close(mean, (first + last) / 2)
    assert len(averaged.module.eval()(tiny_batch())) == 2
    if part == "distiller":
        assert step(averaged.module.train(), tiny_batch())["loss_pkd"].isfinite()


def test_the_student_carries_nothing_away():
    """No hooks of the Distiller, no teacher, no losses; hooks of others stay."""
    model, calls = distiller(), []
    step(model, tiny_batch())
    student, size = through_a_file(model.student), len(pickle.dumps(build_model(tiny_config())))
    assert not hooks_of(model.student) and not hooks_of(student) and not hooks_of(model.teacher.model)
    assert abs(len(pickle.dumps(model.student)) - size) < 0.02 * size
    model.student.backbone.register_forward_hook(lambda *_: calls.append(1))
    step(model, tiny_batch())
    model.release()
    assert calls == [1] and len(hooks_of(model.student)) == 1


def test_hooks_go_after_a_step_that_fails():
    model = distiller(["PKD"])
    model.losses["PKD"].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(model, tiny_batch())
    assert not hooks_of(model.student) and not hooks_of(model.teacher.model)
    del model.losses["PKD"].forward
    assert step(model, tiny_batch())["loss_pkd"] > 0


def test_building_many_leaks_nothing():
    student, detector, dead = tiny_detector(), tiny_detector(), []
    for _ in range(5):
        model = Distiller(student=student, teacher=Teacher(detector), losses=[PKD()]).train()
        step(model, tiny_batch())
        parts = (model, model.teacher, model.teacher.view, model.student_view, model.teacher.view.model)
        dead += [weakref.ref(part) for part in parts]
        del model, parts
    gc.collect()
    assert not any(reference() for reference in dead)
    assert not hooks_of(student) and not hooks_of(detector)
