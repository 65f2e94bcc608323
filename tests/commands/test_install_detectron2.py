"""distill-d2 install-detectron2 with a small synthetic wheel of LabGym; nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wheel
from wheel.wheelfile import WheelFile

from distill_d2 import install_detectron2 as tool

SOURCES = {
    "LabGym/__init__.py": "raise RuntimeError('LabGym itself must not be taken')\n",
    "LabGym/detectron2/__init__.py": "import detectron2.layers\n",
    "LabGym/detectron2/layers.py": "from LabGym.detectron2 import model_zoo\nNAME = 'LabGym.detectron2'\n",
    "LabGym/detectron2/model_zoo.py": "",
    "LabGym/detectron2/configs/Base.yaml": "VERSION: 2\n",
    "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: LabGym\nVersion: 3.1.2\n",
    "labgym-3.1.2.dist-info/WHEEL": tool.WHEEL_FILE,
}


@pytest.fixture
def make_wheel(tmp_path, monkeypatch):
    """Returns make(changes): it writes a wheel of any name and makes the tool accept it."""

    def make(changes=None):
        path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
        with WheelFile(str(path), "w") as file:
            for name, text in {**SOURCES, **(changes or {})}.items():
                file.writestr(name, text)
        monkeypatch.setattr(tool, "SOURCE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path.rename(tmp_path / "downloaded (1).whl")

    monkeypatch.setattr(tool, "VERIFIED_MODULES", "detectron2.model_zoo")
    return make


def run(path, target):
    tool.main(["--wheel", str(path), "--target", str(target)])


def test_target_gets_the_renamed_package_with_metadata(make_wheel, tmp_path, capsys):
    target = tmp_path / "deep" / "target"
    run(make_wheel(), target)
    captured = capsys.readouterr()
    assert str(target) in captured.out and captured.err == ""
    info = f"detectron2-{tool.VERSION}.dist-info"
    assert sorted(entry.name for entry in target.iterdir()) == ["detectron2", info]
    assert (target / "detectron2/layers.py").read_text() == (
        "from detectron2 import model_zoo\nNAME = 'detectron2'\n"
    )
    assert (target / "detectron2/configs/Base.yaml").read_text() == "VERSION: 2\n"
    (distribution,) = importlib.metadata.distributions(path=[str(target)], name="detectron2")
    assert distribution.version == "0.6+labgym3.1.2"
    assert distribution.metadata["License"] == "Apache-2.0"
    assert "LabGym 3.1.2" in distribution.metadata["Summary"]
    assert {"torch", "fvcore>=0.1.5", "yacs>=0.1.8"} <= set(distribution.requires)
    assert "Apache License" in distribution.read_text("LICENSE")
    assert "detectron2/layers.py" in {str(path) for path in distribution.files}


def test_an_installed_detectron2_stays(make_wheel, tmp_path, capsys, monkeypatch):
    """A requirement that it lacks is a note."""
    target = tmp_path / "target"
    path = make_wheel({"LabGym/detectron2/layers.py": "import surely_not_installed\n"})
    run(path, target)
    assert "detectron2 needs surely_not_installed" in capsys.readouterr().err
    (target / "detectron2" / "mine.txt").write_text("keep")
    monkeypatch.setattr(tool, "SOURCE_SHA256", "")  # the wheel is not even read
    run(path, target)
    assert f"already installed ({target / 'detectron2'})" in capsys.readouterr().out
    assert (target / "detectron2" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "is not a Python package"),
        ("raise RuntimeError('boom')\n", "imported: RuntimeError: boom. Repair it or remove it"),
        ("import os\nos._exit(3)\n", "cannot be imported: exit status 3"),
        ("import detectron2.missing\n", "No module named 'detectron2.missing'"),
    ],
)
def test_a_broken_detectron2_is_reported_not_replaced(make_wheel, tmp_path, source, message):
    package = tmp_path / "target" / "detectron2"
    package.mkdir(parents=True)
    if source is not None:
        (package / "__init__.py").write_text(source)
    with pytest.raises(SystemExit, match=message):
        run(make_wheel(), tmp_path / "target")
    assert {path.name for path in package.iterdir()} <= {"__init__.py", "__pycache__"}


def test_another_file_or_a_failing_program(make_wheel, tmp_path, monkeypatch):
    path, target = make_wheel(), tmp_path / "target"
    found = tool.SOURCE_SHA256
    monkeypatch.setattr(tool, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match=rf"{found}, expected {'0' * 64} \(LabGym==3.1.2\)"):
        run(path, target)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "no.whl", target)
    assert not target.exists()
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as without a network
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match="`pip .*LabGym==3.1.2` failed: ERROR: .*LabGym==3.1.2"):
        tool.main(["--target", str(target)])
    with pytest.raises(SystemExit, match="no module surely_missing; `pip install surely_missing`"):
        tool.run_module("surely_missing")


def test_install_and_uninstall_with_pip(make_wheel, tmp_path):
    """In a virtual environment that holds nothing but pip and what the tool needs."""
    created = subprocess.run(
        [sys.executable, "-m", "venv", str(tmp_path / "venv")], capture_output=True, text=True
    )
    if created.returncode:
        pytest.skip(f"cannot create a virtual environment: {created.stderr.strip()}")
    path = make_wheel()
    constants = {name: getattr(tool, name) for name in ("SOURCE_SHA256", "VERIFIED_MODULES")}
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path.append({str(Path(tool.__file__).parent)!r})\n"
        f"import install_detectron2 as tool\nvars(tool).update({json.dumps(constants)})\ntool.main()\n"
    )
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in ("wheel", "packaging"):
        (libraries / name).symlink_to(Path(wheel.__file__).parents[1] / name)
    elsewhere = tmp_path / "elsewhere"  # a folder of that name where the user stands is not installed
    (elsewhere / "detectron2").mkdir(parents=True)
    (elsewhere / "detectron2" / "__init__.py").write_text("")

    def call(*arguments):
        command = [str(tmp_path / "venv" / "bin" / "python"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(libraries)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=elsewhere)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "installed detectron2 0.6+labgym3.1.2" in call(driver, "--wheel", path)
    assert "Version: 0.6+labgym3.1.2" in call("-m", "pip", "show", "detectron2")
    assert "left as it is" in call(driver, "--wheel", path)
    call("-m", "pip", "uninstall", "--yes", "detectron2")
    assert not list((tmp_path / "venv").glob("lib/python*/site-packages/detectron2*"))
