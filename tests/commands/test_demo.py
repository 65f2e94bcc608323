"""distill-d2 demo: what it tells of its runs, and how it ends when one fails."""

import json
import re
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model

from distill_d2 import cli, demo
from distill_d2.testing import tiny_config, use_dataset, write_dataset


def write_run(folder, entry, width, ap):
    """What the demo reads of a training."""
    cfg = tiny_config("retinanet", width=width)
    use_dataset(cfg, entry)
    cfg.VERSION = 2
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    lines = [
        {"bbox/AP": 0.0},
        {f"bbox/{score}": ap for score in ("AP", "AP50", "AP75")},
        {"total_loss": 1},
    ]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))


def test_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_TIMED", 2)
    entry = write_dataset(tmp_path / "data")
    for name, width, ap in (("teacher", 32, 50.0), ("student", 8, 20.5), ("pkd", 8, 30.0)):
        write_run(tmp_path / name, entry, width, ap)
    demo.print_comparison(tmp_path, ["pkd"], 120.0)
    output = capsys.readouterr().out
    rows = {line.split()[1]: line.split()[3::2] for line in output.splitlines() if line.startswith("| ")}
    assert float(rows["teacher"][0]) > 4 * float(rows["student"][0]) > 0
    assert all(float(rows[name][1]) > 0 for name in ("teacher", "student", "pkd"))
    assert rows["pkd"][2:] == ["30.0"] * 3
    assert re.search(r"^the student is \d+\.\d times as fast as its teacher", output, re.MULTILINE)
    assert "pkd - student: +9.5 AP; 2.0 minutes in all" in output
    assert (
        f"distill-d2 report {tmp_path / 'teacher'} {tmp_path / 'student'} {tmp_path / 'pkd'} " in output
    )
    assert f" --run {tmp_path / 'pkd'} {tmp_path / 'data' / 'images' / '0.png'} " in output


@pytest.mark.parametrize(
    "code, status, shown", [("sys.exit(2)", 2, ["distill-d2 train: no", "file"]), ("1/0", 1, None)]
)
def test_a_failed_run_ends_the_demo(tmp_path, capsys, code, status, shown):
    """With its status; a mistake with its message alone. The other run is stopped."""

    def start(name, code):
        with open(tmp_path / name, "w") as file:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file)
        return demo.Run(process, tmp_path / name)

    other = start("other", "import time; time.sleep(60)")
    code = f"import sys; print('log'); print('distill-d2 train: no\\nfile', flush=True); {code}"
    with pytest.raises(SystemExit) as stopped:
        demo.wait_for([other, start("failing", code)])
    assert stopped.value.code == status and other.process.returncode < 0
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == f"failed; the whole output is in {tmp_path / 'failing'}"
    assert lines == shown if shown else lines[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods", "ssdkd"], "there is no quickstart/shapes_ssdkd.yaml for --dataset shapes"),
        (["--output", __file__], "this folder cannot be made"),
    ],
)
def test_wrong_arguments(capsys, words, message):
    with pytest.raises(SystemExit, match="2") as stopped:
        cli.main(["demo", *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
