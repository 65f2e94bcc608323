#!/usr/bin/env python
"""Install detectron2 into the running environment, without a compiler.

detectron2 has no release on the package index. The wheel of LabGym carries a complete copy of its
Python sources, so this program takes that copy out of one pinned, checked wheel, names it
``detectron2`` again and lets pip install it, with metadata of its own: ``pip show detectron2`` and
``pip uninstall detectron2`` work. Only the compiled part (``detectron2._C``) is missing.

A detectron2 that is already importable is left alone::

    python tools/install_detectron2.py                # download and install
    python tools/install_detectron2.py --wheel FILE   # from a local LabGym wheel, without a network
    python tools/install_detectron2.py --target DIR   # into a folder, for PYTHONPATH
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOURCE_NAME = "LabGym"
SOURCE_VERSION = "3.1.2"
SOURCE_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
SOURCE_FOLDER = f"{SOURCE_NAME}/detectron2/"
SOURCE_PACKAGE = f"{SOURCE_NAME}.detectron2"

DETECTRON2_VERSION = "0.6"
# The local part keeps this copy apart from an official 0.6, which has the compiled `_C`.
VERSION = f"{DETECTRON2_VERSION}+{SOURCE_NAME.lower()}{SOURCE_VERSION}"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
WHEEL_FILE_NAME = f"detectron2-{VERSION}-py3-none-any.whl"

PACKAGE_INIT = "detectron2/__init__.py"
REQUIRED_FILES = (
    PACKAGE_INIT,
    "detectron2/checkpoint/detection_checkpoint.py",
    "detectron2/config/defaults.py",
    "detectron2/data/build.py",
    "detectron2/engine/defaults.py",
    "detectron2/evaluation/coco_evaluation.py",
    "detectron2/layers/__init__.py",
    "detectron2/model_zoo/configs/Base-RetinaNet.yaml",
    "detectron2/model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "detectron2/modeling/meta_arch/retinanet.py",
    "detectron2/structures/boxes.py",
    "detectron2/utils/env.py",
)
EXPECTED_FILE_COUNT = 306

# Imported after the installation: together they pull in nearly the whole package.
VERIFIED_MODULES = ("detectron2", "detectron2.engine", "detectron2.model_zoo", "detectron2.modeling")

# What detectron2 itself imports. setup.py installs these; here they are only written down.
REQUIREMENTS = (
    "torch",
    "torchvision",
    "numpy",
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "setuptools<81",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

METADATA_HEADER = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: detectron2 {DETECTRON2_VERSION} without its compiled part, from the {SOURCE_NAME} {SOURCE_VERSION} wheel
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Classifier: License :: OSI Approved :: Apache Software License
Requires-Python: >=3.7
"""

METADATA_BODY = f"""\

The Python sources of detectron2 {DETECTRON2_VERSION} as {SOURCE_NAME} {SOURCE_VERSION} ships them in its package
`{SOURCE_PACKAGE}`, repackaged by tools/install_detectron2.py of distill_d2. The only change to the
files is the name: `{SOURCE_PACKAGE}` is `detectron2` again. The compiled extension
`detectron2._C` (deformable convolution, rotated boxes, fast COCO evaluation) is not included.
"""

WHEEL_METADATA = """\
Wheel-Version: 1.0
Generator: distill_d2 tools/install_detectron2.py
Root-Is-Purelib: true
Tag: py3-none-any
"""

# Runs in a fresh interpreter, so that a crashing or half-imported detectron2 cannot harm this one.
PROBE = """
import importlib, importlib.util, json, sys
first_paths, modules = json.loads(sys.argv[1])
# "-c" puts the working directory first; a folder that happens to be called detectron2 must not count.
sys.path[:] = first_paths + [entry for entry in sys.path if entry]
spec = importlib.util.find_spec("detectron2")
# A folder without __init__.py is what an interrupted installation leaves: not a detectron2.
report = {"path": spec.origin if spec is not None else None}
if report["path"] is not None:
    try:
        for name in modules:
            importlib.import_module(name)
        report["version"] = str(getattr(sys.modules["detectron2"], "__version__", "of unknown version"))
    except BaseException as error:
        report["error"] = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            report["missing"] = error.name
print(json.dumps(report))
"""


class InstallError(Exception):
    """The installation cannot go on; the message says what was found, expected and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = parse_arguments(arguments)
    try:
        install(options.wheel, options.target)
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted; nothing was installed", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"install_detectron2: {error}; nothing was installed", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Install detectron2 (Python part) into the running environment. "
        "A detectron2 that is already importable is left alone."
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help=f"take detectron2 out of this local {SOURCE_NAME} {SOURCE_VERSION} wheel instead of downloading it",
    )
    parser.add_argument(
        "--target",
        type=Path,
        metavar="DIR",
        help="install into this folder instead of the environment; only this folder is looked at",
    )
    return parser.parse_args(arguments)


def install(wheel: Path | None = None, target: Path | None = None) -> None:
    """Install detectron2, unless it is there already.

    Args:
        wheel: a local LabGym wheel; None downloads it.
        target: the folder to install into; None means the running environment.

    Raises:
        InstallError: nothing was installed.
    """
    target = target and target.absolute()
    existing = find_existing(target)
    if existing is not None:
        print(f"detectron2 {existing['version']} is already installed ({existing['path']}); left alone")
        return

    with tempfile.TemporaryDirectory(prefix="install-detectron2-") as work:
        source = wheel or download_source(Path(work))
        check_sha256(source)
        files = rename_package(read_package(source))
        check_files(files)
        built = build_wheel(files, Path(work))
        # From here on it is all or nothing, and a matter of seconds.
        with uninterrupted():
            place(built, target)
            report = verify(target)

    print(f"installed detectron2 {VERSION} from {SOURCE_NAME} {SOURCE_VERSION} ({report['path']})")
    if target is not None:
        print(f"to use it, put {target} on PYTHONPATH; to remove it, delete its two detectron2* folders")
    if "missing" in report:
        print(
            f"install_detectron2: note: detectron2 needs {report['missing']}, which this Python lacks; "
            "`pip install .` in the folder of distill_d2 installs everything it needs",
            file=sys.stderr,
        )


def find_existing(target: Path | None) -> dict[str, str] | None:
    """Return the path and version of the detectron2 that is there; None if there is none."""
    if target is None:
        report = probe(None, ("detectron2",))
    elif not os.path.lexists(target / "detectron2"):
        return None
    elif (target / PACKAGE_INIT).is_file():
        report = probe(target, ("detectron2",))
    else:
        raise InstallError(
            f"{target / 'detectron2'} exists but is not a Python package (it has no __init__.py); "
            "remove it, or choose another --target"
        )

    if report["path"] is None:
        return None
    if "error" in report:
        raise InstallError(
            f"a detectron2 is installed ({report['path']}), but importing it fails: {report['error']}. "
            "It was left alone: repair it or remove it (`pip uninstall detectron2`), then run this again"
        )
    return report


def probe(target: Path | None, modules: Sequence[str]) -> dict[str, str]:
    """Import modules of detectron2 in a fresh interpreter; report path, version, error and what is missing."""
    first_paths = [] if target is None else [str(target)]
    command = [sys.executable, "-c", PROBE, json.dumps([first_paths, list(modules)])]
    result = subprocess.run(command, capture_output=True, text=True)
    try:
        # Imports may print; the report is the last line.
        return json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise InstallError(
            f"importing detectron2 ends Python with status {result.returncode}: {last_line(result.stderr)}. "
            "It was left alone: repair it or remove it (`pip uninstall detectron2`), then run this again"
        ) from None


def download_source(folder: Path) -> Path:
    """Let pip download the pinned wheel, from whichever index or mirror pip is configured for."""
    print(f"downloading {SOURCE_NAME} {SOURCE_VERSION} (1.9 MB), which carries detectron2", flush=True)
    requirement = f"{SOURCE_NAME}=={SOURCE_VERSION}"
    # Only files are taken out of the wheel: its dependencies and its Requires-Python do not matter.
    options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder)]
    run_pip(
        ["download", *options, requirement],
        f"pip could not download {requirement}",
        "check the network and pip's index settings, or pass a copy of the wheel with --wheel FILE",
    )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise InstallError(
            f"`pip download {requirement}` left {len(wheels)} wheels, expected one; pass a copy with --wheel FILE"
        )
    return wheels[0]


def run_pip(arguments: list[str], failure: str, advice: str) -> None:
    """Run pip in this environment; raise InstallError("failure: pip's reason; advice") if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    # "replace": pip's output may quote a path that is no valid text.
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode == 0:
        return
    if "No module named pip" in result.stdout:
        raise InstallError(
            f"{failure}: {sys.executable} has no pip; install it (`python -m ensurepip`) first"
        )
    reasons = [
        line[len("ERROR:") :].strip() for line in result.stdout.splitlines() if line.startswith("ERROR:")
    ]
    raise InstallError(f"{failure}: {' '.join(reasons) or last_line(result.stdout)}; {advice}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def check_sha256(wheel: Path) -> None:
    """Accept only the one file that this program knows."""
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(
            f"cannot read the wheel {wheel}: {error.strerror}; expected the {SOURCE_NAME} {SOURCE_VERSION} wheel"
        ) from None
    if digest != SOURCE_SHA256:
        raise InstallError(
            f"{wheel} has sha256 {digest}, expected {SOURCE_SHA256} ({SOURCE_NAME} {SOURCE_VERSION}); "
            "it is another file or damaged: download it again"
        )


def read_package(wheel: Path) -> dict[str, bytes]:
    """Read detectron2 out of the wheel: {"detectron2/...": content}."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.startswith(SOURCE_FOLDER) and not name.endswith("/")
        ]
        return {"detectron2/" + name[len(SOURCE_FOLDER) :]: archive.read(name) for name in names}


def rename_package(files: dict[str, bytes]) -> dict[str, bytes]:
    """Give the package its own name back, in import statements and in strings alike."""
    old, new = SOURCE_PACKAGE.encode(), b"detectron2"
    return {name: content.replace(old, new) for name, content in files.items()}


def check_files(files: dict[str, bytes]) -> None:
    """Refuse anything but a complete, completely renamed detectron2 of the expected version."""
    missing = [name for name in REQUIRED_FILES if name not in files]
    if missing:
        raise InstallError(
            f"the wheel holds no complete detectron2: {', '.join(missing)} missing; nothing was installed"
        )
    if len(files) != EXPECTED_FILE_COUNT:
        raise InstallError(
            f"the wheel holds {len(files)} files of detectron2, expected {EXPECTED_FILE_COUNT}; nothing installed"
        )
    leftover = [
        name for name, content in files.items() if SOURCE_NAME.lower().encode() in content.lower()
    ]
    if leftover:
        raise InstallError(
            f"renaming {SOURCE_PACKAGE} to detectron2 left {SOURCE_NAME} in {', '.join(leftover)}; "
            "nothing was installed"
        )
    if f'__version__ = "{DETECTRON2_VERSION}"'.encode() not in files[PACKAGE_INIT]:
        raise InstallError(
            f"{PACKAGE_INIT} in the wheel is not of version {DETECTRON2_VERSION}; nothing was installed"
        )


def build_wheel(files: dict[str, bytes], folder: Path) -> Path:
    """Write a wheel that holds the files and their metadata; return its path."""
    contents = {name: content for name, content in sorted(files.items()) if name != PACKAGE_INIT}
    contents.update(distribution_metadata())
    # pip copies in this order. With __init__.py last, a copy that was cut short (a killed process) is no
    # package: the next run sees no detectron2 and installs over it.
    contents[PACKAGE_INIT] = files[PACKAGE_INIT]
    contents[f"{DIST_INFO}/RECORD"] = record_of(contents)

    path = folder / WHEEL_FILE_NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def distribution_metadata() -> dict[str, bytes]:
    """Return the files of the .dist-info folder, RECORD excepted."""
    requirements = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
    texts = {
        "METADATA": METADATA_HEADER + requirements + METADATA_BODY,
        "WHEEL": WHEEL_METADATA,
        "top_level.txt": "detectron2\n",
    }
    metadata = {f"{DIST_INFO}/{name}": text.encode() for name, text in texts.items()}
    # detectron2 and distill_d2 share one licence, Apache 2.0, whose text belongs to every copy.
    licence = Path(__file__).resolve().parent.parent / "LICENSE"
    if licence.is_file():
        metadata[f"{DIST_INFO}/LICENSE"] = licence.read_bytes()
    return metadata


def record_of(contents: dict[str, bytes]) -> bytes:
    """Return the wheel's RECORD: one line "path,sha256=digest,size" per file, and RECORD itself."""
    lines = []
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}\n")
    lines.append(f"{DIST_INFO}/RECORD,,\n")
    return "".join(lines).encode()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM, for us and for pip: a child inherits which signals are ignored."""
    previous = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def place(wheel: Path, target: Path | None) -> None:
    """Let pip install the wheel into the environment or, at one stroke, into the target folder."""
    if target is None:
        pip_install(wheel, ["--force-reinstall"])
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Inside the target, hence on the same disk: moving a finished folder cannot stop half-way.
        with tempfile.TemporaryDirectory(prefix=".detectron2-", dir=target) as stage:
            pip_install(wheel, ["--target", stage])
            remove_from_target(target)
            # The package comes last, because it decides whether detectron2 counts as installed.
            for name in (DIST_INFO, "detectron2"):
                os.rename(os.path.join(stage, name), target / name)
    except OSError as error:
        raise InstallError(
            f"cannot write to the target folder {target}: {error.strerror}; choose another --target"
        ) from None


def pip_install(wheel: Path, options: list[str]) -> None:
    # Byte-compiling takes seconds in which a kill would leave files that pip does not know of.
    run_pip(
        ["install", "--no-deps", "--no-index", "--no-compile", *options, str(wheel)],
        "pip could not install detectron2",
        "make the environment writable (a virtual environment is best), or use --target DIR",
    )


def remove_from_target(target: Path) -> None:
    """Remove the package and metadata of any version from a target folder."""
    for folder in [target / "detectron2", *target.glob("detectron2-*.dist-info")]:
        shutil.rmtree(folder, ignore_errors=True)


def verify(target: Path | None) -> dict[str, str]:
    """Import what was installed; take it away again if it does not work.

    A package of others that is missing is no fault of the installation; the report names it.
    """
    report = probe(target, VERIFIED_MODULES)
    works = report["path"] is not None and "error" not in report
    missing = report.get("missing") or "detectron2"
    if works or missing.split(".")[0] != "detectron2":
        return report

    if target is None:
        run_pip(
            ["uninstall", "--yes", "detectron2"],
            "pip could not remove detectron2 again",
            "remove it by hand",
        )
    else:
        remove_from_target(target)
    reason = report.get("error", "it is not found")
    raise InstallError(f"the installed detectron2 cannot be imported and was removed again: {reason}")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # SIGTERM cleans up like Ctrl-C does, instead of leaving temporary files.
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
