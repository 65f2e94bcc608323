"""SSDKD in a Distiller of real detectors: whole steps, numbers from what the heads computed, the weights
of the student's own losses, and which detectors it refuses."""

import copy
import functools
import math

import naive_ssd as ssd
import naive_ssd_kd as naive
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.sampling import subsample_labels
from detectron2.utils.events import EventStorage
from recorded import detector
from ssd_case import batch as ssd_batch
from ssd_case import ssd as ssd_model

from distill_d2.distiller import Distiller
from distill_d2.losses.ssd_kd import SSDKD
from distill_d2.teacher import Teacher
from distill_d2.testing import intercepted
from distill_d2.testing.tiny import tiny_batch, tiny_detector
from distill_d2.views import Batch, Predictions, build_view

ONE_STAGE = {f"loss_ssd_kd_{name}" for name in ("soft", "bounded", "hint")}
TWO_STAGE = ONE_STAGE | {f"loss_ssd_kd_{name}_rpn" for name in ("soft", "bounded")}
OWN = {"ssd": {"loss_cls", "loss_box_reg"}}
OWN["faster"] = OWN["ssd"] | {"loss_rpn_cls", "loss_rpn_loc"}
OWN["mask"] = OWN["faster"] | {"loss_mask"}
TERMS = {"ssd": ONE_STAGE, "faster": TWO_STAGE, "mask": TWO_STAGE}
FAMILIES = list(TERMS)


@functools.cache
def _ssds():
    """The narrowest student and teacher, whose norms in evaluation do something."""
    models = []
    for seed, (network, width) in enumerate((("C", 0.125), ("B", 0.0625))):
        torch.manual_seed(seed)
        model = ssd_model(network, WIDTH=width)
        for name, tensor in model.state_dict().items():
            if "running" in name:
                tensor.uniform_(*((0.5, 1.5) if name.endswith("var") else (-0.1, 0.1)))
        models.append(model)
    return models


def models_of(family):
    if family == "ssd":
        return [copy.deepcopy(model) for model in _ssds()]
    return [detector(family), detector(family)]


def distiller(family, *losses, models=None, **options):
    student, teacher = models or models_of(family)
    kind = {"input_format": "RGB"} if family == "ssd" else {}
    teacher = Teacher(teacher, **kind)
    return Distiller(student=student, teacher=teacher, losses=losses, **kind, **options).train()


def inputs_of(family, objects=2):
    if family == "ssd":
        return ssd_batch(objects, objects)
    return tiny_batch(masks=family == "mask", objects=objects)


def step(model, inputs, iteration=0):
    torch.manual_seed(7)  # what detectron2 samples
    with EventStorage(iteration):
        losses = model(inputs)
    sum(losses.values()).backward()
    return losses


# The student's own losses, and which terms there are


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_that_are_off(family):
    model = distiller(family, SSDKD(mu=1.0, nu=0.0))
    assert set(step(model, inputs_of(family))) == OWN[family] | {"loss_ssd_kd_hint"}


def plain(student, inputs):
    """The losses of a student without a Distiller."""
    torch.manual_seed(7)
    with EventStorage(0):
        return copy.deepcopy(student).train()(copy.deepcopy(inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_students_own_losses(family):
    model, inputs = distiller(family, SSDKD(mu=0.25, lmda=3.0, weight=0.1)), inputs_of(family)
    expected, losses = plain(model.student, inputs), step(model, inputs)
    factors = {"loss_cls": 0.25, "loss_rpn_cls": 0.25, "loss_box_reg": 3.0, "loss_rpn_loc": 3.0}
    for name in OWN[family]:
        assert losses[name].item() == pytest.approx(factors.get(name, 1.0) * expected[name].item())
        assert expected[name] > 0


@pytest.mark.parametrize("family", ["ssd", "faster"])
@pytest.mark.parametrize("off", [{"weight": 0.0}, {"start_iter": 1}])
def test_not_while_the_loss_is_off(family, off):
    """Bit for bit."""
    model, inputs = distiller(family, SSDKD(gamma=0.0, mu=0.25, lmda=3.0, **off)), inputs_of(family)
    expected, losses = plain(model.student, inputs), step(model, inputs)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)
    if "start_iter" in off:
        expected, losses = plain(model.student, inputs), step(model, inputs, iteration=1)
        assert losses["loss_cls"].item() == pytest.approx(0.25 * expected["loss_cls"].item())
        assert set(losses) == OWN[family] | TERMS[family] - {"loss_ssd_kd_hint"}


def test_together_with_the_weight_of_all_own_losses():
    model = distiller("ssd", SSDKD(mu=0.25), task_loss_weight=2.0)
    inputs = inputs_of("ssd")
    expected, losses = plain(model.student, inputs), step(model, inputs)
    assert losses["loss_cls"].item() == pytest.approx(0.5 * expected["loss_cls"].item())
    assert losses["loss_box_reg"].item() == pytest.approx(2 * expected["loss_box_reg"].item())


# Features


@pytest.mark.parametrize("form", ["L2", "L1"])
def test_hint_of_features(form):
    model, found = distiller("faster", SSDKD(hint_form=form, gamma=0.7)), []

    def spy(forward, student, teacher, batch):
        distance = {"L2": F.mse_loss, "L1": F.l1_loss}[form]
        for name, level in student.features.items():
            adapter = model.losses["SSDKD"].pairs.adapters[name]
            assert adapter.kernel_size == (1, 1)  # though the channels agree
            found.append(distance(adapter(level), teacher.features[name]).item())
        return forward(student, teacher, batch)

    with intercepted(model.losses["SSDKD"], spy):
        losses = step(model, inputs_of("faster"))
    assert len(found) == 5
    assert losses["loss_ssd_kd_hint"].item() == pytest.approx(0.7 * sum(found), rel=1e-5)


def test_levels_of_the_hint():
    model = distiller("ssd", SSDKD(in_features=["s32", "s64"]))
    assert list(model.losses["SSDKD"].pairs.adapters) == ["s32", "s64"]
    with pytest.raises(KeyError, match=r"SSD_KD\.IN_FEATURES: the student \(SSD\) has no level 'p9'"):
        distiller("ssd", SSDKD(in_features=["p9"]))


# Two-stage detectors, by loops


def test_rows_of_the_box_head():
    """With as many proposals as there are, a different number per image."""
    model = distiller("faster", SSDKD(mu=0.4, lmda=2.0, hint="logits", temperature=2.0))
    model.student.roi_heads.batch_size_per_image = 512
    inputs, expected = inputs_of("faster"), {}
    inputs[1]["instances"] = inputs[1]["instances"][:0]

    def spy(forward, student, teacher, batch):
        sampled, _ = student.taps.output("roi_heads")
        boxes = [image.proposal_boxes for image in sampled]
        student_outputs = student.own_output("roi_heads.box_predictor")
        teacher_outputs = [torch.cat(parts) for parts in teacher.score_boxes(boxes)]
        rows = sum(map(len, boxes))
        assert len({len(image) for image in boxes}) == 2
        truth = []
        for image in sampled:
            for index in range(len(image)):
                label = int(image.gt_classes[index])
                box = image.gt_boxes.tensor[index].tolist() if label < 3 else None
                truth.append((label, box, image.proposal_boxes.tensor[index].tolist()))
        soft = bound = hint = 0.0
        for row, (label, box, proposal) in enumerate(truth):
            logits = student_outputs[0][row].tolist(), teacher_outputs[0][row].tolist()
            soft += naive.soft(*logits, [1.0, 1.0, 1.0, 1.5], 2.0)[0]
            hint += naive.squared(*logits)
            if box is not None:
                part = slice(4 * label, 4 * label + 4)
                pair = student_outputs[1][row, part].tolist(), teacher_outputs[1][row, part].tolist()
                bound += naive.bound_per_box(*pair, ssd.encode(box, proposal), 0.0)
        of_rpn = (student.rpn().logits - teacher.rpn().logits).square().mean().item()
        expected["soft"] = 0.6 * soft / rows
        expected["bounded"] = 2 * 0.5 * bound / rows
        expected["hint"] = 0.5 * (hint / rows / 4 + of_rpn)
        return forward(student, teacher, batch)

    with intercepted(model.losses["SSDKD"], spy):
        losses = step(model, inputs)
    for name, value in expected.items():
        assert value > 0 and losses[f"loss_ssd_kd_{name}"].item() == pytest.approx(value, rel=1e-4), name


def test_all_anchors_of_the_rpn():
    """Sampled as its own loss does, without chance."""
    models = models_of("faster")
    rpn = models[0].proposal_generator
    rpn.batch_size_per_image, rpn.positive_fraction = 3000, 1.0
    model, expected = distiller("faster", SSDKD(mu=0.4, lmda=2.0, margin=0.1), models=models), {}

    def spy(forward, student, teacher, batch):
        student_rpn, teacher_rpn = student.rpn(), teacher.rpn()
        anchors = rpn.anchor_generator([student.features[name] for name in rpn.in_features])
        labels, boxes = rpn.label_and_sample_anchors(anchors, batch.instances())
        soft = bound = 0.0
        for image, of_image in enumerate(labels):
            for row in (of_image >= 0).nonzero().flatten().tolist():
                pair = student_rpn.logits[image, row].item(), teacher_rpn.logits[image, row].item()
                soft += naive.soft_of_object(*pair, 1.0, 1.5)
                if of_image[row] == 1:
                    wanted = rpn.box2box_transform.get_deltas(
                        student_rpn.anchors[row][None], boxes[image][row][None]
                    )
                    rows = (student_rpn.deltas[image, row], teacher_rpn.deltas[image, row], wanted[0])
                    bound += naive.bound_per_box(*(x.tolist() for x in rows), 0.1)
        assert (labels[0] == 1).sum() > 2
        expected["soft_rpn"] = 0.6 * soft / 3000 / len(labels)
        expected["bounded_rpn"] = 2 * 0.5 * bound / 3000 / len(labels)
        return forward(student, teacher, batch)

    with intercepted(model.losses["SSDKD"], spy):
        losses = step(model, inputs_of("faster", objects=5))
    for name, value in expected.items():
        assert value > 0 and losses[f"loss_ssd_kd_{name}"].item() == pytest.approx(value, rel=1e-4), name


class Anchors:
    """An RPN's predictions for rows of given labels, in the place of a view."""

    def __init__(self, seed, labels):
        generator = torch.Generator().manual_seed(seed)
        shape = labels.shape
        self.logits = torch.randn(*shape, 1, generator=generator)
        self.deltas = torch.randn(*shape, 4, generator=generator)
        self.labels = labels

    def rpn(self):
        return Predictions(
            logit_levels=[self.logits.unsqueeze(2)],
            delta_levels=[self.deltas.unsqueeze(2)],
            anchors=torch.zeros(self.labels.shape[1], 4),
            decode=None,
            match=lambda boxes, valid: self.labels.to(torch.int8),
            encode=lambda boxes, anchors: torch.zeros_like(boxes),
            assign=lambda boxes, valid: torch.zeros_like(self.labels),
        )


@pytest.mark.parametrize(
    "positive, negative, ignored",
    [
        ((3, 5), (40, 60), 9),
        ((12, 2), (30, 40), 0),  # more objects than are taken
        ((3, 12), (6, 5), 4),  # and fewer negatives than there is room for
        ((0, 0), (40, 9), 3),
        ((9, 1), (0, 0), 1),
    ],
)
def test_what_an_rpn_samples_on_average(positive, negative, ignored):
    """detectron2's own sampling, many times."""
    view = build_view(detector("faster"), "student")
    rpn = view.model.proposal_generator
    rpn.batch_size_per_image, rpn.positive_fraction = 16, 0.4  # 6 objects
    loss = SSDKD(gamma=0.0, margin=0.5)
    loss.bind(view, build_view(detector("faster"), "teacher"))
    loss.heads = ["rpn"]
    length = max(map(sum, zip(positive, negative))) + ignored
    labels = torch.full((2, length), -1)
    for row, objects, others in zip(labels, positive, negative):
        order = torch.randperm(length)
        row[order[:objects]] = 1
        row[order[objects : objects + others]] = 0
    student, teacher = Anchors(1, labels), Anchors(2, labels)
    inputs = tiny_batch()
    terms = loss(student, teacher, Batch(inputs, (64, 64), 0, 1))

    rows = {"soft_rpn": torch.zeros(2, length), "bounded_rpn": torch.zeros(2, length)}
    for image, row in (labels >= 0).nonzero().tolist():
        pair = student.logits[image, row].item(), teacher.logits[image, row].item()
        rows["soft_rpn"][image, row] = 0.5 * naive.soft_of_object(*pair, 1.0, 1.5)
        if labels[image, row] == 1:
            boxes = student.deltas[image, row].tolist(), teacher.deltas[image, row].tolist(), [0.0] * 4
            rows["bounded_rpn"][image, row] = 0.5 * naive.bound_per_box(*boxes, 0.5)
    draws = {name: [] for name in rows}
    for _ in range(1200):
        chosen = [subsample_labels(row, 16, 0.4, 0) for row in labels]
        for name, values in rows.items():
            total = sum(values[i][torch.cat(index)].sum() for i, index in enumerate(chosen))
            draws[name].append(total / 32)
    for name, values in draws.items():
        values, term = torch.stack(values), terms[f"loss_ssd_kd_{name}"]
        error = 4 * values.std() / math.sqrt(len(values))
        assert abs(values.mean() - term) <= error + 1e-5, name
        assert error < 0.05 * term or term == 0


# What it refuses of two detectors


def bind(student, teacher, **settings):
    loss = SSDKD(**settings)
    loss.bind(build_view(student, "student"), build_view(teacher, "teacher"))
    return loss


@pytest.mark.parametrize(
    ("family", "classes", "boxes"),
    [
        ("faster", ["loss_cls", "loss_rpn_cls"], ["loss_box_reg", "loss_rpn_loc"]),
        ("retinanet", ["loss_cls"], ["loss_box_reg"]),
        ("fcos", ["loss_fcos_cls"], ["loss_fcos_loc"]),
    ],
)
def test_weights_of_the_students_own_losses(family, classes, boxes):
    features = {} if family == "faster" else {"mu": 1.0, "nu": 0.0}
    weights = bind(tiny_detector(family), tiny_detector(family), lmda=2.0, **features).task_weights
    mu = features.get("mu", 0.5)
    assert weights == {**dict.fromkeys(classes, mu), **dict.fromkeys(boxes, 2.0)}


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_heads_without_background(family):
    message = "SSD_KD: (RetinaNet|FCOS) and (RetinaNet|FCOS) are not both SSDs, nor two-stage detectors"
    for hint in ("feature", "logits"):
        with pytest.raises(ValueError, match=message):
            bind(tiny_detector(family), tiny_detector(family), hint=hint)


@pytest.mark.parametrize("student, teacher", [("faster", "retinanet"), ("retinanet", "mask")])
def test_other_kinds(student, teacher):
    message = r"SSD_KD: the (student|teacher) is a \w+, which has no (rpn|box_head|dense)\(\)"
    with pytest.raises(TypeError, match=message):
        bind(tiny_detector(student), tiny_detector(teacher))


def test_other_priors():
    teacher = ssd_model("A", WIDTH=0.0625)
    message = "SSD_KD compares the dense predictions .* row by row, but their anchors differ"
    for hint in ("feature", "logits"):
        with pytest.raises(ValueError, match=message):
            bind(_ssds()[0], teacher, hint=hint)


def test_other_classes():
    message = "SSD_KD compares class logits, but the student has 20 classes and the teacher 7"
    with pytest.raises(ValueError, match=message):
        bind(_ssds()[0], ssd_model("B", WIDTH=0.0625, NUM_CLASSES=7), gamma=0.0)
