"""tools/test_gpu.py, on a CPU: what its checks find, and what it says of them."""

from __future__ import annotations

import json

import pytest
import test_gpu as program
import torch
from gpu_checks import cells, costs, packages, runs, teachers
from gpu_checks.report import Report

from distill_d2.losses import PKD
from distill_d2.testing import Cell, distiller_config, families, save_teacher, tiny_config


def statuses(report):
    return [(result.name, result.status) for result in report.results]


def test_without_a_gpu_nothing_is_claimed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "has_gpu", lambda: False)
    assert program.main(["--json", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out == "test_gpu: torch sees no GPU here; nothing was checked\n"
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_way_to_bring_them(monkeypatch, capsys):
    monkeypatch.setitem(packages.PACKAGES, "no_such_module", "no-such-package")
    assert packages.missing_packages() == ["no_such_module"]
    text = packages.advice(["fvcore", "yacs", "detectron2"])
    assert "missing: fvcore, yacs, detectron2" in text
    assert "pip wheel --no-deps -w wheels fvcore\n" in text
    assert "manylinux_2_28_x86_64" in text and "manylinux2014_x86_64 " in text
    assert "-d wheels yacs\n" in text and "install_detectron2.py --target site" in text
    assert program.main(["--device", "cpu"]) == 1
    assert "no_such_module" in capsys.readouterr().out


def test_a_failure_is_recorded_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fail():
        raise ValueError("planted\nmore")

    def check_runs(report, _device):
        report.run("runs", "first", fail)
        report.run("runs", "second", lambda: "1.5")
        report.start -= 1000
        report.run("runs", "third", fail)

    monkeypatch.setattr(runs, "check_runs", check_runs)
    path = tmp_path / "new" / "results.json"
    words = ["--device", "cpu", "--only", "runs", "--json", str(path)]
    assert program.main(words) == 1
    output = capsys.readouterr().out
    assert "| runs     |      1 |      1 |         1 |" in output
    assert "| runs     | first   | ValueError: planted |" in output and "| 1.5 " in output
    assert "1 of 3 checks failed on" in output
    written = json.loads(path.read_text())
    assert [result["status"] for result in written["results"]] == ["FAIL", "pass", "skipped"]
    assert "in fail" in written["results"][0]["trace"]
    assert written["facts"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "change, broken",
    [
        (lambda term: term, []),
        (lambda term: term * (1.0 if term.item() else 1.0), ["step_does_not_wait"]),
        (lambda term: term * float("inf"), ["finite_in_bfloat16"]),
    ],
)
def test_a_cell(monkeypatch, change, broken):
    class Loss(PKD):
        def forward(self, *views):
            return {name: change(term) for name, term in super().forward(*views).items()}

    cell = Cell(families()["RetinaNet"], Loss(in_features=["p3"]))
    monkeypatch.setattr(cells.Cell, "of_recipe", lambda *_: cell)
    monkeypatch.setattr(cells, "LAWS", [])
    results = cells.check_cell(("PKD", "RetinaNet"), "cpu")
    assert [result.group for result in results if result.status == "FAIL"] == broken
    assert [result.group for result in results] == ["cells", "step_does_not_wait", "finite_in_bfloat16"]


def test_laws_and_refusals_of_cells():
    """On a GPU, in place of equality bit for bit, closeness, which holds on a CPU, too."""
    report = Report(seconds=1000)
    names = [("PKD", "RetinaNet"), ("HeadKD", "RetinaNet")]
    assert set(names) < set(cells.cell_names())
    cells.check_cells(report, names, "cpu", workers=1)
    groups = [result.group for result in report.results]
    assert groups == ["cells", *cells.checks("cpu"), "refused cells"]
    assert not report.failures()
    report.start -= 1000
    cells.check_cells(report, names, "cpu", workers=1)
    assert [result.status for result in report.results[-2:]] == ["skipped"] * 2
    assert not set(cells.EXACT_LAWS) & set(cells.checks("cuda"))
    assert {"off_is_close_to_the_baseline", "finite_in_float16"} < set(cells.checks("cuda"))
    cells.off_is_close_to_the_baseline(Cell(families()["RetinaNet"], PKD(in_features=["p3"])))


def test_prepared_teachers():
    report = Report(seconds=1000)
    teachers.check_teachers(report, "cpu")
    assert statuses(report) == [(f"{name}, float32", "pass") for name in families()]
    with pytest.raises(AssertionError, match="relative errors"):
        teachers.prepared_equals_plain(families()["RetinaNet"], "cpu", "", tolerance=0.0)


def test_whole_runs():
    report = Report(seconds=1000)
    runs.check_runs(report, "cpu")
    assert [status for _, status in statuses(report)] == ["pass"] * 3, report.failures()


def test_costs(tmp_path):
    teacher = save_teacher(tiny_config(width=12), tmp_path / "teacher")
    path = tmp_path / "pkd.yaml"
    path.write_text(distiller_config(tiny_config(), teacher).dump())
    report = Report(seconds=1000)
    costs.measure_costs(report, "cpu", {"PKD": str(path)}, size="64", rounds=2, warmup=1)
    assert statuses(report) == [("PKD, float32", "pass"), ("PKD, mixed", "pass")]
    for row in report.costs:
        assert row["method"] == "PKD" and row["least"] <= row["ratio"] <= row["most"]
        assert row["distilled ms"] > 0 and row["loss ms"] > 0
    assert "distilled MB" in report.table()
