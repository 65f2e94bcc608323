"""GHND against literals and a naive version, and in the Distiller: what it reads, reaches and costs."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from distill_d2.projects.ghnd import BottleneckStage

from distill_d2 import Distiller, Teacher
from distill_d2.losses.ghnd import GHND
from distill_d2.testing import maps
from distill_d2.testing.maps import plane
from distill_d2.testing.synchronization import no_synchronization
from distill_d2.testing.tiny import tiny_batch, tiny_config

S, T = plane([1, 2], [3, 4]), plane([1, 4], [3, 3.5])  # differences 0, -2, 0, 0.5
STAGES = ("res2", "res3", "res4", "res5")
SHAPES = {"res2": (2, 4, 6, 5), "res3": (2, 3, 3, 3), "res4": (2, 5, 2, 1), "res5": (2, 7, 1, 1)}


def random_maps(seed, requires_grad=False):
    random = np.random.default_rng(seed)
    return {
        name: torch.tensor(random.normal(size=shape), dtype=torch.float32, requires_grad=requires_grad)
        for name, shape in SHAPES.items()
    }


def compare(loss, student, teacher):
    """The terms of a loss on these maps, of which "res2" has stride 4."""
    return maps.compare(loss, student, teacher, {name: 2 ** int(name[-1]) for name in student})


def naive(student, teacher, weights):
    """By number: the terms, and their gradients with respect to the student's maps."""
    terms, gradients = {}, {}
    for (name, student_level), teacher_level, weight in zip(student.items(), teacher.values(), weights):
        gradients[name] = np.zeros(student_level.shape)
        terms[f"loss_ghnd_{name}"] = 0.0
        for place in np.ndindex(*student_level.shape):
            difference = student_level[place].item() - teacher_level[place].item()
            terms[f"loss_ghnd_{name}"] += weight * difference**2
            gradients[name][place] = 2 * weight * difference
    return terms, gradients


# The formula


def test_literal():
    terms = compare(GHND(in_features=["res2"]), {"res2": S}, {"res2": T})
    assert {name: term.item() for name, term in terms.items()} == {"loss_ghnd_res2": 4.25}


@pytest.mark.parametrize("weights", [(), (1, 1, 1, 1), (0.5, 0, 3, 2)])
def test_naive(weights):
    student, teacher = random_maps(0, requires_grad=True), random_maps(1)
    terms = compare(GHND(stage_weights=weights), student, teacher)
    sum(terms.values()).backward()
    expected, gradients = naive(student, teacher, weights or (1, 1, 1, 1))
    assert list(terms) == list(expected)
    for name, term in terms.items():
        assert term.shape == () and term.item() == pytest.approx(expected[name], rel=1e-6)
    for name, feature in student.items():
        np.testing.assert_allclose(feature.grad.numpy(), gradients[name], rtol=1e-5, atol=1e-6)


def test_weights_belong_to_the_names_in_their_order():
    student, teacher = random_maps(0), random_maps(1)
    loss = GHND(in_features=["res4", "res2"], stage_weights=[10, 0.1])
    terms = compare(loss, student, teacher)
    plain = compare(GHND(), student, teacher)
    assert list(terms) == ["loss_ghnd_res4", "loss_ghnd_res2"]
    assert terms["loss_ghnd_res4"].item() == pytest.approx(10 * plain["loss_ghnd_res4"].item())
    assert terms["loss_ghnd_res2"].item() == pytest.approx(0.1 * plain["loss_ghnd_res2"].item())


def test_levels_of_the_neck():
    terms = compare(GHND(in_features=["p3"]), {"p3": S}, {"p3": T})
    assert terms["loss_ghnd_p3"].item() == 4.25


# Wrong settings


@pytest.mark.parametrize("weights", [(1.0,), (1.0,) * 5, (1, 1, -0.1, 1), (1, float("nan"), 1, 1)])
def test_weights_that_do_not_fit(weights):
    message = r"MODEL\.DISTILLER\.GHND\.STAGE_WEIGHTS is .*; expected a (finite number.* for each|list)"
    with pytest.raises(ValueError, match=message):
        GHND(stage_weights=weights)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_half_maps(dtype, size):
    """Sums of float32: more than the largest float16, 65504, and not its digits."""
    student, teacher = (size * torch.randn(1, 64, 32, 32) for _ in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = compare(GHND(in_features=["res2"]), {"res2": student}, {"res2": teacher})
    (term,) = terms.values()
    expected = (student.double() - teacher.double()).pow(2).sum()
    assert term.dtype == torch.float32 and expected > 65504
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    term.backward()
    assert student.grad.isfinite().all() and student.grad.any()


# In the Distiller


def bottleneck_distiller(**settings):
    """A student with a bottleneck, and its teacher; neither has a stage after res4."""
    cfg = tiny_config()
    teacher = Teacher(build_model(cfg))
    cfg.MODEL.BOTTLENECK.BACKBONE = cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.BACKBONE.NAME = "build_bottleneck_backbone"
    student = build_model(cfg)
    loss = GHND(in_features=STAGES[:3])
    settings = {"task_loss_weight": 0.0, **settings}
    return Distiller(student=student, teacher=teacher, losses=[loss], **settings).train()


def pictures():
    """A batch without ground truth."""
    return [{"image": item["image"]} for item in tiny_batch()]


def test_no_ground_truth_is_read():
    with_truth, without = bottleneck_distiller(), bottleneck_distiller()
    without.load_state_dict(with_truth.state_dict())
    without.teacher.model.load_state_dict(with_truth.teacher.model.state_dict())
    terms, expected = without(pictures()), with_truth(tiny_batch())
    assert list(terms) == [f"loss_ghnd_{name}" for name in STAGES[:3]]
    assert terms == expected and all(term > 0 for term in terms.values())


def test_terms_are_those_of_the_stages():
    distiller = bottleneck_distiller()
    terms = distiller(pictures())
    x = distiller.student.preprocess_image(pictures()).tensor
    with torch.no_grad():
        student, teacher = (
            m.backbone.bottom_up(x) for m in (distiller.student, distiller.teacher.model)
        )
    assert list(student) == list(STAGES[:3])
    for name, level in student.items():
        expected = (level - teacher[name]).double().pow(2).sum()
        assert terms[f"loss_ghnd_{name}"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_hnd_reaches_the_first_stage_alone():
    cfg = tiny_config()
    losses = [GHND(in_features=["res2"])]
    distiller = Distiller(
        student=build_model(cfg), teacher=Teacher(build_model(cfg)), losses=losses, task_loss_weight=0.0
    )
    sum(distiller.train()(pictures()).values()).backward()
    reached = [n for n, p in distiller.student.named_parameters() if p.grad is not None]
    assert {name.split(".")[2] for name in reached} == {"stem", "res2"}


@pytest.mark.parametrize("bits", [0, 8, 16])
@pytest.mark.parametrize("training", [True, False])
def test_a_bottleneck_does_not_synchronize(bits, training):
    stage = BottleneckStage(6, 7, quant_bits=bits).train(training)
    x = torch.randn(2, 6, 5, 4)
    with no_synchronization():
        stage(x).sum().backward()
