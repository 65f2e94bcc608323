"""Sizes and times of detectors side by side."""

import json

import pytest
import torch

from distill_d2.cli import main
from distill_d2.profiling.measure import Profile, gflops
from distill_d2.profiling.onnx import onnx_milliseconds
from distill_d2.profiling.parts import parameters, time_shares
from distill_d2.profiling.subjects import find_subjects
from distill_d2.profiling.words import verdict
from distill_d2.testing import distiller_config, save_teacher, short_yaml, tiny_config, tiny_detector


def test_a_distillation_has_a_student_and_its_teacher(tmp_path, capsys):
    teacher = save_teacher(tiny_config("faster", width=16), tmp_path / "teacher")
    (tmp_path / "pkd.yaml").write_text(short_yaml(distiller_config(tiny_config("faster"), teacher)))
    words = [
        "--size",
        "64x96",
        "--seconds",
        "0.1",
        "--no-onnx",
        "--json",
        str(tmp_path / "profile.json"),
    ]
    assert main(["profile", "--device", "cpu", "--config-file", str(tmp_path / "pkd.yaml"), *words]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["pkd"]["teacher"] == "teacher" and found["pkd"]["size"] == [64, 96]
    student, teacher = (found[name]["parameters"]["backbone"] for name in ("pkd", "teacher"))
    assert 3 < teacher / student < 5
    assert len({len(each["milliseconds"]) for each in found.values()}) == 1
    for each in found.values():
        assert sum(each["shares"].values()) == pytest.approx(1)
        assert each["milliseconds_per_image"] > 0 and each["gflops"]["backbone"] > 0
    printed = capsys.readouterr().out
    assert "Random weights, which find other objects than trained ones: pkd." in printed
    assert "in parentheses the ratio to teacher" in printed


def test_parts_of_a_detector():
    model = tiny_detector().eval()
    item = {"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}
    counts, whole = parameters(model), sum(p.numel() for p in model.parameters())
    assert sum(counts.values()) == whole
    assert counts["head"] == sum(p.numel() for p in model.head.parameters())
    work = gflops(model, item)
    # 3x3, 16 to 16 channels, twice, to 3 classes and 4 coordinates, at 16^2 + 8^2 + 4^2 places
    assert work["head"] == pytest.approx(9 * 16 * (16 * 2 + 3 * 3 + 3 * 4) * 336 / 1e9, rel=0.01)
    slow = model.head.forward
    model.head.forward = lambda *inputs: [slow(*inputs) for _ in range(20)][0]
    assert max(time_shares(model, [item]).items(), key=lambda each: each[1])[0] == "head"


def test_words_on_a_student_that_is_hardly_faster():
    def of(milliseconds, backbone):
        shares = {"backbone": 0.2, "neck": 0.0, "head": 0.7, "pre- and post-processing": 0.1}
        return Profile((64, 64), {"backbone": backbone, "head": 1}, {}, 1.0, milliseconds, shares)

    names, config = ("student", "teacher"), tiny_config()
    text = verdict(of([9.0, 18.0, 9.0], 1), of([10.0, 20.0, 10.0], 5), names, config)
    assert "has 0.33 of the parameters of teacher, but 0.90 of its time: 70% goes to the head" in text
    assert "as large in both" in text and "MODEL.RETINANET.NUM_CONVS" in text
    assert verdict(of([4.0], 1), of([10.0], 5), names).startswith("student is 2.5 times as fast")
    assert verdict(of([9.0], 5), of([10.0], 5), names).startswith("student takes 0.90 of the time")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "nothing to measure; give --run"),
        (["--config-file", "quickstart/shapes_student.yaml", "--size", "axb"], "--size axb: expected"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_onnxruntime_takes_part():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    models = {"RetinaNet": tiny_detector().eval(), "semantic": _Semantic().eval()}
    inputs = {name: [{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}] for name in models}
    times, problems = onnx_milliseconds(models, inputs, seconds=0.1)
    assert list(times) == ["RetinaNet"] and min(times["RetinaNet"]) > 0
    assert "finds no objects" in problems["semantic"]


class _Semantic(torch.nn.Module):
    def forward(self, batch):
        return [{"sem_seg": batch[0]["image"]}]


def test_runs_without_a_known_teacher_are_compared_with_the_largest(tmp_path):
    runs = [save_teacher(tiny_config(width=width), tmp_path / str(width)) for width in (8, 16)]
    small, large = find_subjects(runs, []).values()
    assert (small.teacher, large.teacher) == ("16/teacher", "") and small.trained
