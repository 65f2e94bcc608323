"""distill-d2 compare on made-up metrics."""

import json

import pytest
from made_up import evaluation, run_of

from distill_d2.cli import main
from distill_d2.run_files import EVALUATIONS


def tables(capsys, *arguments):
    """By title: the header, and the cells of each row by its name."""
    assert main(["compare", *arguments]) == 0
    found = {}
    for text in capsys.readouterr().out.split("### ")[1:]:
        title, *lines = text.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
        found[title] = cells[0][1:], {row[0]: row[1:] for row in cells[2:]}
    return found


def test_classes_side_by_side(tmp_path, capsys):
    """The last evaluation of each run counts, the difference is to the first, and classes have a table of their
    own, which names their metric."""
    first = run_of(
        tmp_path / "student", evaluation(9.0), {"iteration": 2, "total_loss": 1.0}, evaluation()
    )
    second = run_of(tmp_path / "distilled", evaluation(1.5, APs=3.0), {"total_loss": 0.5})
    found = tables(capsys, first, second)
    assert list(found) == ["bbox", "bbox, AP50 per class"]
    header, rows = found["bbox"]
    assert header == ["student", "distilled", "distilled - student"]
    assert rows["AP"] == ["40.00", "41.50", "+1.50"] and rows["APs"] == ["-", "4.50", "-"]
    assert found["bbox, AP50 per class"][1] == {
        "dog": ["70.00", "71.50", "+1.50"],
        "tv-set": ["50.00", "51.50", "+1.50"],
    }


def test_one_run_and_its_file(tmp_path, capsys):
    run = run_of(tmp_path / "run", evaluation())
    assert tables(capsys, run) == tables(capsys, run + "/metrics.json")


def test_several_seeds_are_one_column(tmp_path, capsys):
    for seed in (1, 2, 3):
        run_of(tmp_path / f"pkd-{seed}", evaluation(float(seed)))
    alone = run_of(tmp_path / "alone", evaluation(), name=EVALUATIONS)
    arguments = [alone, f"PKD={tmp_path}/pkd-1,{tmp_path}/pkd-[23]"]
    header, rows = tables(capsys, *arguments)["bbox"]
    assert header == ["alone", "PKD", "PKD - alone"]
    assert rows["AP"] == ["40.00", "42.00 ± 1.00", "+2.00"]
    main(["compare", "--format", "json", *arguments])
    content = json.loads(capsys.readouterr().out)
    assert content["bbox"]["AP50-dog"] == {"alone": [70.0], "PKD": [71.0, 72.0, 73.0]}


def test_training_comes_before_a_later_evaluation(tmp_path, capsys):
    """Unless the file is named; equal names become paths."""
    run = run_of(tmp_path / "run", evaluation())
    run_of(
        tmp_path / "run", {"time": "2026-01-01", "weights": "w.pth", "bbox/AP": 10.0}, name=EVALUATIONS
    )
    header, rows = tables(capsys, run, f"{run}/{EVALUATIONS}")["bbox"]
    assert header[:2] == [run, f"{run}/{EVALUATIONS}"] and rows["AP"] == ["40.00", "10.00", "-30.00"]


def test_several_datasets(tmp_path, capsys):
    lines = {**evaluation(prefix="voc/bbox"), **evaluation(prefix="coco/bbox")}
    other = run_of(tmp_path / "b", evaluation(prefix="voc/bbox"))
    found = tables(capsys, run_of(tmp_path / "a", lines), other)
    assert list(found) == ["voc/bbox", "voc/bbox, AP50 per class"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds neither metrics.json nor evaluations.json; expected the OUTPUT_DIR"),
        ('{"total_loss": 1.0}', "no evaluation is there"),
        ('{"segm/AP": 1.0}', "no metrics in common (good: bbox; bad: segm)"),
        ("{\n", "line 1, is not JSON"),
        ("[1]", "line 1, holds no numbers by name"),
    ],
)
def test_nothing_to_compare(tmp_path, capsys, text, message):
    good, bad = run_of(tmp_path / "good", evaluation()), tmp_path / "bad"
    bad.mkdir()
    if text is not None:
        (bad / "metrics.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", good, str(bad)])
    assert message in capsys.readouterr().err


def test_torn_last_line_of_a_killed_run(tmp_path, capsys):
    run = run_of(tmp_path / "run", evaluation())
    whole = tables(capsys, run)
    with open(f"{run}/metrics.json", "a") as file:
        file.write('{"iteration": 2, "bbox/A')
    assert tables(capsys, run) == whole


def test_folder_of_runs(tmp_path, capsys):
    run_of(tmp_path / "good", evaluation())
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(tmp_path)])
    assert "runs are in it: good" in capsys.readouterr().err
    (tmp_path / "pkd.pth").write_bytes(b"PK")
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(tmp_path / "pkd.pth")])
    assert "is no file of evaluations" in capsys.readouterr().err


def test_name_without_a_run(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "alone="])
    assert "'alone=' names no run" in capsys.readouterr().err
