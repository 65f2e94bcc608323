"""Law 5: levels pair by name and stride; channels and sizes that differ are adapted."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from map_views import view_of
from tiny import tiny_config

from distill_d2.losses import FeaturePairs
from distill_d2.teacher import Teacher
from distill_d2.views import build_view


def maps(channels=4, **sizes):
    return {name: torch.randn(2, channels, size, size) for name, size in sizes.items()}


def bound(student, teacher, in_features=(), strides=None):
    pairs = FeaturePairs(in_features)
    student, teacher = view_of(student, "student", strides), view_of(teacher, "teacher")
    pairs.bind(student, teacher)
    return pairs, student, teacher


def test_equal_levels_are_passed_on():
    ours, theirs = maps(p3=8, p4=4), maps(p3=8, p4=4)
    pairs, *views = bound(ours, theirs)
    result = pairs(*views)
    assert list(result) == ["p3", "p4"]
    assert torch.equal(result["p4"][0], ours["p4"]) and torch.equal(result["p4"][1], theirs["p4"])
    assert not list(pairs.parameters())


def test_common_levels_by_default():
    pairs, *_ = bound(maps(p2=16, p3=8, p4=4), maps(p3=8, p4=4, p5=2))
    assert pairs.in_features == ["p3", "p4"]


def test_a_level_of_another_stride_is_not_common():
    pairs, *_ = bound(maps(p3=8, p4=4), maps(p3=8, p4=4), strides={"p3": 16, "p4": 16})
    assert pairs.in_features == ["p4"]


def test_order_of_the_levels_does_not_matter():
    theirs = maps(p3=8, p4=4)
    pairs, *views = bound(maps(p3=8, p4=4), dict(reversed(theirs.items())))
    assert torch.equal(pairs(*views)["p3"][1], theirs["p3"])


def test_adapters_only_where_channels_differ():
    student = {**maps(4, p3=8), **maps(6, p4=4)}
    pairs, *views = bound(student, maps(6, p3=8, p4=4))
    assert list(pairs.adapters) == ["p3"]
    assert pairs.adapters["p3"].weight.shape == (6, 4, 1, 1)
    result = pairs(*views)
    torch.testing.assert_close(result["p3"][0], pairs.adapters["p3"](student["p3"]))
    assert torch.equal(result["p4"][0], student["p4"])


def test_student_is_resized_where_sizes_differ():
    student, teacher = maps(p3=5), maps(p3=4)
    pairs, *views = bound(student, teacher)
    ours, theirs = pairs(*views)["p3"]
    expected = F.interpolate(student["p3"], (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(theirs, teacher["p3"])


def test_resize_after_the_adapter():
    pairs, *views = bound(maps(3, p3=5), maps(7, p3=4))
    assert pairs(*views)["p3"][0].shape == (2, 7, 4, 4)


def test_table_rows():
    pairs = bound({**maps(3, p3=5), **maps(6, p4=4)}, maps(6, p3=4, p4=4))[0]
    student = {"p3": (3, 5, 5), "p4": (6, 4, 4)}
    teacher = {"p3": (6, 4, 4), "p4": (6, 4, 4)}
    assert pairs.describe(student, teacher) == [
        ["p3", "8", "(3, 5, 5)", "(6, 4, 4)", "1x1 convolution, resize"],
        ["p4", "16", "(6, 4, 4)", "(6, 4, 4)", "none"],
    ]


def test_named_level_of_another_stride():
    message = r"'p3' has stride 4 in the student \(p3: 4, .*\) and 8 in the teacher \(p3: 8, .*\)"
    with pytest.raises(ValueError, match=message):
        bound(maps(p3=8, p4=4), maps(p3=8, p4=4), ["p3"], strides={"p3": 4, "p4": 8})


def test_no_common_level():
    message = r"no neck level .*: the student has p2: 4.*, the teacher p5: 32"
    with pytest.raises(ValueError, match=message):
        bound(maps(p2=16), maps(p5=2))


@pytest.mark.parametrize("lacking, has", [("student", "p3"), ("teacher", "p4")])
def test_missing_level_lists_those_that_exist(lacking, has):
    name = {"p3": "p4", "p4": "p3"}[has]
    with pytest.raises(KeyError, match=rf"the {lacking} .*no level '{name}'; its neck has \['{has}'\]"):
        bound(maps(p3=8), maps(p4=4), [name])


def detectors(channels=24):
    """A tiny student and a tiny, wider teacher that both ran on the same image."""
    student = build_model(tiny_config())
    teacher = Teacher(build_model(tiny_config(width=16, channels=channels)))
    return student, build_view(student, "student"), teacher


def observe(student, view, teacher):
    view.taps.recording = teacher.view.taps.recording = True
    student.backbone(torch.randn(1, 3, 64, 64))
    teacher.observe([torch.randn(3, 64, 64)], (64, 64))


def test_stages_are_levels():
    student, view, teacher = detectors(channels=16)
    pairs = FeaturePairs(["res3", "p3"])
    pairs.bind(view, teacher.view)
    observe(student, view, teacher)
    result = pairs(view, teacher.view)
    assert {name: (tuple(s.shape), tuple(t.shape)) for name, (s, t) in result.items()} == {
        "res3": ((1, 32, 8, 8), (1, 32, 8, 8)),
        "p3": ((1, 16, 8, 8), (1, 16, 8, 8)),
    }
    assert list(pairs.adapters) == ["res3"] and pairs.adapters["res3"].in_channels == 16


def test_gradients_reach_adapters_and_student_never_the_teacher():
    student, view, teacher = detectors()
    pairs = FeaturePairs()
    pairs.bind(view, teacher.view)
    observe(student, view, teacher)
    result = pairs(view, teacher.view)
    sum((ours - theirs).pow(2).mean() for ours, theirs in result.values()).backward()
    assert len(pairs.adapters) == 3
    assert all(p.grad.abs().sum() > 0 for p in pairs.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    assert not any(theirs.requires_grad for _, theirs in result.values())
    assert all(p.grad is None for p in teacher.model.parameters())
