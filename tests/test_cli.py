"""The command distill-d2."""

import subprocess
import sys

import pytest

from distill_d2 import cli


def test_help_and_wrong_arguments_import_nothing_heavy():
    """Importing torch and detectron2 takes seconds."""
    code = f"""
import sys
from distill_d2 import cli
for words in [["--help"], ["trian"], *([name, "--help"] for name in {cli.COMMANDS})]:
    try:
        cli.main(words)
    except SystemExit:
        pass
print(sorted({{"torch", "numpy", "cv2", "detectron2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["trian"])
    assert end.value.code == 2
    assert "there is no command 'trian'. Did you mean train? Known: " in capsys.readouterr().err
