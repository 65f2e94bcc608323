"""tools/compare_results.py on made-up metrics."""

import json

import compare_results as tool
import pytest


def run_of(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def evaluation(shift=0.0, prefix="bbox", **more):
    values = {"AP": 40.0, "AP50": 60.0, "AP50-dog": 70.0, "AP50-tv-set": 50.0, **more}
    scalars = {f"{prefix}/{name}": value + shift for name, value in values.items()}
    return {"iteration": 1, "time": 0.5, **scalars}


def table(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


def test_classes_side_by_side(tmp_path, capsys):
    """The last evaluation of each run counts, and the difference is to the first."""
    first = run_of(tmp_path / "student", evaluation(9.0), {"total_loss": 1.0}, evaluation())
    second = run_of(tmp_path / "distilled", evaluation(1.5), {"total_loss": 0.5})
    tool.main([first, second])
    header, rows = table(capsys)
    assert header == ["", "student", "distilled", "distilled - first"]
    assert list(rows) == ["dog", "tv-set", "AP", "AP50"]
    assert rows["dog"] == ["70.00", "71.50", "1.50"] and rows["AP"] == ["40.00", "41.50", "1.50"]


def test_several_runs_of_one_name(tmp_path, capsys):
    runs = [run_of(tmp_path / seed / "run", evaluation(i)) for i, seed in enumerate("123")]
    tool.main(runs)
    header, rows = table(capsys)
    assert header[1:4] == runs and rows["AP50"] == ["60.00", "61.00", "62.00", "1.00", "2.00"]


def test_several_datasets_and_tasks(tmp_path, capsys):
    lines = {**evaluation(prefix="voc/bbox"), **evaluation(prefix="coco/bbox")}
    other = evaluation(prefix="voc/bbox")
    tool.main([run_of(tmp_path / "a", lines), run_of(tmp_path / "b", other)])
    output = capsys.readouterr().out
    assert "voc/bbox\n|" in output and "coco/bbox" not in output


def test_metrics_that_one_lacks_are_left_out(tmp_path, capsys):
    tool.main([run_of(tmp_path / "a", evaluation(APs=1.0)), run_of(tmp_path / "b", evaluation())])
    assert "APs" not in table(capsys)[1]


@pytest.mark.parametrize(
    "lines, message",
    [
        (None, "metrics.json' does not exist; expected the OUTPUT_DIR"),
        ([{"total_loss": 1.0}], "holds no evaluation"),
        ([evaluation(prefix="segm")], "no metrics in common"),
        ("{", "line 1, is not JSON"),
    ],
)
def test_nothing_to_compare(tmp_path, lines, message):
    good = run_of(tmp_path / "good", evaluation())
    bad = str(tmp_path / "bad") if lines is None else run_of(tmp_path / "bad", *lines)
    if lines == "{":
        (tmp_path / "bad" / "metrics.json").write_text(lines)
    with pytest.raises(SystemExit, match=message):
        tool.main([good, bad])
