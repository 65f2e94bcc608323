"""Views: what losses read is what the detector computes."""

import pytest
import torch
from detectron2.modeling import FCOS, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from recorded import c4_config, count_calls, detector, detector_from_p3, trained_on
from torch import nn

from distill_d2.testing.tiny import tiny_batch, tiny_config
from distill_d2.views import (
    DetectorView,
    FCOSView,
    RCNNView,
    RetinaNetView,
    build_view,
    register_view,
    require_same_classes,
)
from distill_d2.views import base as views_base
from distill_d2.views.predictions import rows_of
from distill_d2.views.probe import level_shapes, reached_parameters

FAMILIES = ["retinanet", "fcos", "faster", "mask"]
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
ONE_STAGE = ", dense, anchors"
TWO_STAGE = ", rpn, anchors, score_boxes, box_head, own_proposals"
ANCHORS = {"retinanet": 3, "fcos": 1, "faster": 3, "mask": 3}  # in each cell


# What the detector has.


def test_a_view_is_its_nearest_registered_bases(monkeypatch):
    model = detector()
    model.__class__ = type("OwnRetinaNet", (type(model),), {})
    assert type(build_view(model, "student")) is RetinaNetView
    monkeypatch.setattr(views_base, "_VIEWS", {})
    assert type(build_view(model, "student")) is DetectorView

    @register_view(type(model))
    class Own(DetectorView):
        pass

    assert type(build_view(model, "student")) is Own
    with pytest.raises(TypeError, match="the teacher, a Linear, has no module 'backbone'"):
        build_view(nn.Linear(1, 1), "teacher")


@pytest.mark.parametrize(
    "family, view_type, count",
    [
        ("retinanet", RetinaNetView, 3),
        ("fcos", FCOSView, 3),
        ("faster", RCNNView, 5),
        ("mask", RCNNView, 5),
    ],
)
def test_what_each_family_has(family, view_type, count):
    view = build_view(detector(family), "student")
    assert type(view) is view_type and view.num_classes == 3
    assert list(view.strides.items()) == list(STRIDES.items())[:count]
    shape = view.require_level("res3")
    assert (shape.channels, shape.stride) == (16, 8)


def test_stages_that_the_neck_does_not_read():
    view = build_view(detector_from_p3(), "student")
    shapes = {name: (shape.channels, shape.stride) for name, shape in view.stage_shapes.items()}
    assert shapes.pop("stem", (8, 4)) == (8, 4)
    assert shapes == {"res2": (8, 4), "res3": (16, 8), "res4": (32, 16)}
    view.require_level("res2")
    with view.recording():
        view.model.backbone(torch.zeros(1, 3, 64, 96))
        assert list(view.features) == ["p3", "p4"]
        assert view.level("res2").shape == (1, 8, 16, 24)


def test_require_level_lists_the_levels():
    view = build_view(detector(), "teacher")
    message = r"the teacher \(RetinaNet\) has no level 'p7'; its neck has \['p2', 'p3', 'p4'\].*'res3'"
    with pytest.raises(KeyError, match=message):
        view.require_level("p7")


@pytest.mark.parametrize(
    "family, offers, capabilities",
    [
        ("retinanet", ONE_STAGE, ["rpn", "score_boxes", "box_head", "own_proposals"]),
        ("faster", TWO_STAGE, ["dense"]),
        ("unknown", "", ["anchors"]),
    ],
)
def test_require_what_is_not_there(family, offers, capabilities):
    known = family != "unknown"
    view = build_view(detector(family), "teacher") if known else DetectorView(detector(), "teacher")
    for capability in capabilities:
        message = rf"the teacher is a \w+, which has no {capability}\(\); it offers .*, tap{offers}$"
        with pytest.raises(TypeError, match=message):
            view.require(capability)
        with pytest.raises(TypeError):
            getattr(view, capability)(*[[]] * (capability in ("score_boxes", "own_proposals")))
    if not known:
        with pytest.raises(TypeError, match="RetinaNet has no anchors"):
            view.anchor_levels  # noqa: B018


def test_require_same_classes():
    student = build_view(detector(), "student")
    cfg = tiny_config()
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    teacher = build_view(build_model(cfg), "teacher")
    require_same_classes(student, student, "KD")
    with pytest.raises(ValueError, match="KD .* the student has 3 classes and the teacher 5"):
        require_same_classes(student, teacher, "KD")


# What it computed.


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_are_the_necks_outputs_and_the_required_stages(family):
    view, seen, stages = build_view(detector(family), "student"), [], []
    view.require_level("res2")
    view.require_level("res4")
    view.model.backbone.register_forward_hook(lambda *args: seen.append(args[-1]))
    view.model.backbone.bottom_up.res4.register_forward_hook(lambda *args: stages.append(args[-1]))
    with trained_on(view, tiny_batch(masks=family == "mask")):
        features = view.features
        assert list(features) == list(view.strides)
        assert all(torch.equal(features[name], seen[0][name]) for name in seen[0])
        shapes = {name: tuple(f.shape) for name, f in features.items()}
        assert list(view.bottom_up) == ["res2", "res4"]
        assert torch.equal(view.bottom_up["res4"], stages[0])
        assert torch.equal(view.level("res4"), stages[0])
    height, width = (64, 96) if family in ("faster", "mask") else (64, 80)
    assert shapes == {name: (2, 16, height // s, -(-width // s)) for name, s in view.strides.items()}


def test_tap_with_and_without_index():
    view = build_view(detector(), "student")
    view.require_tap("head")
    view.require_tap("head.cls_score")
    with trained_on(view, tiny_batch()):
        logits, deltas = view.tap("head")
        assert torch.equal(view.tap("head", 1)[0], deltas[0])
        # The shared layer ran once per level.
        assert torch.equal(view.tap("head.cls_score", 2), logits[2])
        assert torch.equal(view.tap("backbone", "p3"), view.features["p3"])


def test_float32_and_contiguous_under_autocast():
    view, seen = build_view(detector().to(memory_format=torch.channels_last), "student"), []
    view.require("dense")
    view.require_level("res3")
    view.model.backbone.register_forward_hook(lambda *args: seen.append(args[-1]["p2"]))
    image = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with view.recording():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = view.model.backbone(image)
            view.model.head(list(features.values()))
        dense = view.dense()
        tensors = [*view.features.values(), view.level("res3"), dense.logits, dense.deltas]
    assert seen[0].dtype == torch.bfloat16 and not seen[0].is_contiguous()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in tensors)


# One-stage heads.


def check_dense(dense, model, features):
    """Against the model's own head, anchors and decoding."""
    features = [features[name] for name in model.head_in_features]
    logits, deltas, *centerness = model._transpose_dense_predictions(
        model.head(features), [model.num_classes, 4, 1][: 3 if isinstance(model, FCOS) else 2]
    )
    assert dense.level_sizes == [level.shape[1] for level in logits]
    torch.testing.assert_close(dense.logits, torch.cat(logits, dim=1))
    torch.testing.assert_close(dense.deltas, torch.cat(deltas, dim=1))
    assert len(dense.centerness_levels) == sum(map(len, centerness))
    for levels in centerness:
        torch.testing.assert_close(rows_of(dense.centerness_levels), torch.cat(levels, dim=1))
    anchors = torch.cat([boxes.tensor for boxes in model.anchor_generator(features)])
    assert torch.equal(dense.anchors, anchors)
    expected = [model.box2box_transform.apply_deltas(d, anchors) for d in torch.cat(deltas, dim=1)]
    torch.testing.assert_close(dense.boxes(), torch.stack(expected))
    assert not dense.background and dense.valid is None and not dense.class_specific


@pytest.mark.parametrize("family, anchors", [("retinanet", 3), ("fcos", 1)])
def test_dense_of_the_student_is_what_it_computed(family, anchors):
    view = build_view(detector(family), "student")
    view.require("dense")
    calls = count_calls(view.model.head)
    with trained_on(view, tiny_batch()):
        dense = view.dense()
        assert len(calls) == 1
        rows = anchors * (16 * 20 + 8 * 10 + 4 * 5)
        assert dense.logits.shape == (2, rows, 3) and dense.deltas.shape == (2, rows, 4)
        check_dense(dense, view.model, view.features)
        dense.logits.sum().backward()
    assert view.model.head.cls_score.bias.grad.abs().sum() > 0
    assert view.model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_dense_of_the_teacher_runs_its_head_on_demand(observed, family):
    view, features = observed(family, "dense")
    calls = count_calls(view.model.head)
    dense = view.dense()
    again = view.dense()
    assert len(calls) == 1
    assert torch.equal(dense.logits, again.logits) and not dense.logits.requires_grad
    check_dense(dense, view.model, features)


def test_matched_rows_of_retinanet_are_its_own_labels(observed):
    view, features = observed("retinanet", "dense")
    model, instances = view.model, [item["instances"] for item in tiny_batch(1, objects=3)]
    anchors = model.anchor_generator([features[name] for name in model.head_in_features])
    labels, _ = model.label_anchors(anchors, instances)
    boxes = torch.stack([per_image.gt_boxes.tensor for per_image in instances])
    matched = view.dense().match(boxes, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(matched == 1, (labels[0] >= 0)[None] & (labels[0] < 3)[None])
    assert torch.equal(matched == 0, (labels[0] == 3)[None])
    assert set(matched.unique().tolist()) == {-1, 0, 1}


# Anchors of both.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_anchors_of_each_level_are_the_generators(observed, family, role):
    view, features = observed(family, "anchors")  # of an image of 64x96
    if role == "student":
        view = build_view(view.model.train(), "student")
        view.require("anchors")
        with view.recording():
            features = view.model.backbone(torch.zeros(2, 3, 64, 96))
            anchors = view.anchors()
    else:
        anchors = view.anchors()
    assert list(anchors) == list(view.anchor_levels) == list(view.strides)
    for name, stride in view.strides.items():
        rows, columns = -(-64 // stride), -(-96 // stride)
        assert anchors[name].shape == (rows, columns, ANCHORS[family], 4)
    if family == "fcos":  # squares of 8 strides around the middles of the cells
        for name, stride in view.strides.items():
            y, x = (stride * (torch.arange(n) + 0.5) for n in anchors[name].shape[:2])
            centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
            expected = torch.cat([centers - 4 * stride, centers + 4 * stride], dim=-1)
            assert torch.equal(anchors[name][:, :, 0], expected)
        return
    two_stage = family in ("faster", "mask")
    generator = (view.model.proposal_generator if two_stage else view.model).anchor_generator
    levels = generator(list(features.values()))
    for boxes, cells, (name, stride) in zip(levels, generator.cell_anchors, view.strides.items()):
        assert torch.equal(anchors[name].reshape(-1, 4), boxes.tensor)
        # Row 1, column 2: the layout is (H, W), which rows in order alone would not tell.
        if name != "p6":
            expected = cells + torch.tensor([2, 1, 2, 1]) * stride
            assert torch.equal(anchors[name][1, 2], expected)


def test_anchors_of_the_heads_levels_alone():
    """The head of a RetinaNet need not take all levels of its neck."""
    cfg = tiny_config()
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32.0], [64.0]]
    view = build_view(build_model(cfg), "student")
    assert list(view.strides) == ["p2", "p3", "p4"] and list(view.anchor_levels) == ["p3", "p4"]
    with view.recording():
        view.model.backbone(torch.zeros(1, 3, 64, 64))
        anchors = view.anchors()
    assert {name: tuple(level.shape) for name, level in anchors.items()} == {
        "p3": (8, 8, 3, 4),
        "p4": (4, 4, 3, 4),
    }
    middle = anchors["p4"][1, 2].unflatten(-1, (2, 2)).mean(dim=(0, 1))
    assert middle.tolist() == pytest.approx([32.0, 16.0])  # OFFSET is 0


# Two-stage heads.


def proposals(boxes, size=(64, 96)):
    return [Instances(size, proposal_boxes=per_image) for per_image in boxes]


@pytest.mark.parametrize("family", ["faster", "mask"])
def test_score_boxes_is_the_roi_heads_own_pipeline(family, observed):
    view, features = observed(family, "score_boxes")
    rows = [[2.0, 3.0, 40.0, 50.0], [0.0, 0.0, 96.0, 64.0], [5.0, 5.0, 9.0, 12.0]]
    boxes = [Boxes(torch.tensor(rows))]
    (logits,), (deltas,) = view.score_boxes(boxes)
    assert logits.shape == (3, 4) and deltas.shape == (3, 12) and not logits.requires_grad

    heads, seen = view.model.roi_heads, []
    heads.box_predictor.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        heads._forward_box(features, proposals(boxes))
    torch.testing.assert_close(logits, seen[0][0])
    torch.testing.assert_close(deltas, seen[0][1])


def test_score_boxes_splits_by_image():
    view = build_view(detector("faster"), "student")
    view.require("score_boxes")
    one = torch.tensor([[1.0, 2.0, 30.0, 40.0]])
    two = torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 3.0, 60.0, 50.0]])
    with view.recording():
        view.model.backbone(torch.randn(3, 3, 64, 64))
        boxes = [Boxes(one), Boxes(torch.zeros(0, 4)), Boxes(two)]
        logits, deltas = view.score_boxes(boxes)
        assert [len(x) for x in logits] == [1, 0, 2] == [len(x) for x in deltas]
        swapped, _ = view.score_boxes([Boxes(two[1:]), Boxes(one), Boxes(two)])
    assert logits[2].requires_grad
    torch.testing.assert_close(swapped[2], logits[2])
    assert not torch.allclose(swapped[0], logits[2][1:])  # the same box on another image


# Probing.


def test_probe_gives_all_levels():
    view = build_view(detector(), "student")
    view.require_level("res3")
    assert level_shapes(view, 64, 96) == {
        "p2": (16, 16, 24),
        "p3": (16, 8, 12),
        "p4": (16, 4, 6),
        "res3": (16, 8, 12),
    }


def test_probes_leave_no_trace():
    """Nor where one fails."""
    model = detector().train()
    model.backbone.bottom_up.res2.eval()
    model.backbone.fpn_lateral2.eval()
    view = build_view(model, "student")
    view.require_level("res3")
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    level_shapes(view, 64, 96)
    reached_parameters(view)
    with pytest.raises(RuntimeError):
        level_shapes(view, 65, 65)  # the FPN cannot add levels of odd sizes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not view.taps.recorded


# What losses read of the backbone.

RES3 = "backbone.bottom_up.res3"


@pytest.mark.parametrize(
    "family, levels, other, reads",
    [
        ("retinanet", [], "", []),
        ("retinanet", ["res3", "res2", "res3"], "", ["backbone.bottom_up.res2", RES3]),
        ("fcos", ["p4", "p2"], "", ["backbone"]),
        ("mask", ["p6", "res5"], "", ["backbone", "backbone.bottom_up.res5"]),
        ("retinanet", ["res3"], "backbone.fpn_lateral3", [RES3, "backbone.fpn_lateral3"]),
        # Nothing is of the backbone alone where other modules are read, too.
        ("retinanet", ["res3"], "head.cls_score", []),
        ("retinanet", ["res2"], "dense", []),
        ("faster", ["res2"], "rpn", []),
        ("mask", ["res2"], "box_head", []),
        # Without a neck, the last stages are the backbone's outputs.
        ("c4", ["res2"], "", ["backbone.res2"]),
        ("c4", ["res4", "res2"], "", ["backbone", "backbone.res2"]),
    ],
)
def test_what_is_read_of_the_backbone(family, levels, other, reads):
    """Levels, and a tap or a capability."""
    model = build_model(c4_config()) if family == "c4" else detector(family)
    view = build_view(model, "student")
    for name in levels:
        view.require_level(name)
    if "." in other:
        view.require_tap(other)
    elif other:
        view.require(other)
    assert view.backbone_reads == reads


@pytest.mark.parametrize(
    "levels, parts",
    [
        (["res2"], ["stem", "res2"]),
        (["res3", "res2"], ["stem", "res2", "res3"]),
        (["p3"], ["stem", "res2", "res3", "res4", "fpn_output2", "backbone"]),
    ],
)
def test_forward_of_a_student_ends_with_the_last_that_is_read(levels, parts):
    view, ran = build_view(detector().train(), "student"), []
    for name in ("res2", "res3", "res4", "stem"):
        module = view.model.backbone.bottom_up.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    view.model.backbone.fpn_output2.register_forward_pre_hook(lambda *_: ran.append("fpn_output2"))
    view.model.head.register_forward_pre_hook(lambda *_: pytest.fail("the head runs"))
    for name in levels:
        view.require_level(name)
    with view.recording(), EventStorage(0):
        with view.until_read():
            view.model([{"image": item["image"]} for item in tiny_batch()])  # no ground truth
        assert ran == [part for part in parts if part != "backbone"]
        assert view.taps.has("backbone") is ("backbone" in parts)
        assert all(view.level(name).requires_grad for name in levels)


def test_parameters_that_gradients_reach():
    """Through levels and taps, and not where they are frozen."""
    view = build_view(detector().train(), "student")
    view.require_tap("backbone.fpn_lateral3")
    view.require_level("res2")
    backbone = view.model.backbone
    known = {parameter: name for name, parameter in backbone.named_parameters()}
    parts = {known[parameter].rpartition(".")[0] for parameter in reached_parameters(view)}
    parts = {name if "fpn" in name else ".".join(name.split(".")[:2]) for name in parts}
    assert parts == {"bottom_up.stem", "bottom_up.res2", "bottom_up.res3", "fpn_lateral3"}
    backbone.bottom_up.stem.requires_grad_(False)
    backbone.fpn_lateral3.requires_grad_(False)
    stages = (backbone.bottom_up.res2, backbone.bottom_up.res3)
    assert reached_parameters(view) == {p for stage in stages for p in stage.parameters()}
    view.model.requires_grad_(False)
    assert reached_parameters(view) == set()
