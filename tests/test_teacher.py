"""A teacher that runs: no more than is asked, in the precision that is asked, invisible and unchanged."""

import copy

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from views.recorded import detector

from distill_d2.teacher import Teacher
from distill_d2.testing.tiny import tiny_batch, tiny_config, tiny_detector

SIZE = (64, 96)  # (H, W) in pixels
BLACK = [torch.zeros(3, *SIZE)]


@pytest.mark.parametrize(
    "levels, part",
    [
        ([], "backbone and neck"),
        (["p3", "res2"], "backbone and neck"),
        (["res3", "res2"], "its backbone up to backbone.bottom_up.res2, backbone.bottom_up.res3"),
    ],
)
def test_describe(levels, part):
    teacher = Teacher(build_model(tiny_config(channels=64)))
    for name in levels:
        teacher.view.require_level(name)
    count = sum(parameter.numel() for parameter in teacher.model.parameters())
    assert teacher.describe() == f"RetinaNet, {count / 1e6:.3g} M parameters; runs {part}"
    teacher.view.require("dense")
    assert teacher.describe().endswith("; runs backbone and neck, and its head for dense")


# Law 4: a teacher costs only what is asked.

ANCHORS = "anchor_generator"
RPN_PARTS = ["proposal_generator.anchor_generator", "proposal_generator.rpn_head"]
BOX_PARTS = [f"roi_heads.{part}" for part in ("box_head", "box_pooler", "box_predictor")]


def parts_that_run(model):
    """Names of the outermost modules of a model that were called, once for each call."""
    running, called = [], []

    def enter(name):
        if not running:
            called.append(name)
        running.append(name)

    for name, part in model.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: enter(name))
        part.register_forward_hook(lambda *_: running.pop() and None)
    return called


@pytest.mark.parametrize(
    "family, capability, parts",
    [
        *((family, "", []) for family in ("retinanet", "fcos", "faster", "mask")),
        *((family, "dense", [ANCHORS, "head"]) for family in ("retinanet", "fcos")),
        ("retinanet", "anchors", [ANCHORS]),
        ("faster", "anchors", [f"proposal_generator.{ANCHORS}"]),
        *((family, "rpn", RPN_PARTS) for family in ("faster", "mask")),
        *((family, "box_head", BOX_PARTS) for family in ("faster", "mask")),
        *((family, "score_boxes", BOX_PARTS) for family in ("faster", "mask")),
    ],
)
def test_only_what_a_capability_needs_runs(family, capability, parts):
    teacher = Teacher(tiny_detector(family))
    called = parts_that_run(teacher.model)
    boxes = ([Boxes(torch.tensor([[4.0, 4.0, 40.0, 30.0]]))],)
    with teacher.view.recording():
        if capability:
            teacher.view.require(capability)
        teacher.observe(BLACK, SIZE)
        assert called == ["backbone"]
        if capability:
            getattr(teacher.view, capability)(*(boxes if parts is BOX_PARTS else ()))
    assert called[0] == "backbone" and sorted(called[1:]) == parts


@pytest.mark.parametrize(
    "family, levels, not_run",
    [
        ("retinanet", ["res2"], ["res3", "res4", "fpn_lateral2", "fpn_output4", "head"]),
        ("retinanet", ["res4", "res2"], ["fpn_lateral2", "fpn_output4", "head"]),
        ("fcos", ["res3"], ["res4", "fpn_lateral4", "head"]),
        ("mask", ["res5"], ["fpn_lateral5", "fpn_output2", "top_block", "rpn_head", "roi_heads"]),
    ],
)
def test_it_ends_after_the_last_stage_that_is_read(family, levels, not_run):
    """And is a whole detector for others."""
    teacher, seen = Teacher(tiny_detector(family)), []
    image = torch.rand(3, *SIZE) * 255
    for name in levels:
        teacher.view.require_level(name)
    for name, part in teacher.model.named_modules():
        part.register_forward_hook(lambda *_, name=name: seen.append(name.rpartition(".")[2]))
    for _ in range(2):
        with teacher.view.recording():
            teacher.observe([image], SIZE)
            found = {name: teacher.view.level(name).clone() for name in levels}
    assert not set(seen) & set(not_run) and "backbone" not in seen and "stem" in seen
    backbone = teacher.model.backbone
    batch = ((image - teacher.model.pixel_mean) / teacher.model.pixel_std)[None]
    with torch.no_grad():
        expected = backbone.bottom_up.stem(batch)
        for stage in ("res2", "res3", "res4", "res5")[: int(max(levels)[-1]) - 1]:
            expected = getattr(backbone.bottom_up, stage)(expected)
            if stage in levels:
                torch.testing.assert_close(found[stage], expected)
        assert set(backbone(batch)) == set(teacher.view.strides)


@pytest.mark.parametrize("levels, capability", [(["p2"], ""), (["res2", "p4"], ""), (["res2"], "dense")])
def test_it_does_not_end_early_where_more_is_read(levels, capability):
    """And then hooks that anybody has on the backbone run."""
    teacher, seen = Teacher(tiny_detector()), []
    teacher.model.backbone.register_forward_hook(lambda *args: seen.append(set(args[-1])))
    for name in levels:
        teacher.view.require_level(name)
    if capability:
        teacher.view.require(capability)
    with teacher.view.recording():
        teacher.observe(BLACK, SIZE)
        assert set(teacher.view.features) == {"p2", "p3", "p4"}
    assert seen == [{"p2", "p3", "p4"}]


# Its predictions, for its evaluation.


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_predictor(input_format):
    """For images in the channel order of the student."""
    teacher = Teacher(detector(), input_format=input_format)
    items = [{key: item[key] for key in ("image", "height", "width")} for item in tiny_batch()]
    copies = [item["image"].clone() for item in items]
    turned = [{**item, "image": item["image"].flip(0)} for item in items]
    own = items if input_format == "BGR" else turned
    teacher.model.test_score_thresh = 0.0
    with torch.no_grad():
        outputs, expected = teacher.predictor("BGR")(items), teacher.model(own)
        other = teacher.predictor("RGB")(items)
    for a, b, c in zip(outputs, expected, other):
        assert torch.equal(a["instances"].scores, b["instances"].scores) and len(a["instances"]) > 10
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert not torch.equal(a["instances"].scores, c["instances"].scores)
    assert all(torch.equal(item["image"], image) for item, image in zip(items, copies))
    assert teacher.predictor(input_format) is teacher.model
    # Evaluation puts a model back into the mode in which it was.
    inference_on_dataset(teacher.predictor("BGR"), [items], None)
    assert not any(module.training for module in teacher.model.modules())


# Precision.


def run_in(autocast, dtype=None):
    """dtypes of what the backbone computes, of the view's features and of its head's logits, where the
    student's step runs in autocast to ``dtype``."""
    teacher, seen = Teacher(tiny_detector(), autocast=autocast), []
    teacher.model.backbone.register_forward_hook(lambda *args: seen.append(args[-1]["p2"].dtype))
    teacher.view.require("dense")
    with teacher.view.recording():
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            teacher.observe(BLACK, SIZE)
        head = teacher.view.model.head
        head.register_forward_hook(lambda *args: seen.append(args[-1][0][0].dtype))
        dense = teacher.view.dense()
        return [*seen, teacher.view.features["p2"].dtype, dense.logits.dtype]


@pytest.mark.parametrize("autocast", ["auto", "", "float32", "float16"])
def test_precision_on_a_cpu_is_the_settings_and_views_give_float32(autocast):
    dtype = torch.float16 if autocast == "float16" else torch.float32
    for student in (None, torch.bfloat16):
        assert run_in(autocast, student) == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("device, enabled", [("cuda", True), ("cuda", False), ("cpu", True)])
def test_auto_follows_the_students_step_on_a_gpu(monkeypatch, device, enabled):
    monkeypatch.setattr(Teacher, "device", torch.device(device))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: enabled)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    expected = torch.float16 if device == "cuda" and enabled else None
    assert Teacher(tiny_detector())._precision() is expected
    assert Teacher(tiny_detector(), autocast="float32")._precision() is None


def test_precision_is_logged_once(caplog):
    teacher = Teacher(tiny_detector())
    with caplog.at_level("DEBUG"):
        for _ in range(2):
            teacher.observe(BLACK, SIZE)
    (line,) = [message for message in caplog.messages if "TEACHER_AUTOCAST" in message]
    assert line == "The teacher runs in float32 (MODEL.DISTILLER.TEACHER_AUTOCAST is 'auto')."


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_format": "YUV-BT.601"}, "input format 'YUV-BT.601'; expected 'BGR' or 'RGB'"),
        ({"autocast": "int8"}, r"TEACHER_AUTOCAST is 'int8'; expected one of \['auto', '', 'float32', "),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        Teacher(build_model(tiny_config()), **options)


# Law 2: copies share its weights.


def p2_of(teacher):
    with teacher.view.recording():
        teacher.observe([torch.full((3, *SIZE), 50.0)], SIZE)
        return teacher.view.features["p2"]


def test_a_cast_or_move_prepares_it_again():
    teacher = Teacher(tiny_detector())
    p2_of(teacher)
    teacher.apply(lambda tensor: tensor.double())
    assert {p.dtype for p in teacher.view.model.parameters()} == {torch.float64}
    assert p2_of(teacher).dtype == torch.float32


@pytest.mark.parametrize("stepped", [False, True])
def test_a_copy_shares_weights_and_records_for_itself(stepped):
    teacher = Teacher(tiny_detector())
    if stepped:
        p2_of(teacher)
    copied = copy.deepcopy(teacher)
    pairs = list(zip(teacher.model.parameters(), copied.model.parameters()))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not set(teacher.model.modules()) & set(copied.model.modules())
    with teacher.view.recording():
        expected = p2_of(copied)
        assert not teacher.view.taps.recorded
    assert torch.equal(p2_of(teacher), expected)
    copied.apply(lambda tensor: tensor.double())
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
