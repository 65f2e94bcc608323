"""tools/install_detectron2.py on a small synthetic LabGym wheel; nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOL_PATH = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"

SOURCES = {
    "LabGym/__init__.py": "raise RuntimeError('LabGym itself must not be taken')\n",
    "LabGym/detectron2/__init__.py": '# Copyright\n__version__ = "0.6"\n',
    "LabGym/detectron2/layers.py": "from LabGym.detectron2 import __version__ as version\n",
    "LabGym/detectron2/model_zoo.py": "import LabGym.detectron2.layers\nPACKAGE = 'LabGym.detectron2.model_zoo'\n",
    "LabGym/detectron2/configs/Base.yaml": "VERSION: 2\n",
}
# What the program expects of the real wheel, as it is for the synthetic one.
SMALL = {
    "REQUIRED_FILES": ("detectron2/__init__.py", "detectron2/layers.py"),
    "EXPECTED_FILE_COUNT": 4,
    "VERIFIED_MODULES": ("detectron2", "detectron2.model_zoo"),
}


def load_tool():
    spec = importlib.util.spec_from_file_location("install_detectron2", TOOL_PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_wheel(tmp_path, monkeypatch):
    """Return (tool, make): make(changes) writes a wheel and teaches the tool to accept it."""
    tool = load_tool()
    for name, value in SMALL.items():
        monkeypatch.setattr(tool, name, value)

    def make(changes=None):
        path = write_wheel(tmp_path / "labgym.whl", {**SOURCES, **(changes or {})})
        monkeypatch.setattr(tool, "SOURCE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return tool, make


def write_wheel(path, sources):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in sources.items():
            if text is not None:
                archive.writestr(name, text)
    return path


def run(tool, capsys, wheel, target):
    status = tool.main(["--wheel", str(wheel), "--target", str(target)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(result, target, *fragments):
    status, _, error = result
    assert status == 1
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    for fragment in fragments:
        assert fragment in error
    assert not list(target.glob("*")) if target.is_dir() else True


def test_target_gets_renamed_package_with_metadata(make_wheel, tmp_path, capsys):
    tool, make = make_wheel
    target = tmp_path / "deep" / "target"

    status, out, error = run(tool, capsys, make(), target)

    assert (status, error) == (0, "")
    assert str(target / "detectron2") in out
    assert sorted(entry.name for entry in target.iterdir()) == ["detectron2", tool.DIST_INFO]
    assert (target / "detectron2/model_zoo.py").read_text() == (
        "import detectron2.layers\nPACKAGE = 'detectron2.model_zoo'\n"
    )
    assert (target / "detectron2/configs/Base.yaml").read_text() == "VERSION: 2\n"
    assert (target / "detectron2/__init__.py").read_text().startswith("# Copyright")

    (distribution,) = importlib.metadata.distributions(path=[str(target)], name="detectron2")
    assert distribution.version == tool.VERSION == "0.6+labgym3.1.2"
    assert distribution.metadata["License"] == "Apache-2.0"
    assert "LabGym 3.1.2" in distribution.metadata["Summary"]
    assert "fvcore>=0.1.5" in distribution.requires
    assert distribution.read_text("top_level.txt").strip() == "detectron2"
    assert "Apache License" in distribution.read_text("LICENSE")
    recorded = {str(path) for path in distribution.files}
    assert {"detectron2/__init__.py", "detectron2/layers.py", f"{tool.DIST_INFO}/RECORD"} <= recorded


def test_second_run_leaves_the_first_alone(make_wheel, tmp_path, capsys):
    tool, make = make_wheel
    target = tmp_path / "target"
    wheel = make()
    run(tool, capsys, wheel, target)
    marker = target / "detectron2" / "mine.txt"
    marker.write_text("keep")

    # The wheel is not even looked at.
    status, out, error = run(tool, capsys, tmp_path / "missing.whl", target)

    assert (status, error) == (0, "")
    assert "0.6" in out and str(target) in out and "left alone" in out
    assert marker.read_text() == "keep"


def test_wrong_checksum(make_wheel, tmp_path, capsys, monkeypatch):
    tool, make = make_wheel
    wheel = make()
    found = tool.SOURCE_SHA256
    monkeypatch.setattr(tool, "SOURCE_SHA256", "0" * 64)
    target = tmp_path / "target"

    assert_refused(run(tool, capsys, wheel, target), target, str(wheel), found, "0" * 64)


def test_missing_wheel(make_wheel, tmp_path, capsys):
    tool, _ = make_wheel
    target = tmp_path / "target"

    assert_refused(run(tool, capsys, tmp_path / "no.whl", target), target, "no.whl", "No such file")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"LabGym/detectron2/layers.py": None}, ["detectron2/layers.py missing"]),
        ({"LabGym/detectron2/more.py": ""}, ["5 files", "expected 4"]),
        ({"LabGym/detectron2/layers.py": "import LabGym\n"}, ["left LabGym in detectron2/layers.py"]),
        (
            {"LabGym/detectron2/configs/Base.yaml": "A: labgym\n"},
            ["left LabGym in detectron2/configs/Base.yaml"],
        ),
        ({"LabGym/detectron2/__init__.py": '__version__ = "0.7"\n'}, ["not of version 0.6"]),
    ],
)
def test_implausible_contents(make_wheel, tmp_path, capsys, changes, fragments):
    tool, make = make_wheel
    target = tmp_path / "target"

    assert_refused(run(tool, capsys, make(changes), target), target, *fragments)


def test_what_cannot_be_imported_is_removed_again(make_wheel, tmp_path, capsys):
    tool, make = make_wheel
    target = tmp_path / "target"
    wheel = make({"LabGym/detectron2/layers.py": "raise RuntimeError('boom')\n"})

    assert_refused(run(tool, capsys, wheel, target), target, "RuntimeError: boom", "removed again")


def test_missing_requirement_is_a_note(make_wheel, tmp_path, capsys):
    tool, make = make_wheel
    wheel = make({"LabGym/detectron2/layers.py": "import surely_not_installed\n"})

    status, _, error = run(tool, capsys, wheel, tmp_path / "target")

    assert status == 0
    assert "needs surely_not_installed" in error
    assert (tmp_path / "target" / "detectron2").is_dir()


def test_target_that_is_no_folder(make_wheel, tmp_path, capsys):
    tool, make = make_wheel
    target = tmp_path / "file"
    target.write_text("")

    assert_refused(
        run(tool, capsys, make(), target), target, "cannot write to the target folder", str(target)
    )


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        (None, ["not a Python package"]),
        ("raise RuntimeError('boom')\n", ["importing it fails", "RuntimeError: boom", "left alone"]),
        ("import os\nos._exit(3)\n", ["ends Python with status 3", "left alone"]),
    ],
)
def test_broken_detectron2_is_reported_not_replaced(make_wheel, tmp_path, capsys, source, fragments):
    tool, make = make_wheel
    package = tmp_path / "target" / "detectron2"
    package.mkdir(parents=True)
    if source is not None:
        (package / "__init__.py").write_text(source)
    before = sorted(package.iterdir())

    status, _, error = run(tool, capsys, make(), tmp_path / "target")

    assert status == 1
    assert len(error.strip().splitlines()) == 1
    for fragment in [str(package), *fragments] if "status" not in fragments[0] else fragments:
        assert fragment in error
    assert [path for path in sorted(package.iterdir()) if path.name != "__pycache__"] == before


def test_download_failure(make_wheel, tmp_path, capsys, monkeypatch):
    tool, make = make_wheel
    make()
    # An offline pip, without touching a network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    target = tmp_path / "target"

    status = tool.main(["--target", str(target)])

    captured = capsys.readouterr()
    assert_refused(
        (status, captured.out, captured.err), target, "could not download LabGym==3.1.2", "--wheel FILE"
    )


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory):
    """Return the python of a new virtual environment that holds nothing but pip."""
    folder = tmp_path_factory.mktemp("environment")
    created = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    if created.returncode != 0:
        pytest.skip(f"cannot create a virtual environment: {created.stderr.strip()}")
    return folder / "bin" / "python"


def call(python, *arguments, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, env=environment, **options
    )


def test_install_and_uninstall_with_pip(bare_environment, tmp_path):
    wheel = write_wheel(tmp_path / "labgym.whl", SOURCES)
    constants = {**SMALL, "SOURCE_SHA256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('tool', {str(TOOL_PATH)!r})\n"
        "tool = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tool)\n"
        f"vars(tool).update(json.loads({json.dumps(constants)!r}))\n"
        "sys.exit(tool.main(sys.argv[1:]))\n"
    )
    # A folder of that name where the user stands is no installed detectron2.
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("")

    first = call(bare_environment, str(driver), "--wheel", str(wheel), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    shown = call(bare_environment, "-m", "pip", "show", "detectron2", cwd=tmp_path.parent)
    assert "Version: 0.6+labgym3.1.2" in shown.stdout

    second = call(bare_environment, str(driver), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "left alone" in second.stdout

    removed = call(
        bare_environment, "-m", "pip", "uninstall", "--yes", "detectron2", cwd=tmp_path.parent
    )
    assert removed.returncode == 0, removed.stderr
    packages = bare_environment.parent.parent.glob("lib/python*/site-packages/detectron2*")
    assert list(packages) == []


def test_interrupted_copy_is_repaired(bare_environment, tmp_path):
    """pip was killed before it came to __init__.py: what lies there is no package, and is installed over."""
    tool = load_tool()
    contents = {f"detectron2/{name}": b"" for name in ("__init__.py", "a.py", "z.py")}
    with zipfile.ZipFile(tool.build_wheel(contents, tmp_path)) as archive:
        assert archive.namelist()[-2:] == ["detectron2/__init__.py", f"{tool.DIST_INFO}/RECORD"]

    half_done = tmp_path / "half"
    (half_done / "detectron2").mkdir(parents=True)
    (half_done / "detectron2" / "a.py").write_text("")
    arguments = json.dumps([[str(half_done)], ["detectron2"]])
    report = call(bare_environment, "-c", tool.PROBE, arguments, cwd=tmp_path.parent)
    assert json.loads(report.stdout) == {"path": None}
