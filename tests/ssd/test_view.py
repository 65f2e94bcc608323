"""SSD in the Distiller: its view, and what losses make of it, as a student and as a teacher."""

import copy

import naive_ssd as naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from distill_d2.projects.ssd import SSDView
from recorded import detector
from ssd_case import NETWORKS, WIDTHS, batch, ssd

from distill_d2 import DistillLoss
from distill_d2.distiller import Distiller
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.gid import GID
from distill_d2.losses.head_kd import HeadKD
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher
from distill_d2.testing.synchronization import no_synchronization
from distill_d2.views import Batch, DetectorView, build_view
from distill_d2.views.probe import level_shapes


def grown(network, seed=0):
    """A network whose norms in evaluation do something."""
    torch.manual_seed(seed)
    model = ssd(network)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            low, high = (0.5, 1.5) if name.endswith("var") else (-0.1, 0.1)
            tensor.uniform_(low, high)
    return model


def observed(network, images, prepare=True):
    """A recording teacher that saw them, and the model that it was made of."""
    model = grown(network)
    teacher = Teacher(copy.deepcopy(model), input_format="RGB", prepare=prepare)
    for capability in ("dense", "anchors"):
        teacher.view.require(capability)
    teacher.view.taps.start()
    teacher.observe(images, (300, 300))
    return teacher.view, model.eval()


# The view


@pytest.mark.parametrize("network", NETWORKS)
def test_kind(network):
    view = build_view(ssd(network), "student")
    assert type(view) is SSDView and view.num_classes == 20 and view.probe_size == (300, 300)
    expected = [8, 16, 32, 64, 100, 300] if network == "A" else [8, 16, 32, 64, 100, 150, 300]
    assert view.strides == {f"s{stride}": stride for stride in expected}
    assert view.anchor_levels == [f"s{stride}" for stride in expected if network == "A" or stride > 8]
    for capability in ("rpn", "box_head", "score_boxes", "own_proposals"):
        with pytest.raises(TypeError, match=f"the student is a SSD, which has no {capability}"):
            view.require(capability)


def test_probe_size_of_other_detectors():
    assert build_view(detector("retinanet"), "student").probe_size == (64, 64)
    view = build_view(detector("faster"), "teacher")
    assert isinstance(view, DetectorView) and view.probe_size == (64, 64)


@pytest.mark.parametrize("network", NETWORKS)
def test_probe(network):
    shapes = level_shapes(build_view(ssd(network), "student"), 300, 300)
    widths = WIDTHS[network] if network == "A" else (38, *WIDTHS[network])
    assert [shape[1:] for shape in shapes.values()] == [(width, width) for width in widths]


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_dense(network, prepare):
    """The teacher's: its head runs here; folded norms compute the same."""
    images = [item["image"] for item in batch(1, 1)]
    view, model = observed(network, images, prepare)
    found = view.dense()
    with torch.no_grad():
        x = torch.stack([(image - model.pixel_mean) / model.pixel_std for image in images])
        features = model.backbone(x)
        logits, deltas = model.head([features[name] for name in model.head_in_features])
    assert found.background and found.num_classes == 20
    rows = [x.permute(0, 2, 3, 1).reshape(2, -1, 21) for x in logits]
    torch.testing.assert_close(found.logits, torch.cat(rows, dim=1), rtol=1e-3, atol=1e-3)
    rows = [x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in deltas]
    torch.testing.assert_close(found.deltas, torch.cat(rows, dim=1), rtol=1e-3, atol=1e-3)
    counts = model.anchor_generator.num_priors
    assert found.level_sizes == [a * w * w for a, w in zip(counts, WIDTHS[network])]
    assert found.anchors.shape == (sum(found.level_sizes), 4)
    assert (found.best_class() == found.logits[..., :20].argmax(-1)).all()
    for row in (0, 1000, len(found.anchors) - 1):
        expected = naive.decode(found.deltas[1, row].tolist(), found.anchors[row].tolist())
        np.testing.assert_allclose(found.boxes()[1, row], expected, rtol=1e-3, atol=1e-2)
    for name, level in view.features.items():
        torch.testing.assert_close(level, features[name], rtol=1e-3, atol=1e-3)


def test_the_students_head_runs_once():
    model, inputs = ssd().train(), batch(2, 1)
    view, calls = build_view(model, "student"), []
    view.require("dense")
    model.head.register_forward_hook(lambda _module, _inputs, output: calls.append(output))
    with view.recording(), EventStorage(0):
        model(inputs)
        found = view.dense()
        assert view.anchors()["s16"].shape == (19, 19, 6, 4)
    assert len(calls) == 1 and found.logits.requires_grad
    first = calls[0][0][0].permute(0, 2, 3, 1).reshape(2, -1, 21)
    assert torch.equal(found.logits[:, : first.shape[1]], first)


@pytest.mark.parametrize("network", ["A", "C"])
def test_anchors(network):
    view, model = observed(network, [batch(1)[0]["image"]])
    anchors = view.anchors()
    assert list(anchors) == view.anchor_levels
    counts = model.anchor_generator.num_priors
    for width, count, level in zip(WIDTHS[network], counts, anchors.values()):
        assert level.shape == (width, width, count, 4)
    flat = torch.cat([level.flatten(0, 2) for level in anchors.values()])
    assert torch.equal(flat, view.dense().anchors)
    # Column after column inside a row.
    center = (anchors["s16"][2, 5, 0, :2] + anchors["s16"][2, 5, 0, 2:]) / 2
    torch.testing.assert_close(center, torch.tensor([5.5 * 16, 2.5 * 16]))


def test_match_is_that_of_the_detectors_own_loss():
    inputs = batch(3, 0, 1)
    view, model = observed("C", [item["image"] for item in inputs])
    truth = Batch(inputs, (300, 300), 0, 1).truth
    objects = truth.boxes, truth.valid
    predictions = view.dense()
    with no_synchronization():
        labels = predictions.match(*objects)
    features = [view.level(name) for name in model.head_in_features]
    targets = model.targets(features, [item["instances"] for item in inputs])
    assert labels.dtype == torch.int8 and torch.equal(labels == 1, targets.positive)
    assert not (labels < 0).any() and labels.any(dim=1).tolist() == [True, False, True]


def test_rows_pair_where_prior_boxes_are_equal():
    boxes = {n: build_view(ssd(n), "student").sample_boxes("dense") for n in NETWORKS}
    for ours, theirs in zip(boxes["B"], boxes["C"]):
        assert torch.equal(ours, theirs)
    assert boxes["A"][0].shape != boxes["B"][0].shape
    other = build_view(ssd("C", SIZE=320), "student").sample_boxes("dense")
    assert not torch.allclose(other[0], boxes["C"][0])


# Losses


def distiller(student, teacher, *losses, **options):
    teacher = Teacher(grown(teacher, seed=1), input_format="RGB")
    return Distiller(
        student=grown(student), teacher=teacher, losses=losses, input_format="RGB", **options
    ).train()


def step(model, inputs=None):
    """The terms of a step; afterwards there are gradients, of all that is trained."""
    terms = model(inputs or batch(2, 1))
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(term.isfinite() for term in terms.values())
    assert not any(p.requires_grad for p in model.teacher.model.parameters())
    return terms


OWN = {"loss_cls", "loss_box_reg"}


@pytest.mark.parametrize("student, teacher", [("C", "B"), ("B", "C"), ("C", "A")])
def test_features(student, teacher):
    """Levels of one stride; channels that differ are adapted."""
    model = distiller(student, teacher, FeatureMimic(), PKD(in_features=["s8", "s32"]))
    names = ["s8", "s16", "s32", "s64", "s100", "s150", "s300"]
    if teacher == "A":
        names.remove("s150")
    mimic, pkd = model.losses["FeatureMimic"].pairs, model.losses["PKD"].pairs
    assert mimic.in_features == names and pkd.in_features == ["s8", "s32"]
    shapes = [grown(network).backbone.output_shape() for network in (student, teacher)]
    differ = [name for name in names if shapes[0][name].channels != shapes[1][name].channels]
    assert list(mimic.adapters) == differ and "s8" in differ
    for name, adapter in mimic.adapters.items():
        channels = [s[name].channels for s in shapes]
        assert [adapter.in_channels, adapter.out_channels] == channels
    assert set(step(model)) == OWN | {"loss_feature_mimic", "loss_pkd"}


def test_features_by_hand():
    model, inputs = distiller("C", "B", FeatureMimic(in_features=["s100"])), batch(1, 1)
    seen = {}
    for role, part in (("student", model.student), ("teacher", model.teacher.model)):
        part.backbone.register_forward_hook(
            lambda _module, _inputs, output, role=role: seen.update({role: output["s100"]})
        )
    term = model(inputs)["loss_feature_mimic"]
    assert seen["student"].shape == (2, 256, 3, 3) and seen["teacher"].shape == (2, 32, 3, 3)
    adapter = model.losses["FeatureMimic"].pairs.adapters["s100"]
    torch.testing.assert_close(term, F.mse_loss(adapter(seen["student"]), seen["teacher"]))


@pytest.mark.parametrize("student, last", [("C", "features.14.conv.0"), ("B", "features.34")])
def test_features_without_the_students_own_losses(student, last):
    """What no loss reaches is not trained."""
    teacher = "B" if student == "C" else "C"
    model = distiller(student, teacher, FeatureMimic(in_features=["s16"]), task_loss_weight=0.0)
    assert set(step(model)) == {"loss_feature_mimic"}
    trained = {n for n, p in model.student.named_parameters() if p.requires_grad}
    depth = {int(name.split(".")[2]) for name in trained}
    assert all(name.startswith("backbone.features.") for name in trained)
    assert max(depth) == {"C": 14, "B": 33}[student]
    if student == "C":
        assert not any(name.startswith("backbone.features.14.conv.1") for name in trained)


def test_no_objects():
    model = distiller("C", "B", FeatureMimic(), GID(feature_weight=0.0, relation_weight=0.0))
    terms = step(model, batch(0, 0))
    assert terms["loss_cls"] == 0 and terms["loss_feature_mimic"] > 0


@pytest.mark.parametrize(
    "loss, terms",
    [
        (
            lambda: GID(feature_weight=0.0, relation_weight=0.0),
            {"gid_response_cls", "gid_response_reg"},
        ),
        (
            lambda: GID(in_features=["s16"]),
            {"gid_feature", "gid_relation", "gid_response_cls", "gid_response_reg"},
        ),
        (lambda: DeFeat(), {"defeat_neck", "defeat_neck_back"}),
        (
            lambda: DeFeat(in_features=["s16"], mask="roi", head_cls_w=1.0, head_cls_back_w=1.0),
            {"defeat_neck", "defeat_neck_back", "defeat_hcls", "defeat_hcls_back"},
        ),
        (lambda: FGFI(in_features=["s16", "s32"]), {"fgfi"}),
    ],
)
def test_losses_that_work(loss, terms):
    found = step(distiller("C", "B", loss()))
    assert set(found) == OWN | {f"loss_{name}" for name in terms}
    assert all(found[f"loss_{name}"] > 0 for name in terms)


@pytest.mark.parametrize(
    "loss, teacher, message",
    [
        (lambda: HeadKD(), "B", r"HEAD_KD: the student is a SSD, which has no box_head\(\); it offers "),
        (lambda: GID(), "B", "share one convolution, but need different .* do not share it"),
        (
            lambda: GID(adapter_share_weights=False),
            *("B", "levels have strides {.*'s100': 100, .*}; .* each has twice the stride of"),
        ),
        (
            lambda: GID(adapter_share_weights=False, in_features=["s8", "s16"]),
            *("B", "teacher's levels have {'s8': 64, 's16': 128} channels; instances are pooled"),
        ),
        (
            lambda: GID(feature_weight=0.0, relation_weight=0.0),
            *("A", "row by row, but their anchors differ: .* has 144 boxes, .* the teacher 120 boxes"),
        ),
        (lambda: FGFI(), "B", r"none on the levels \['s8'\]; choose among \['s16', "),
        (
            lambda: PKD(in_features=["s8", "s150"]),
            *("A", r"the teacher \(SSD\) has no level 's150'; its neck has"),
        ),
    ],
)
def test_losses_that_are_refused(loss, teacher, message):
    """When the Distiller is built."""
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        distiller("C", teacher, loss())


def test_teacher_that_takes_no_small_images():
    """The levels are shown of an image that both take."""
    student, teacher = detector("retinanet"), Teacher(ssd("A"))
    model = Distiller(student=student, teacher=teacher, losses=[_Both()])
    assert model.losses["_Both"].bound


def test_student_whose_images_the_teacher_would_pad():
    assert detector("retinanet").backbone.size_divisibility == 16
    with pytest.raises(
        ValueError, match="300x300 pixels only, but .*RetinaNet, would .* 304x304; .* as 304"
    ):
        Distiller(student=ssd(), teacher=Teacher(detector("retinanet")), losses=[_Swapped()])


class _Both(DistillLoss):
    bound = False

    def bind(self, student, teacher):
        student.require_level("p3")
        teacher.require_level("s8")
        self.bound = True


class _Swapped(DistillLoss):
    def bind(self, student, teacher):
        student.require_level("s8")
        teacher.require_level("p3")


def test_detectors_without_common_levels():
    for student, teacher in ((ssd(), detector("retinanet")), (detector("retinanet"), ssd("A"))):
        with pytest.raises(ValueError, match="no neck level of one name and stride: .*s100: 100"):
            Distiller(student=student, teacher=Teacher(teacher), losses=[PKD()])


def test_inference_is_the_students():
    model, inputs = distiller("C", "B", PKD()), batch(1)
    with torch.no_grad():
        (found,), (alone,) = model.eval()(inputs), model.student(inputs)
    assert torch.equal(found["instances"].scores, alone["instances"].scores)
