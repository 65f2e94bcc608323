"""What an installed wheel holds: the package, all configs, and the packages of projects/."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Packages whose names to pip are others than those to Python.
OTHER_NAMES = {
    "cv2": "opencv-python-headless",
    "faster_coco_eval": "faster-coco-eval",
    "PIL": "Pillow",
    "yaml": "PyYAML",
}
#: Modules that are imported only where the package of an extra is.
OF_EXTRAS = {"fast_coco.py"}
#: What pip does not install for this package.
OWN = {"detectron2", "distill_d2"}
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info", "output", "build")


def copy_sources(folder):
    for name in ("distill_d2", "configs", "projects"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=JUNK)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)


def require_build_backend():
    """Skip where wheels cannot be built without a download: setuptools makes them itself since 70.1."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: no wheel can be built")
    import setuptools

    version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    if version < (70, 1) and importlib.util.find_spec("wheel") is None:
        pytest.skip(
            f"setuptools {setuptools.__version__} needs the package wheel, which is not installed"
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the wheel that `pip wheel .` builds from a copy of the checkout."""
    require_build_backend()
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_sources(source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(output), "."], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = output.glob("distill_d2-*.whl")
    return zipfile.ZipFile(path)


def files_below(folder, *suffixes):
    if not folder.is_dir():
        pytest.skip(f"{folder.name}/ does not exist in this checkout")
    return {path.relative_to(folder) for suffix in suffixes for path in folder.rglob(f"*{suffix}")}


def test_all_configs_are_packaged(wheel):
    expected = {
        f"distill_d2/configs/{path.as_posix()}" for path in files_below(ROOT / "configs", ".yaml", ".py")
    }

    assert expected
    assert expected <= set(wheel.namelist())


def test_all_projects_are_packaged(wheel):
    found = set(files_below(ROOT / "projects", ".py", ".yaml"))
    # projects/<Name>/<package>/... and its plugin; what else lies beside the package is not packaged.
    packaged = {
        path
        for path in found
        if (ROOT / "projects" / path.parts[0] / path.parts[1] / "__init__.py").is_file()
        or path.name.endswith("_plugin.py")
    }
    expected = {f"distill_d2/projects/{'/'.join(path.parts[1:])}" for path in packaged}

    assert "distill_d2/projects/small_resnet/__init__.py" in expected
    assert "distill_d2/projects/small_resnet_plugin.py" in expected
    assert expected <= set(wheel.namelist())


def test_whole_package_and_nothing_else(wheel):
    sources = files_below(ROOT / "distill_d2", ".py", "py.typed")
    modules = {f"distill_d2/{path.as_posix()}" for path in sources}
    names = set(wheel.namelist())

    assert modules <= names
    # No top-level "configs", "projects" or "tests" that would clash with the packages of others.
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"distill_d2"}


def test_metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = wheel.read(name).decode()

    assert "Name: distill_d2\n" in metadata or "Name: distill-d2\n" in metadata
    assert "Requires-Python: >=3.9\n" in metadata
    assert "Requires-Dist: setuptools<81\n" in metadata
    # It is on no package index: pip would fail or fetch somebody else's package of that name.
    assert "Requires-Dist: detectron2" not in metadata


def imported(path, whole):
    """The packages that a file imports: at its top, or also in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is new in Python 3.10")
def test_what_is_imported_is_required(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", wheel.read(name).decode(), re.MULTILINE)
    of_extras = {package for package, rest in lines if "extra ==" in rest}
    required = {package for package, _ in lines} - of_extras
    for path in [*(ROOT / "distill_d2").rglob("*.py"), *(ROOT / "projects").rglob("*.py")]:
        everything = required | of_extras
        at_the_top = everything if path.name in OF_EXTRAS else required
        for whole, known in ((False, at_the_top), (True, everything)):
            packages = {OTHER_NAMES.get(package, package) for package in imported(path, whole)}
            missing = packages - known - OWN - set(sys.stdlib_module_names)
            assert not missing, f"{path} imports {missing}"


@pytest.mark.slow
def test_an_installed_wheel_runs_every_command_in_an_empty_folder(wheel, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "empty"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, wheel.filename], check=True, capture_output=True)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environment["DETECTRON2_DATASETS"] = str(folder / "datasets")
    script = [sys.executable, str(Path(__file__).with_name("wheel_commands.py")), str(site)]
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    command = [sys.executable, str(site / "bin" / "distill-d2"), "--version"]
    version = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert version.stdout.startswith("distill_d2 ")


def test_the_license_is_beside_the_installer_of_detectron2(wheel):
    """Which puts it into the package that it makes."""
    assert wheel.read("distill_d2/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_dockerfile_has_the_steps_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition("```bash\n")[2].partition("```")[0]
    steps = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert steps.pop() == "distill-d2 demo" and "pip install ." in steps
    runs = re.findall(r"^RUN (.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert runs[: len(steps)] == steps
