"""Law 6: student and teacher see the same pixels, each in its own way, on one common padding."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone

from distill_d2.distiller import Distiller
from distill_d2.distiller.padding import CommonPadding
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing import step
from distill_d2.testing.tiny import tiny_batch, tiny_detector
from distill_d2.views import RetinaNetView


class Plain(Backbone):
    """Images, padded to multiples of ``divisibility``."""

    def __init__(self, divisibility):
        super().__init__()
        self._divisibility = divisibility

    def forward(self, images):
        return {"p2": images}

    def output_shape(self):
        return {"p2": ShapeSpec(channels=3, stride=1)}

    @property
    def size_divisibility(self):
        return self._divisibility


@pytest.mark.parametrize(
    "student, teacher, square, given, expected",
    [
        (16, 32, 0, (64, 96), (64, 96)),
        (16, 32, 0, (80, 96), (96, 96)),
        (16, 32, 0, (64, 80), (64, 96)),
        (16, 32, 0, (112, 48), (128, 64)),
        (24, 16, 0, (24, 72), (48, 96)),
        (0, 32, 0, (33, 64), (64, 64)),
        (16, 32, 128, (64, 160), (128, 160)),
        (16, 32, 128, (144, 80), (160, 128)),
        (16, 1, 0, (48, 80), (48, 80)),
    ],
)
def test_common_size(student, teacher, square, given, expected):
    padding = CommonPadding(Plain(student), teacher, square)
    assert padding.of(*given) == expected and padding.of_image(*given) == expected
    height, width = given
    assert padding.of_images([torch.zeros(3, height, 1), torch.zeros(3, 1, width)]) == expected


def test_rows_and_columns_are_added_below_and_to_the_right():
    backbone = Plain(16)
    padding, images = CommonPadding(backbone, 32, 0), torch.rand(2, 3, 64, 48)
    with padding.applied():
        padded = backbone(images)["p2"]
    assert padded.shape == (2, 3, 64, 64) and padding.size == (64, 64)
    assert torch.equal(padded[..., :48], images) and not padded[..., 48:].any()
    with padding.applied():
        padded = backbone(images.transpose(2, 3))["p2"]
    assert torch.equal(padded[:, :, :48], images.transpose(2, 3)) and not padded[:, :, 48:].any()
    assert torch.equal(backbone(images)["p2"], images) and not backbone._forward_pre_hooks


def distiller(student, teacher, **options):
    return Distiller(student=student, teacher=teacher, losses=[PKD(**options)]).train()


def inputs_of(model):
    """What the bottom-up networks of student and teacher get, in turn."""
    seen = []
    for detector in (model.student, model.teacher.model):
        hook = lambda _, inputs: seen.append(inputs[0])  # noqa: E731
        detector.backbone.bottom_up.register_forward_pre_hook(hook)
    return seen


@pytest.mark.parametrize("teacher_format", ["BGR", "RGB"])
def test_each_normalizes_the_same_pixels_in_its_own_way(teacher_format):
    detector = tiny_detector("faster", width=16)  # multiples of 32 pixels; the student's are 16
    detector.pixel_mean = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    detector.pixel_std = torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1)
    model = distiller(tiny_detector(), Teacher(detector, input_format=teacher_format))
    seen = inputs_of(model)
    batch = tiny_batch(shapes=[(64, 80), (96, 48)])
    step(model, batch)

    expected = torch.zeros(2, 2, 3, 96, 96)
    for index, item in enumerate(batch):
        height, width = item["image"].shape[1:]
        for channel in range(3):
            plane = item["image"][channel].float()
            of_student = (plane - model.student.pixel_mean[channel]) / model.student.pixel_std[channel]
            expected[0, index, channel, :height, :width] = of_student
            other = channel if teacher_format == "BGR" else 2 - channel
            expected[1, index, other, :height, :width] = (plane - (other + 1)) / (other + 4)
    torch.testing.assert_close(seen[0], expected[0])
    torch.testing.assert_close(seen[1].contiguous(), expected[1])


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "shape, padded", [((64, 80), (64, 96)), ((112, 48), (128, 64)), ((64, 96), (64, 96))]
)
def test_one_padding_in_training_and_the_students_own_in_evaluation(shape, padded, alone):
    """Also where the backbones do not run to their ends."""
    model = Distiller(
        student=tiny_detector(),
        teacher=Teacher(tiny_detector("faster")),
        losses=[PKD(in_features=["res2"])],
        task_loss_weight=0.0 if alone else 1.0,
    ).train()
    seen, batch = inputs_of(model), tiny_batch(1, shapes=[shape])
    step(model, batch)
    assert [tuple(images.shape[-2:]) for images in seen] == [padded] * 2
    seen.clear()
    with torch.no_grad():
        model.eval()(batch)
    assert [tuple(images.shape[-2:]) for images in seen] == [shape]  # the teacher does not run


def test_a_student_of_one_size_and_a_teacher_that_would_pad_it(monkeypatch):
    monkeypatch.setattr(RetinaNetView, "fixed_size", 80)
    message = "takes images of 80x80 pixels only, .* GeneralizedRCNN, would pad them to 96x96"
    with pytest.raises(ValueError, match=message):
        distiller(tiny_detector(), Teacher(tiny_detector("faster")), in_features=["res2"])
