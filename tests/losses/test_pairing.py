"""Law 5: levels pair by name and stride; channels and sizes that differ are adapted."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from distill_d2.losses import FeaturePairs
from distill_d2.teacher import Teacher
from distill_d2.testing.maps import view_of
from distill_d2.testing.tiny import tiny_config
from distill_d2.views import build_view


def maps(channels=4, **sizes):
    return {name: torch.randn(2, channels, size, size) for name, size in sizes.items()}


def bound(student, teacher, in_features=(), strides=None, **options):
    pairs = FeaturePairs(in_features, **options)
    student, teacher = view_of(student, "student", strides), view_of(teacher, "teacher")
    pairs.bind(student, teacher)
    return pairs, student, teacher


def test_equal_levels_are_passed_on():
    student, teacher = maps(p3=8, p4=4), maps(p3=8, p4=4)
    pairs, *views = bound(student, teacher)
    result = pairs(*views)
    assert list(result) == ["p3", "p4"]
    assert torch.equal(result["p4"][0], student["p4"]) and torch.equal(result["p4"][1], teacher["p4"])
    assert not list(pairs.parameters())


def test_common_levels_by_default():
    pairs, *_ = bound(maps(p2=16, p3=8, p4=4), maps(p3=8, p4=4, p5=2))
    assert pairs.in_features == ["p3", "p4"]


def test_a_level_of_another_stride_is_not_common():
    pairs, *_ = bound(maps(p3=8, p4=4), maps(p3=8, p4=4), strides={"p3": 16, "p4": 16})
    assert pairs.in_features == ["p4"]


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
    adapted, target = pairs(*views)["p3"]
    expected = F.interpolate(student["p3"], (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(adapted, expected)
    assert torch.equal(target, teacher["p3"])


# The kind of convolution.


def test_a_larger_kernel_keeps_sizes():
    student = {**maps(3, p3=7), **maps(3, p4=4)}
    for kernel_size in (3, 5):
        pairs, *views = bound(student, maps(6, p3=7, p4=4), kernel_size=kernel_size)
        assert pairs.adapters["p3"].weight.shape == (6, 3, kernel_size, kernel_size)
        for name, (adapted, target) in pairs(*views).items():
            assert adapted.shape == target.shape == (2, 6, *student[name].shape[2:])
            weight, bias = pairs.adapters[name].weight, pairs.adapters[name].bias
            expected = F.conv2d(student[name], weight, bias, padding=kernel_size // 2)
            torch.testing.assert_close(adapted, expected)


def test_a_shared_convolution_is_one_set_of_parameters_on_all_levels():
    student = maps(3, p3=8, p4=4, p5=2)
    pairs, *views = bound(student, maps(6, p3=8, p4=4, p5=2), shared=True, kernel_size=3)
    shapes = {name: tuple(value.shape) for name, value in pairs.state_dict().items()}
    assert shapes == {"adapters.shared.weight": (6, 3, 3, 3), "adapters.shared.bias": (6,)}
    assert sum(p.numel() for p in pairs.parameters()) == 6 * 3 * 9 + 6
    result = pairs(*views)
    for name, level in student.items():
        torch.testing.assert_close(result[name][0], pairs.adapters["shared"](level))
    result["p5"][0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in pairs.parameters())


@pytest.mark.parametrize("shared, keys", [(False, ["p3", "p4"]), (True, ["shared"])])
def test_always_adapts_equal_channels(shared, keys):
    student = maps(4, p3=8, p4=4)
    teacher = maps(4, p3=8, p4=4)
    pairs, *views = bound(student, teacher, always=True, shared=shared)
    assert list(pairs.adapters) == keys and not pairs.teacher_adapters
    for name, (adapted, target) in pairs(*views).items():
        adapter = pairs.adapters["shared" if shared else name]
        torch.testing.assert_close(adapted, adapter(student[name]))
        assert torch.equal(target, teacher[name])


def test_a_shared_convolution_of_the_teachers_levels():
    student, teacher = maps(4, p3=8, p4=4), maps(6, p3=8, p4=4)
    pairs, *views = bound(student, teacher, channels=4, shared=True)
    assert list(pairs.state_dict()) == [f"teacher_adapters.shared.{kind}" for kind in ("weight", "bias")]
    adapted, target = pairs(*views)["p4"]
    torch.testing.assert_close(target, pairs.teacher_adapters["shared"](teacher["p4"]))
    assert torch.equal(adapted, student["p4"])


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize(
    "student, teacher",
    [((3, 4), (6, 6)), ((4, 4), (6, 8)), ((6, 4), (6, 6))],
    ids=["of the student", "of the teacher", "one level needs none"],
)
def test_levels_of_unequal_channels_share_nothing(student, teacher, always):
    student = {**maps(student[0], p3=8), **maps(student[1], p4=4)}
    teacher = {**maps(teacher[0], p3=8), **maps(teacher[1], p4=4)}
    message = r"levels \['p3', 'p4'\] share one convolution.*'p3': \(\d, 6\).*do not share it"
    with pytest.raises(ValueError, match=message):
        bound(student, teacher, shared=True, always=always)
    bound(student, teacher, ["p3"], shared=True, always=always)
    bound(student, teacher, always=always)


@pytest.mark.parametrize(
    "options, adapter",
    [
        ({"kernel_size": 3}, "3x3 convolution"),
        ({"kernel_size": 3, "shared": True}, "3x3 convolution"),
        ({"kernel_size": 5, "channels": 8}, "5x5 convolution of each"),
        ({"kernel_size": 3, "channels": 3}, "3x3 convolution of the teacher's"),
        ({"channels": 3, "shared": True, "always": True}, "1x1 convolution of each"),
    ],
)
def test_table_names_the_convolution(options, adapter):
    pairs, *_ = bound(maps(3, p3=5, p4=4), maps(6, p3=4, p4=4), **options)
    student, teacher = {"p3": (3, 5, 5), "p4": (3, 4, 4)}, {"p3": (6, 4, 4), "p4": (6, 4, 4)}
    assert [row[-1] for row in pairs.describe(student, teacher)] == [f"{adapter}, resize", adapter]


# Errors.


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
    view.taps.start()
    teacher.view.taps.start()
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
