"""distill-d2 compare on methods and seeds that have stored their detections."""

import json
import shutil

import pytest
from coco_case import dataset, detections, evaluated
from made_up import evaluation, run_of

from distill_d2.cli import main
from distill_d2.report.statistics import paired_interval, welch_interval

_SEEDS = (1, 2, 10)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """alone/ and pkd/, whose detections are closer, each with three seeds."""
    root, content = tmp_path_factory.mktemp("made"), dataset(images=20)
    for name, noise in (("alone", 8.0), ("pkd", 4.0)):
        for seed in _SEEDS:
            trained(root / name / f"seed{seed}", content, detections(content, noise, seed))
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    """A copy to change, as the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(folder, content, found):
    """A run's folder with its results, detections and ground truth."""
    ap, ap50 = evaluated(content, found).stats[:2] * 100
    run_of(folder, {"iteration": 9, "bbox/AP": ap, "bbox/AP50": ap50})
    inference = folder / "inference" / "animals_test"
    inference.mkdir(parents=True)
    (inference / "coco_instances_results.json").write_text(json.dumps(found))
    (inference / "ground_truth.json").write_text(json.dumps(content))


def compared(capsys, *arguments):
    assert main(["compare", "--format", "json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", *arguments])
    return capsys.readouterr().err


def test_methods_and_seeds(root, capsys):
    content = compared(capsys, "--runs", "*/seed*", "--bootstrap", "200")
    gains, values = content["gains"], content["bbox"]["AP"]
    assert (gains["baseline"], gains["seeds"]) == ("alone", ["1", "2", "10"])
    pkd = gains["methods"]["pkd"]
    differences = [one - other for one, other in zip(values["pkd"], values["alone"])]
    assert pkd["paired"] and pkd["gains"] == pytest.approx(differences)
    interval = paired_interval(differences)
    assert pkd["over_seeds"]["low"] == pytest.approx(interval.low) and pkd["over_seeds"]["df"] == 2
    images = pkd["over_images"]
    assert 0 < images["low"] < pkd["gain"] < images["high"]
    assert pkd["p_over_seeds"] < 0.05 and pkd["proven"] == "better" and gains["notes"] == []
    # The other way round, it is as certain that the baseline is worse; equal draws give equal intervals.
    turned = compared(capsys, "--runs", "*/seed*", "--bootstrap", "200", "--baseline", "pkd")["gains"]
    alone = turned["methods"]["alone"]
    assert alone["proven"] == "worse" and alone["over_images"]["low"] == pytest.approx(-images["high"])


def test_table(root, capsys):
    assert main(["compare", "--runs", "*/seed*", "--metric", "AP50", "--bootstrap", "0"]) == 0
    text = capsys.readouterr().out.partition("### bbox/AP50: gain over alone\n")[2]
    *_, row = (line for line in text.splitlines() if line.startswith("| pkd"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "1, 2, 10" and len(cells[3].split(", ")) == 3 and cells[4].startswith("+")
    assert (
        "p: corrected" not in text and cells[7:] == []
    )  # one comparison, no images, so nothing is proven


def test_other_seeds(root, capsys):
    """Two common ones are compared seed by seed; without them the runs are independent groups."""
    (root / "pkd/seed10").rename(root / "pkd/seed3")
    found = compared(capsys, "--runs", "*/seed*", "--bootstrap", "0")["gains"]
    assert found["methods"]["pkd"]["seeds"] == ["1", "2"] and "without 10, 3" in found["notes"][0]
    (root / "pkd/seed1").rename(root / "pkd/seed7")
    found = compared(capsys, "--runs", "*/seed*", "--bootstrap", "0")["gains"]
    pkd = found["methods"]["pkd"]
    assert not pkd["paired"] and pkd["gains"] == [] and "(Welch)" in found["notes"][0]
    assert pkd["over_seeds"]["high"] == pytest.approx(
        welch_interval(pkd["values"], found["values"]).high
    )


def test_seed_of_the_config(root, capsys):
    """It comes before the folder's name; equal ones are told."""
    for number, seed in enumerate(_SEEDS):
        (root / f"pkd/seed{seed}/config.yaml").write_text(f"SEED: {_SEEDS[number - 1]}\n")
    found = compared(capsys, "--runs", "*/seed*", "--bootstrap", "0")
    pkd, values = found["gains"]["methods"]["pkd"], found["bbox"]["AP"]
    assert pkd["values"] == [values["pkd"][1], values["pkd"][2], values["pkd"][0]]
    for seed in _SEEDS:
        (root / f"pkd/seed{seed}/config.yaml").write_text("SEED: 42\n")
    (note,) = compared(capsys, "--runs", "*/seed*", "--bootstrap", "0")["gains"]["notes"]
    assert "pkd: several runs have SEED 42" in note


def test_single_runs_have_an_interval_over_images(root, capsys):
    found = compared(capsys, "alone/seed1", "pkd/seed1", "--bootstrap", "200")["gains"]
    pkd = found["methods"]["pkd/seed1"]
    assert pkd["over_images"]["low"] < pkd["gain"] < pkd["over_images"]["high"]
    assert pkd["over_seeds"]["low"] is None and pkd["proven"] == ""


def test_what_a_reader_must_know(root, capsys):
    """Runs that have not come as far as others, and too few draws for a small p."""
    evaluated_line = json.loads((root / "pkd/seed1/metrics.json").read_text())
    (root / "pkd/seed1/metrics.json").write_text(json.dumps({**evaluated_line, "iteration": 5}))
    for name in ("c", "d", "e", "f"):
        shutil.copytree(root / "pkd/seed10", root / name / "seed10")
    found = compared(capsys, "--runs", "*/seed*", "--bootstrap", "199")["gains"]
    assert found["notes"][0].endswith("same iterations: seed1 5, seed2 9, seed10 9")
    assert "199 draws" in found["notes"][1] and "in 5 comparisons: --bootstrap 200" in found["notes"][1]


def test_truth_from_elsewhere(root, capsys):
    """The json that a run's config names, or --truth, where the run has not written one."""
    arguments = ["alone/seed1", "pkd/seed1", "--bootstrap", "100"]
    stored = compared(capsys, *arguments)
    for path in root.glob("*/seed1/inference/animals_test/ground_truth.json"):
        path.replace(root / "truth.json")
    assert "no dataset 'animals_test' is registered here" in refused(capsys, *arguments)
    assert compared(capsys, *arguments, "--truth", "truth.json") == stored
    name = f"animals in {root.name}"
    entry = dict(NAME=name, FORMAT="coco", JSON=str(root / "truth.json"), IMAGES=str(root))
    for run in ("alone/seed1", "pkd/seed1"):
        (root / run / "inference/animals_test").rename(root / run / "inference" / name)
        (root / run / "config.yaml").write_text(
            json.dumps({"DATASETS": {"TEST": [name], "CUSTOM": [entry]}})
        )
    assert compared(capsys, *arguments) == stored


def _lacks_detections(root):
    (root / "pkd/seed2/inference/animals_test/coco_instances_results.json").unlink()


def _other_detections(root):
    shutil.copytree(root / "alone/seed1/inference", root / "pkd/seed2/inference", dirs_exist_ok=True)


def _change_truth(change):
    def change_run(root):
        path = root / "pkd/seed2/inference/animals_test/ground_truth.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return change_run


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (None, ["--runs", "nothing/*"], "--runs 'nothing/*' matches nothing in"),
        (None, ["--runs", "pkd/*"], "all runs are of one kind, 'pkd'"),
        (None, ["--baseline", "icd"], "--baseline 'icd' is none of the runs: alone, pkd"),
        (None, ["--bootstrap", "5"], "--bootstrap 5: expected 0, or at least 100 draws"),
        (None, ["--metric", "segm/AP"], "no such task in common; they have ['bbox']"),
        (None, ["--metric", "AP75"], "bbox/AP75 is not among AP, AP50; choose another metric"),
        (_lacks_detections, [], "seed2/inference' with a run's detections does not exist"),
        (_other_detections, [], "they are of another evaluation"),
        (_change_truth(lambda t: t["images"].pop()), [], "different data: 20 and 19 images"),
        (_change_truth(lambda t: t["annotations"].pop()), [], "objects, 1 of which only one has"),
        (_change_truth(lambda t: t["categories"][0].update(name="wolf")), [], "3 and 3 classes"),
    ],
)
def test_wrong_input(root, capsys, change, arguments, message):
    if change:
        change(root)
    defaults = [] if "--runs" in arguments else ["--runs", "*/seed*"]
    assert message in refused(capsys, *defaults, *arguments)


def test_other_runs_than_those_with_gains_are_as_before(tmp_path, capsys):
    first, second = (run_of(tmp_path / name, evaluation()) for name in "ab")
    assert "gains" not in compared(capsys, first, second)
