"""The command distill-d2."""

import importlib
import subprocess
import sys

import pytest

import distill_d2
from distill_d2 import cli


def test_help_and_wrong_arguments_import_nothing_heavy(tmp_path):
    """Importing torch and detectron2 takes seconds."""
    broken = tmp_path / "broken.yaml"
    broken.write_text("MODEL: [")
    train = ["train", "--config-file"]
    wrong = [["trian"], ["train"], [*train, "no.yaml"], [*train, str(broken)]]
    wrong.append([*train, "quickstart/shapes_distill.yaml", "SEED"])
    wrong += [["train", "--confg-file", "x"], ["train", "my.yaml", "SEED", "1"], ["init", "no_data"]]
    wrong += [["predict", "--run", "no_run", "x", "--output", "y"], ["report", "no_evaluations"]]
    code = f"""
import sys
from distill_d2 import cli
for words in [["--help"], *{wrong}, *([name, "--help"] for name in {cli.COMMANDS})]:
    try:
        cli.main(words)
    except SystemExit:
        pass
print(sorted({{"torch", "numpy", "cv2", "detectron2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    messages = [
        "Did you mean train",
        "--config-file is missing",
        "'no.yaml' does not exist",
        "not valid yaml",
    ]
    messages += ["a value after the key SEED", "--confg-file. Did you mean --config-file?"]
    messages += ["a config is given by --config-file", "'no_data' does not exist"]
    messages += ["the run 'no_run' does not exist", "'no_evaluations' does not exist"]
    assert [message for message in messages if message not in done.stderr] == []
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2
    assert "there is no command 'trian'. Did you mean train? Known: " in capsys.readouterr().err


def test_without_detectron2(monkeypatch, capsys, recwarn):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["train", "--config-file", "quickstart/shapes_distill.yaml"])
    assert "distill-d2 train: distill_d2 needs detectron2" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="`distill-d2 install-detectron2`"):
        importlib.reload(distill_d2)
    monkeypatch.setattr("sys.argv", ["/usr/bin/distill-d2", "train"])  # the command has said it
    importlib.reload(distill_d2)
    assert not recwarn.list
    with pytest.raises(ImportError, match="`distill-d2 install-detectron2`"):
        print(distill_d2.Distiller)
