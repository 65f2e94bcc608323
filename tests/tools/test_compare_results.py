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
    """A metric that one of them lacks is left out."""
    runs = [run_of(tmp_path / seed / "run", evaluation(i)) for i, seed in enumerate("12")]
    tool.main([run_of(tmp_path / "0" / "run", evaluation(APs=1.0)), *runs])
    header, rows = table(capsys)
    assert header[1:4] == [str(tmp_path / seed / "run") for seed in "012"] and "APs" not in rows
    assert rows["AP50"] == ["60.00", "60.00", "61.00", "0.00", "1.00"]


def test_several_datasets(tmp_path, capsys):
    lines = {**evaluation(prefix="voc/bbox"), **evaluation(prefix="coco/bbox")}
    other = evaluation(prefix="voc/bbox")
    tool.main([run_of(tmp_path / "a", lines), run_of(tmp_path / "b", other)])
    output = capsys.readouterr().out
    assert "voc/bbox\n|" in output and "coco/bbox" not in output


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "metrics.json' does not exist; expected the OUTPUT_DIR"),
        ('{"total_loss": 1.0}', "holds no evaluation"),
        ('{"segm/AP": 1.0}', "no metrics in common"),
        ("{", "line 1, is not JSON"),
        ("[1]", "line 1, holds no numbers by name"),
    ],
)
def test_nothing_to_compare(tmp_path, capsys, text, message):
    good, bad = run_of(tmp_path / "good", evaluation()), tmp_path / "bad"
    bad.mkdir()
    if text is not None:
        (bad / "metrics.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        tool.main([good, str(bad)])
    assert message in capsys.readouterr().err
