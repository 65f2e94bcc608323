"""The whole loss: against the naive version, its phases, and what must not matter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from icd_case import Case, close, compare_gradients, compare_losses

from distill_d2.distiller import Distiller
from distill_d2.losses.icd import InstanceConditionalDistillation
from distill_d2.teacher import Teacher
from distill_d2.testing.tiny import tiny_batch, tiny_config

STATISTICS = SimpleNamespace(
    counts=np.array([5, 1, 0, 9, 2, 2, 40]),
    mean=np.linspace(0.1, 0.6, 14).reshape(7, 2),
    std=np.linspace(0.15, 0.02, 14).reshape(7, 2),
)

# The naive version

SHAPES = {
    "two_images": {},
    "one_image": {"instances": (4,), "sizes": ((61, 127),)},
    "an_empty_image": {"instances": (2, 0, 3)},
    "nothing": {"instances": (0, 0)},
    "no_padding": {"sizes": ((64, 128), (64, 128))},
    "three_levels": {"strides": (8, 16, 32)},
    "many": {"instances": (1, 9), "num_neg_pos_ratio": 2.0, "max_labels": 6},
    "large": {"padded": (160, 96), "sizes": ((155, 80), (130, 96)), "strides": (16, 32)},
    "statistics": {"statistics": STATISTICS, "instances": (1, 4)},
}
SETTINGS = {
    "no_pos": {"use_pos_embedding": False},
    "no_projector": {"project_pos": False},
    "no_projector_on_v": {"project_pos": False, "decoder_posemb_on_v": True},
    "pos_on_v": {"decoder_posemb_on_v": True},
    "pos_on_v_l1": {"decoder_posemb_on_v": True, "loss_form": "l1"},
    "negative": {"distill_negative": True},
    "temperature": {"temp_value": 2.5},
    "decay": {"temp_value": 3.0, "temp_decay": True, "temp_decay_to": 0.5},
    "reconstruction": {"value_reconst": 1.0},
    "reconstruction_2": {"value_reconst": 0.1, "att_layers": 2},
    "no_scale": {"add_scale_indicator": False},
    "fixed": {"sample_rule": "fixed", "num_labels": 9},
    "heads": {"hidden_dim": 24, "att_heads": 2},
    "one_head": {"att_heads": 1},
    "confidence": {"confidence_loss_weight": 0.3, "weight_value": 2.0, "sample_range": 0.1},
    "l1": {"loss_form": "l1"},
    "smoothL1_tln": {"loss_form": "smoothL1", "distill_norm": "tln"},
    "L2_none": {"loss_form": "L2", "distill_norm": "none"},
    "bugs": {"reference_bugs": True, "sizes": ((60, 90), (400, 600)), "padded": (416, 608)},
    "bugs_learnable": {"reference_bugs": True, "temp_value": -1.0},
    "no_pos_on_v": {"use_pos_embedding": False, "decoder_posemb_on_v": True},
    "layers_0_negative": {"att_layers": 0, "distill_negative": True, "temp_value": 2.0},
}


def compare_with_naive(case, distil=True):
    terms = case.step()
    icd, out, student = case.naive(distil)
    compare_losses(terms, out["losses"])
    compare_gradients(case, icd, student)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_naive_loss_and_gradients(shape, layers):
    compare_with_naive(Case(seed=11 + layers, att_layers=layers, **SHAPES[shape]))


@pytest.mark.parametrize("settings", SETTINGS)
def test_naive_settings(settings):
    compare_with_naive(Case(seed=5, **SETTINGS[settings]))


def test_naive_reconstruction_of_values_with_positions():
    """Compared without padding: the reference has another embedding there, and nothing else reads it."""
    sizes = ((64, 128), (64, 128))
    compare_with_naive(Case(sizes=sizes, value_reconst=1.0, att_layers=2, decoder_posemb_on_v=True))


@pytest.mark.parametrize("channels", [(16, 12), (12, 16), (10, 12)], ids=str)
def test_naive_loss_after_the_adapters(channels):
    case = Case(channels=channels)
    compare_with_naive(case)
    assert bool(len(case.loss.pairs.adapters)) == (channels[0] != 16)
    assert bool(len(case.loss.pairs.teacher_adapters)) == (channels[1] != 16)
    assert all(p.grad.abs().max() > 0 for p in case.loss.pairs.parameters())
    assert all(level.grad is None for level in case.teacher.values())


@pytest.mark.parametrize("seed", range(20, 26))
def test_naive_loss_on_random_sizes(seed):
    """Images, padding, instances, levels and channels by chance."""
    random = np.random.default_rng(seed)
    images = int(random.integers(1, 4))
    padded = tuple(32 * random.integers(2, 6, 2))
    sizes = [tuple(int(side) - int(random.integers(0, 31)) for side in padded) for _ in range(images)]
    case = Case(
        seed=seed,
        sizes=sizes,
        padded=tuple(map(int, padded)),
        instances=random.integers(0, 6, images).tolist(),
        strides=(8, 16, 32)[int(random.integers(0, 3)) :],
        channels=tuple(random.choice([0, 5], 2).tolist()),
        att_layers=int(random.integers(0, 3)),
        att_heads=int(random.choice([1, 2, 4])),
        num_neg_pos_ratio=float(random.choice([0.0, 1.5, 5.0])),
    )
    compare_with_naive(case)


def test_boxes_without_area_are_ignored():
    case, other = Case(), Case()
    terms = case.step()
    for index, (height, width) in enumerate(other.sizes):
        flat = Instances((height, width))
        boxes = [[3.0, 4, 3, 20], [5, 8, 30, 8], [9, 9, 9, 9], [20, 20, 10, 10]]
        flat.gt_boxes = Boxes(torch.tensor(boxes))
        flat.gt_classes = torch.tensor([1, 2, 3, 4])
        other.instances[index] = Instances.cat([flat[:2], other.instances[index], flat[2:]])
    for name, term in other.step().items():
        close(term, terms[name], name)


def test_only_boxes_without_area_are_none():
    case = Case(instances=(1, 1))
    for instances in case.instances:
        instances.gt_boxes.tensor[:, 2:] = instances.gt_boxes.tensor[:, :2]
    terms = case.step()
    assert terms["loss_icd_reg_0"] == 0 and terms["loss_icd_value"] == 0
    assert all(term.isfinite() for term in terms.values())


# Ground truth


@pytest.mark.parametrize("classes", [[7], [-1], [0, 3, 8]])
def test_classes_outside_are_an_error(classes):
    case = Case(instances=(len(classes), 1))
    case.instances[0].gt_classes = torch.tensor(classes)
    with pytest.raises(ValueError, match=r"MODEL.DISTILLER.INS.NUM_CLASSES is 7 \(classes 0 to 6\)"):
        case.forward()


def test_unlabeled_image_is_an_error():
    case = Case()
    batch = case.batch()
    del batch.inputs[1]["instances"]
    batch.inputs[1]["file_name"] = "some.jpg"
    with pytest.raises(KeyError, match="some.jpg' has no annotations"):
        case.loss(*case.views(), batch)


# Phases

ADAPTED = {"equal": {}, "adapted": {"channels": (10, 12)}}


def learning(parameters):
    return [p.grad is not None and bool(p.grad.any()) for p in parameters]


def students_side(loss):
    return [*loss.student.parameters(), *loss.pairs.adapters.parameters()]


def jointly_trained(loss):
    return [*loss.queries.parameters(), *loss.decoder.parameters(), *loss.auxiliary.parameters()]


BOUNDS = [((5, 99), True), ((6, 99), False), ((0, 5), True), ((0, 4), False)]


@pytest.mark.parametrize("channels", ADAPTED)
@pytest.mark.parametrize("bounds, feels", BOUNDS)
def test_student_feels_the_loss_between_its_bounds(bounds, feels, channels):
    """At iteration 5. Outside the student's maps get nothing, but its side of the loss learns."""
    first, last = bounds
    case = Case(bypass_distill=first, bypass_distill_after=last, **ADAPTED[channels])
    terms, always = case.step(), Case(**ADAPTED[channels])
    always.loss.load_state_dict(case.loss.state_dict())
    for name, term in always.step().items():
        close(terms[name], term, name)
    gradients = case.student_gradients().values()
    assert all((gradient is not None) == feels for gradient in gradients)
    assert all(learning(students_side(case.loss)))
    for (name, parameter), other in zip(case.loss.named_parameters(), always.loss.parameters()):
        close(parameter.grad, other.grad, name)


ARCHITECTURES = [{}, {"att_layers": 2, "value_reconst": 1.0}, {"att_layers": 0}]


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_naive_loss_before_distillation(settings):
    case = Case(bypass_distill=6, **settings)
    terms = case.step()
    _, out, student = case.naive(distil=False)
    compare_losses(terms, out["losses"])
    assert all(gradient is None for gradient in student.values())


@pytest.mark.parametrize("channels", ADAPTED)
def test_stopped_joint_training(channels):
    case, running = Case(stop_joint=4, **ADAPTED[channels]), Case(**ADAPTED[channels])
    running.loss.load_state_dict(case.loss.state_dict())
    terms = case.step()
    for name, term in running.step().items():
        close(terms[name], term, name)
    frozen = [*jointly_trained(case.loss), *case.loss.pairs.teacher_adapters.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in frozen)
    assert all(learning(students_side(case.loss)))
    assert {id(p) for p in case.loss.frozen_parameters(5)} == {id(p) for p in frozen}
    assert len(case.loss.frozen_parameters(5)) == len(frozen)
    for name, level in running.student.items():
        close(case.student[name].grad, level.grad, name)


def test_joint_training_stops_after_the_iteration():
    case = Case(stop_joint=5)
    assert case.loss.frozen_parameters(5) == [] and case.loss.solver_advances(5)
    assert case.loss.frozen_parameters(6) != [] and not case.loss.solver_advances(6)
    case.step(5)
    assert any(learning(jointly_trained(case.loss)))
    case.step(6)
    assert not any(learning(jointly_trained(case.loss)))


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_pretraining_is_the_auxiliary_task(settings):
    case = Case(iteration=-1, **settings)
    terms = case.pretrain()
    names = {name for name in case.forward() if name != "loss_icd_value"}
    assert set(terms) == names
    _, out, _ = case.naive()
    out["losses"].pop("distill.0.matt.value")
    compare_losses(terms, out["losses"])
    assert all(level.grad is None for level in case.student.values())
    frozen, students = case.loss.frozen_parameters(-1), students_side(case.loss)
    assert len(frozen) == len(students) and {id(p) for p in frozen} == {id(p) for p in students}
    assert not any(learning(frozen))
    assert any(learning(jointly_trained(case.loss)))


PHASES = {
    "before": ({"bypass_distill": 6}, "step"),
    "distilling": ({}, "step"),
    "after": ({"bypass_distill_after": 4}, "step"),
    "stopped": ({"stop_joint": 4}, "step"),
    "stopped_before": ({"stop_joint": 4, "bypass_distill": 6}, "step"),
    "pretrain": ({}, "pretrain"),
    "no_value": ({"weight_value": 0.0}, "step"),
    "no_value_stopped": ({"weight_value": 0.0, "stop_joint": 4}, "step"),
    "no_value_pretrain": ({"weight_value": 0.0}, "pretrain"),
}
KINDS = {
    "plain": {},
    "no_pos": {"use_pos_embedding": False},
    "no_projector_on_v": {"project_pos": False, "decoder_posemb_on_v": True},
    "layers": {"att_layers": 2, "value_reconst": 1.0, "decoder_posemb_on_v": True},
    "bare_empty": {"att_layers": 0, "instances": (0, 0)},
    "adapted": {"channels": (10, 12)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", PHASES)
def test_every_parameter_gets_a_gradient(phase, kind):
    """What DistributedDataParallel needs of each step (law 8). In pretraining the Distiller sees to
    those that are frozen."""
    settings, part = PHASES[phase]
    case = Case(**settings, **KINDS[kind])
    getattr(case, part)()
    frozen = {id(p) for p in case.loss.frozen_parameters(-1)} if part == "pretrain" else ()
    trained = [(name, p) for name, p in case.loss.named_parameters() if p.requires_grad]
    missing = [name for name, p in trained if p.grad is None and id(p) not in frozen]
    assert trained and not missing


def test_no_value_loss_without_weight():
    case = Case(weight_value=0.0)
    terms = case.step()
    assert "loss_icd_value" not in terms
    assert all(level.grad is None for level in case.student.values())


# Temperature


def test_learnable_temperature_of_the_reference_is_one():
    case, one = Case(temp_value=-2.0, reference_bugs=True), Case(reference_bugs=True)
    terms, expected = case.step(), one.step()
    assert terms.pop("loss_icd_temperature") == 1
    assert terms.keys() == expected.keys()
    assert all(torch.equal(terms[name], expected[name]) for name in terms)


# In a Distiller


def distiller(tmp_path, family="retinanet", teacher_classes=5, **settings):
    """A student of 3 classes and 16 channels, a teacher of others and 24 channels."""
    teacher = tiny_config("retinanet" if family == "retinanet" else "faster", width=16, channels=24)
    teacher.MODEL.RETINANET.NUM_CLASSES = teacher.MODEL.ROI_HEADS.NUM_CLASSES = teacher_classes
    settings = {"hidden_dim": 12, "att_heads": 3, "bypass_distill": 0, **settings}
    return Distiller(
        student=build_model(tiny_config(family)),
        teacher=Teacher(build_model(teacher)),
        losses=[InstanceConditionalDistillation(**settings)],
        max_iter=4,
    )


def step(model, batch):
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_detectors_of_other_channels_and_classes(tmp_path, caplog, family):
    with caplog.at_level("INFO"):
        model = distiller(tmp_path, family).train()
    loss = model.losses["InstanceConditionalDistillation"]
    levels = list(model.student.backbone.output_shape())
    assert loss.queries.classes == 3
    assert list(loss.pairs.adapters) == list(loss.pairs.teacher_adapters) == levels
    assert caplog.text.count("1x1 convolution of each") == len(levels)
    assert "| InstanceConditionalDistillation | p3 " in caplog.text

    terms = step(model, tiny_batch())
    assert {"loss_icd_conf_0", "loss_icd_reg_0", "loss_icd_value"} < set(terms)
    assert all(term.isfinite() for term in terms.values())
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_student_does_not_feel_bypassed_distillation(tmp_path):
    """Its gradients are then those of its own losses."""
    model = distiller(tmp_path, bypass_distill=1)
    torch.manual_seed(0)
    step(model, tiny_batch())
    distilled = [p.grad.clone() for p in model.student.parameters()]
    model.student.zero_grad()
    model.student.loss_normalizer = 100
    with EventStorage(0):
        sum(model.student(tiny_batch()).values()).backward()
    for actual, expected in zip(distilled, (p.grad for p in model.student.parameters())):
        torch.testing.assert_close(actual, expected)
