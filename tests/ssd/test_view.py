"""SSD's view, and which losses refuse it, and why."""

import naive_ssd as naive
import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from distill_d2.projects.ssd import SSDView
from recorded import detector
from ssd_case import NETWORKS, WIDTHS, batch, ssd

from distill_d2 import Distiller, DistillLoss, Teacher
from distill_d2.losses import FGFI, GID
from distill_d2.testing import no_synchronization
from distill_d2.views import Batch, build_view


def observed(network, images):
    """The view of a teacher that saw the images, and its model as it was loaded."""
    torch.manual_seed(0)
    model = ssd(network)
    for name, tensor in model.state_dict().items():  # norms that change what they read
        if "running" in name:
            low, high = (0.5, 1.5) if name.endswith("var") else (-0.1, 0.1)
            tensor.uniform_(low, high)
    teacher = Teacher(model, input_format="RGB")
    for capability in ("dense", "anchors"):
        teacher.view.require(capability)
    teacher.view.taps.start()
    teacher.observe(images, (300, 300))
    return teacher.view, model.eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_kind(network):
    view = build_view(ssd(network), "student")
    assert type(view) is SSDView and view.num_classes == 20 and view.probe_size == (300, 300)
    expected = [8, 16, 32, 64, 100, 300] if network == "A" else [8, 16, 32, 64, 100, 150, 300]
    assert view.strides == {f"s{stride}": stride for stride in expected}
    assert view.anchor_levels == [f"s{stride}" for stride in expected if network == "A" or stride > 8]
    assert view.offers == ("dense", "anchors")


@pytest.mark.parametrize("network", ["A", "C"])
def test_dense(network):
    """The teacher's, with folded norms."""
    images = [item["image"] for item in batch(1, 1)]
    view, model = observed(network, images)
    found = view.dense()
    with torch.no_grad():
        x = torch.stack([(image - model.pixel_mean) / model.pixel_std for image in images])
        features = model.backbone(x)
        outputs = model.head([features[name] for name in model.head_in_features])
    assert found.background and found.num_classes == 20
    for actual, levels, length in zip((found.logits, found.deltas), outputs, (21, 4)):
        rows = [x.permute(0, 2, 3, 1).reshape(2, -1, length) for x in levels]
        torch.testing.assert_close(actual, torch.cat(rows, dim=1), rtol=1e-3, atol=1e-3)
    counts = model.anchor_generator.num_priors
    assert found.level_sizes == [a * w * w for a, w in zip(counts, WIDTHS[network])]
    assert (found.best_class() == found.logits[..., :20].argmax(-1)).all()
    for row in (0, 1000, len(found.anchors) - 1):
        expected = naive.decode(found.deltas[1, row].tolist(), found.anchors[row].tolist())
        np.testing.assert_allclose(found.boxes()[1, row], expected, rtol=1e-3, atol=1e-2)


def test_the_head_of_the_student_runs_once():
    model, calls = ssd().train(), []
    view = build_view(model, "student")
    view.require("dense")
    model.head.register_forward_hook(lambda _module, _inputs, output: calls.append(output))
    with view.recording(), EventStorage(0):
        model(batch(2, 1))
        found = view.dense()
    assert len(calls) == 1 and found.logits.requires_grad


def test_anchors():
    view, model = observed("A", [batch(1)[0]["image"]])
    anchors = view.anchors()
    assert list(anchors) == view.anchor_levels
    counts = model.anchor_generator.num_priors
    for width, count, level in zip(WIDTHS["A"], counts, anchors.values()):
        assert level.shape == (width, width, count, 4)
    flat = torch.cat([level.flatten(0, 2) for level in anchors.values()])
    assert torch.equal(flat, view.dense().anchors)
    center = (anchors["s16"][2, 5, 0, :2] + anchors["s16"][2, 5, 0, 2:]) / 2
    torch.testing.assert_close(center, torch.tensor([5.5 * 16, 2.5 * 16]))


def test_match_is_that_of_the_detectors_own_loss():
    inputs = batch(3, 0, 1)
    view, model = observed("C", [item["image"] for item in inputs])
    truth = Batch(inputs, (300, 300), 0, 1).truth
    predictions = view.dense()
    with no_synchronization():
        labels = predictions.match(truth.boxes, truth.valid)
        index = predictions.assign(truth.boxes, truth.valid)
    features = [view.level(name) for name in model.head_in_features]
    targets = model.targets(features, [item["instances"] for item in inputs])
    assert labels.dtype == torch.int8 and torch.equal(labels == 1, targets.positive)
    assert not (labels < 0).any() and labels.any(dim=1).tolist() == [True, False, True]
    boxes = truth.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    assert torch.equal(boxes[targets.positive], targets.boxes[targets.positive])


def test_rows_pair_where_prior_boxes_are_equal():
    boxes = {n: build_view(ssd(n), "student").sample_boxes("dense") for n in NETWORKS}
    assert all(torch.equal(b, c) for b, c in zip(boxes["B"], boxes["C"]))
    assert boxes["A"][0].shape != boxes["B"][0].shape
    other = build_view(ssd("C", SIZE=320), "student").sample_boxes("dense")
    assert not torch.allclose(other[0], boxes["C"][0])


# In the Distiller


@pytest.mark.parametrize(
    "loss, message",
    [
        (
            lambda: GID(adapter_share_weights=False),
            "levels have strides {.*'s100': 100, .*}; .* each has twice the stride of",
        ),
        (
            lambda: GID(adapter_share_weights=False, in_features=["s8", "s16"]),
            "teacher's levels have {'s8': 64, 's16': 128} channels; instances are pooled",
        ),
        (lambda: FGFI(), r"none on the levels \['s8'\]; choose among \['s16', "),
    ],
)
def test_losses_that_are_refused(loss, message):
    """When the Distiller is built."""
    with pytest.raises(ValueError, match=message):
        Distiller(student=ssd(), teacher=Teacher(ssd("B")), losses=[loss()], input_format="RGB")


class NeedsBoth(DistillLoss):
    def bind(self, student, teacher):
        student.require_level("p3")
        teacher.require_level("s8")


def test_detectors_that_take_images_of_different_sizes():
    """The levels are probed with an image that both take."""
    student, teacher = detector("retinanet"), Teacher(ssd("A"))
    assert build_view(student, "student").probe_size == (64, 64)
    Distiller(student=student, teacher=teacher, losses=[NeedsBoth()])
