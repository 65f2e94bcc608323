"""tools/benchmark.py on tiny detectors: every promised row, and ratios of paired rounds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks
from tiny import distiller_config, save_teacher, tiny_config

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
STEPS = [
    "student step",
    "teacher part, plain",
    "distilled step",
    "teacher part, prepared",
    "teacher whole, plain",
]
HEADLINE = "distilled step / (student step + teacher part, plain)"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark"]


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """Writes a distillation config whose teacher has a config, but no weights; returns its path."""

    def make(types, family="retinanet"):
        folder = tmp_path_factory.mktemp(family)
        teacher = save_teacher(tiny_config(family, width=12), folder / "teacher")
        (folder / "teacher" / "teacher.pth").unlink()
        path = folder / f"{family}.yaml"
        path.write_text(distiller_config(tiny_config(family), teacher, types).dump())
        return str(path)

    return make


@pytest.fixture(scope="module")
def measured(tool, make_config, tmp_path_factory):
    """(report, what was printed, what was written) of one run."""
    path, printed = tmp_path_factory.mktemp("json") / "report.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = run(tool, make_config(["PKD", "FeatureMimic"]), "--json", str(path))
    return report, printed.getvalue(), json.loads(path.read_text())


def run(tool, config_file, *more):
    arguments = ["--config-file", config_file, "--size", "64", "--rounds", "2", "--threads", "1"]
    return tool.main([*arguments, "--device", "cpu", *more])


def test_every_promised_row_is_printed_and_written(measured):
    report, printed, written = measured
    losses = ["PKD alone", "PKD alone, naive formula", "FeatureMimic alone"]
    assert list(report["rows"]) == STEPS + losses
    assert written == report
    for row in report["rows"].values():
        assert len(row["wall_ms"]) == len(row["process_ms"]) == 2
        assert min(row["wall_ms"]) > 0 and row["peak_mb"] >= 0
    for name in [*report["rows"], *report["ratios"]]:
        assert f"| {name} " in printed
    for fact in ("processor:", "torch:", "threads:   1", "2 images of 64x64", "process time"):
        assert fact in printed


def test_ratios_are_of_each_round(measured):
    report = measured[0]
    assert report["clock"] == "process"
    times = {name: row["process_ms"] for name, row in report["rows"].items()}
    for index, ratio in enumerate(report["ratios"][HEADLINE]):
        floor = times["student step"][index] + times["teacher part, plain"][index]
        assert ratio == pytest.approx(times["distilled step"][index] / floor)
    pkd = report["ratios"]["PKD alone / PKD alone, naive formula"]
    assert pkd[0] == pytest.approx(times["PKD alone"][0] / times["PKD alone, naive formula"][0])


def test_median_and_spread(tool):
    assert tool.spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0 3.0]"
    samples = [tool.Sample(wall=w, process=w / 2) for w in (4.0, 8.0)]
    names = [tool.STUDENT, tool.PART, tool.DISTILLED, tool.PREPARED]
    rounds = {name: samples for name in names}
    report = tool.summarise(rounds, dict.fromkeys(names, 1.0), "wall")
    assert report["ratios"][HEADLINE] == [0.5, 0.5]
    assert report["rows"][tool.STUDENT]["process_ms"] == [2000.0, 4000.0]


def test_two_stage_detector_with_masks_on_oblong_images(tool, make_config):
    config_file = make_config(["FeatureMimic"], family="mask")
    report = run(tool, config_file, "--batch", "1", "--rounds", "1", "--size", "48x80")
    assert list(report["rows"]) == [*STEPS, "FeatureMimic alone"]
    assert "1 images of 48x80" in report["facts"]["batch"]


@pytest.mark.parametrize("mask_format, kind", [("polygon", PolygonMasks), ("bitmask", BitMasks)])
def test_generated_masks_fill_their_boxes(tool, mask_format, kind):
    cfg = tiny_config("mask")
    cfg.INPUT.MASK_FORMAT = mask_format
    args = tool.parse_arguments(["--config-file", "x.yaml", "--size", "40x64", "--objects", "3"])
    for item in tool.generate_inputs(cfg, args, classes=3):
        instances = item["instances"]
        assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 40, 64)
        assert type(instances.gt_masks) is kind and len(instances) == 3
        inside = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.allclose(inside, instances.gt_boxes.tensor, atol=3.0)


def test_weights_stay_and_the_plain_teacher_is_unprepared(tool, make_config):
    args = tool.parse_arguments(["--config-file", make_config(["PKD"]), "--size", "64"])
    cfg = tool.load_config(args.config_file, [])
    subjects = tool.build_subjects(cfg, args)
    before = {k: v.clone() for k, v in subjects.distiller.student.named_parameters()}
    with tool.EventStorage(0):
        for task in tool.build_tasks(subjects).values():
            task()
    after = dict(subjects.distiller.student.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = [
        sum("norm" in name for name in teacher.model.state_dict())
        for teacher in (subjects.plain, subjects.distiller.teacher)
    ]
    assert norms[0] > 0 and norms[1] == 0


def test_naive_pkd_is_our_pkd(tool):
    from distill_d2.losses.pkd import pearson_distance

    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    assert tool.naive_pkd(student, teacher) == pytest.approx(pearson_distance(student, teacher))


def test_peak_memory_counts_what_is_freed_again(tool):
    meter = tool.Meter(torch.device("cpu"))
    if "per row" in meter.memory_note:
        pytest.skip("this system cannot reset its peak memory")
    peak = meter.peak_memory(lambda: torch.ones(2**23))  # 32 MB
    assert 30 < peak < 100


def test_loss_that_starts_later_is_measured_switched_on(tool, make_config):
    opts = ["MODEL.DISTILLER.PKD.START_ITER", "7", "MODEL.DISTILLER.PKD.WARMUP_ITERS", "3"]
    args = tool.parse_arguments(["--config-file", make_config(["PKD"]), "--size", "64", *opts])
    cfg = tool.load_config(args.config_file, args.opts)
    assert tool.build_subjects(cfg, args).iteration == 10


def test_loss_that_is_off_is_refused(tool, make_config):
    with pytest.raises(SystemExit, match="PKD.*WEIGHT is 0"):
        run(tool, make_config(["PKD"]), "MODEL.DISTILLER.PKD.WEIGHT", "0.0")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "x.py"], "only yaml"),
        (["--config-file", "x.yaml", "--size", "1x2x3"], "--size"),
        (["--config-file", "x.yaml", "--size", "0"], "--size 0"),
        (["--config-file", "x.yaml", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_wrong_arguments(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert message in capsys.readouterr().err + str(stop.value)
