"""distill_d2.testing, as the tests of a package of a user's own use it."""

import subprocess
import sys

import pytest
import torch

from distill_d2 import DistillLoss
from distill_d2.losses import FeaturePairs
from distill_d2.losses.pkd import PKD
from distill_d2.testing import check_loss, families


def test_the_library_does_not_import_it():
    code = "import sys, distill_d2, distill_d2.engine; sys.exit('distill_d2.testing' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_loss_that_keeps_the_laws():
    assert check_loss(PKD(), on=["RetinaNet", "SOLOv2"]) == {"RetinaNet": "", "SOLOv2": ""}


def test_a_loss_that_works_on_some_detectors():
    refusals = check_loss(Means(in_features=["p3"]))
    assert "no level 'p3'" in refusals["SSD"] and not refusals["RetinaNet"]
    assert refusals.keys() == families().keys()
    with pytest.raises(AssertionError, match="the loss is refused: .*SSD"):
        check_loss(Means(in_features=["p3"]), on=["SSD"])
    with pytest.raises(AssertionError, match="on=\\['YOLO'\\]: expected some of .*'SSD'"):
        check_loss(Means(), on=["YOLO"])


class Means(DistillLoss):
    """Distances of the levels' means; subclasses break a law."""

    NODE = "PKD"
    Settings = PKD.Settings

    def __init__(self, **keys):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features)

    def forward(self, student, teacher, batch):
        pairs = self.pairs(student, teacher).values()
        return {"loss_means": sum(self.distance(s.mean(), t.mean()) for s, t in pairs)}

    def distance(self, s, t):
        return (s - t).square()


class NotFinite(Means):
    def distance(self, s, t):
        return (s - t) / 0.0


class WithoutTheStudent(Means):
    def distance(self, s, t):
        return (t * torch.ones((), requires_grad=True)).square()


class Unused(Means):
    def __init__(self, **keys):
        super().__init__(**keys)
        self.unused = torch.nn.Linear(1, 1)


class Greedy(Means):
    def forward(self, student, teacher, batch):
        teacher.model.head(list(teacher.features.values()))
        return super().forward(student, teacher, batch)


class Waiting(Means):
    def distance(self, s, t):
        return (s - t).square() + 0.0 * t.item()


class HalfPrecision(Means):
    def distance(self, s, t):
        return (s - t).square().bfloat16()


class OfObjects(Means):
    def forward(self, student, teacher, batch):
        share = 1.0 / batch.truth.valid.sum()
        return {"loss_means": share * super().forward(student, teacher, batch)["loss_means"]}


class NotZero(Means):
    def distance(self, s, t):
        return (s - t - 1.0).square()


class Keeping(Means):
    def bind(self, student, teacher):
        super().bind(student, teacher)
        self.kept = teacher.model


class Meddling(Means):
    def forward(self, student, teacher, batch):
        for tensor in teacher.model.state_dict().values():
            tensor.add_(1)
        return super().forward(student, teacher, batch)


class Waking(Means):
    def forward(self, student, teacher, batch):
        teacher.model.train()
        return super().forward(student, teacher, batch)


class OfItsSettings(Means):
    def factor(self, iteration):
        return self.settings.weight


@pytest.mark.parametrize(
    "loss, law",
    [
        (NotFinite, "trains_the_student"),
        (WithoutTheStudent, "trains_the_student"),
        (Unused, "reaches_all_that_is_trained"),
        (Greedy, "asks_for_no_more_than_it_needs"),
        (Waiting, "is_float32_without_waiting"),
        (HalfPrecision, "is_float32_without_waiting"),
        (OfObjects, "takes_images_without_objects"),
        (NotZero, "is_zero_for_equals"),
        (Keeping, "reaches_all_that_is_trained|leaves_the_teacher_alone|keeps_the_student_plain"),
        (Meddling, "leaves_the_teacher_alone"),
        (Waking, "leaves_the_teacher_alone"),
        (OfItsSettings, "scales_with_its_weight"),
    ],
)
def test_losses_that_break_a_law(loss, law):
    with pytest.raises(AssertionError, match=f"^({law}), on RetinaNet: "):
        check_loss(loss(), on=["RetinaNet"])
