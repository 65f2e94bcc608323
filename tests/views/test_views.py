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
VIEWS = [RetinaNetView, FCOSView, RCNNView, RCNNView]
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


@pytest.mark.parametrize("family, view_type", list(zip(FAMILIES, VIEWS)))
def test_what_each_family_has(family, view_type):
    view = build_view(detector(family), "student")
    assert type(view) is view_type and view.num_classes == 3
    assert list(view.strides.items()) == list(STRIDES.items())[: 5 if view_type is RCNNView else 3]
    shape = view.require_level("res3")
    assert (shape.channels, shape.stride) == (16, 8)


def test_stages_that_the_neck_does_not_read():
    """They are levels, too."""
    view = build_view(detector_from_p3(), "student")
    shapes = {name: (shape.channels, shape.stride) for name, shape in view.stage_shapes.items()}
    assert shapes.pop("stem", (8, 4)) == (8, 4)
    assert shapes == {"res2": (8, 4), "res3": (16, 8), "res4": (32, 16)}
    view.require_level("res2")
    with view.recording():
        view.model.backbone(torch.zeros(1, 3, 64, 96))
        assert list(view.features) == ["p3", "p4"]
        assert view.level("res2").shape == (1, 8, 16, 24)
    message = r"the student \(RetinaNet\) has no level 'p7'; its neck has \['p3', 'p4'\].*'res2'"
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


# Heads on the neck.


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


def check_rpn(predictions, model, features):
    """Against the RPN's own anchors, layout, decoding and matcher."""
    rpn = model.proposal_generator
    levels = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(levels)
    anchors = rpn.anchor_generator(levels)
    # The layout and the decoding of RPN.forward.
    logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
    deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
    torch.testing.assert_close(predictions.logits, torch.cat(logits, dim=1)[..., None])
    torch.testing.assert_close(predictions.deltas, torch.cat(deltas, dim=1))
    assert torch.equal(predictions.anchors, Boxes.cat(anchors).tensor)
    boxes = torch.cat(rpn._decode_proposals(anchors, deltas), dim=1)
    torch.testing.assert_close(predictions.boxes(), boxes)
    assert predictions.level_sizes == [level.shape[1] for level in logits]
    assert not predictions.background and predictions.valid is None
    assert not predictions.centerness_levels and not predictions.class_specific


HEADS = {"dense": ("head", check_dense), "rpn": ("proposal_generator.rpn_head", check_rpn)}
ON_THE_NECK = [("retinanet", "dense"), ("fcos", "dense"), ("faster", "rpn"), ("mask", "rpn")]


@pytest.mark.parametrize("family, capability", ON_THE_NECK)
def test_predictions_of_the_student_are_what_it_computed(family, capability):
    view, (path, check) = build_view(detector(family), "student"), HEADS[capability]
    view.require(capability)
    head = view.model.get_submodule(path)
    calls = count_calls(head)
    with trained_on(view, tiny_batch(masks=family == "mask")):
        predictions = getattr(view, capability)()
        getattr(view, capability)()
        assert len(calls) == 1 and len(predictions.logits) == 2
        check(predictions, view.model, view.features)
        predictions.logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in head.parameters())
    assert view.model.backbone.bottom_up.stem.conv1.weight.grad.any()


@pytest.mark.parametrize("family, capability", ON_THE_NECK)
def test_head_of_the_teacher_runs_on_demand(observed, family, capability):
    view, features = observed(family, capability)
    path, check = HEADS[capability]
    calls = count_calls(view.model.get_submodule(path))
    assert not calls
    predictions, again = getattr(view, capability)(), getattr(view, capability)()
    assert len(calls) == 1 and torch.equal(predictions.logits, again.logits)
    assert not predictions.logits.requires_grad and not predictions.deltas.requires_grad
    check(predictions, view.model, features)


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
        view.model.backbone(torch.zeros(1, 3, 64, 96))
        anchors = view.anchors()
    shapes = {name: tuple(level.shape) for name, level in anchors.items()}
    assert shapes == {"p3": (8, 12, 3, 4), "p4": (4, 6, 3, 4)}
    middle = anchors["p4"][1, 2].unflatten(-1, (2, 2)).mean(dim=(0, 1))
    assert middle.tolist() == pytest.approx([32.0, 16.0])  # OFFSET is 0


@pytest.mark.parametrize("heads", ["CascadeROIHeads", "Res5ROIHeads"])
def test_several_box_heads_or_one_without_a_neck(heads):
    """They have an RPN only."""
    options = ["MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
    cfg = tiny_config("faster") if heads == "CascadeROIHeads" else c4_config()
    cfg.merge_from_list(options)
    model = build_model(cfg)
    view = build_view(model, "student")
    for capability in ("box_head", "own_proposals", "score_boxes"):
        message = rf"the student is a GeneralizedRCNN, .* no {capability}\(\); it offers .*, tap, rpn, anchors$"
        with pytest.raises(TypeError, match=message):
            view.require(capability)
    view.require("rpn")
    assert view.num_classes == 3
    with trained_on(view, tiny_batch()):
        check_rpn(view.rpn(), model, view.features)


# Two-stage heads.


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
        heads._forward_box(features, [Instances((64, 96), proposal_boxes=boxes[0])])
    torch.testing.assert_close(logits, seen[0][0])
    torch.testing.assert_close(deltas, seen[0][1])


# Probing.


def test_probe_gives_all_levels_and_leaves_no_trace():
    """Nor where it fails."""
    model = detector().train()
    model.backbone.bottom_up.res2.eval()
    model.backbone.fpn_lateral2.eval()
    view = build_view(model, "student")
    view.require_level("res3")
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = {"p2": (16, 16, 24), "p3": (16, 8, 12), "p4": (16, 4, 6), "res3": (16, 8, 12)}
    assert level_shapes(view, 64, 96) == expected
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
