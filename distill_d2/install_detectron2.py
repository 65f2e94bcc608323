"""Install detectron2 into the running environment, without a compiler: ``distill-d2 install-detectron2``.

Needs neither detectron2 nor torch, and runs as a script, too, where this package is not installed: only the
standard library, pip, and the package wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = "LabGym==3.1.2"
SOURCE_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
SOURCE_PACKAGE = "LabGym.detectron2"

# The local part keeps this copy apart from an official 0.6, which has the compiled `_C`.
VERSION = "0.6+labgym3.1.2"
WHEEL_FILE = """\
Wheel-Version: 1.0
Generator: distill_d2 install-detectron2
Root-Is-Purelib: true
Tag: py3-none-any
"""
# What detectron2 itself imports; distill_d2 installs all of it.
REQUIREMENTS = "".join(
    f"Requires-Dist: {requirement}\n"
    for requirement in (
        "torch torchvision numpy Pillow>=7.1 cloudpickle fvcore>=0.1.5 hydra-core>=1.1 iopath>=0.1.7 "
        "matplotlib omegaconf>=2.1,<2.4 packaging pycocotools>=2.0.2 setuptools<81 tabulate tensorboard "
        "termcolor>=1.1 tqdm>4.29.0 yacs>=0.1.8"
    ).split()
)
METADATA_FILE = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: detectron2 0.6 without its compiled part, taken from the wheel of LabGym 3.1.2
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Classifier: License :: OSI Approved :: Apache Software License
Requires-Python: >=3.7
{REQUIREMENTS}
The Python sources of detectron2 0.6 as LabGym 3.1.2 ships them in its package `{SOURCE_PACKAGE}`; the
only change is the name. The compiled extension `detectron2._C` (deformable convolution, rotated boxes,
fast COCO evaluation) is not included.
"""

# Together they import nearly the whole package.
VERIFIED_MODULES = "detectron2, detectron2.engine, detectron2.model_zoo, detectron2.modeling"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run this file as a script; errors end it with a message."""
    parser = argparse.ArgumentParser(
        description="Install detectron2 (its Python part), unless it is already installed."
    )
    add_arguments(parser)
    run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wheel", type=existing_file, metavar="FILE", help=f"a wheel of {SOURCE}; default: download it"
    )
    parser.add_argument(
        "--target", type=Path, metavar="DIR", help="install into this folder, for PYTHONPATH"
    )


def existing_file(text: str) -> Path:
    """The type of an argument of argparse."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def run(args: argparse.Namespace) -> None:
    """Install, as the arguments say; raises: see ``install``."""
    install(args.wheel, args.target and args.target.absolute())


def install(wheel: Path | None, target: Path | None) -> None:
    """Install detectron2, unless it is already there.

    Args:
        wheel: a local wheel of LabGym; None: download it.
        target: the folder to install into; None: the running environment.

    Raises:
        SystemExit: it failed; the message says what was found, what was expected and what to do.
    """
    existing = find(target)
    if existing:
        print(f"detectron2 is already installed ({existing}); left as it is")
    else:
        with tempfile.TemporaryDirectory(prefix="install-detectron2-") as work:
            source = wheel or download(Path(work, "download"))
            check_sha256(source)
            built = repackage(source, Path(work))
            where = ["--target", str(target)] if target else []
            # Byte-compiling takes seconds, in which an interruption leaves an incomplete package.
            pip("install", "--no-deps", "--no-index", "--no-compile", *where, str(built))
        print(f"installed detectron2 {VERSION}")
        if target:
            print(f"put {target} on PYTHONPATH to use it; delete its folders detectron2* to remove it")
    check_import(target)


def find(target: Path | None) -> Path | None:
    """The folder of the installed detectron2 (in ``target``, if that is given), or None."""
    importlib.invalidate_caches()
    find_spec = importlib.machinery.PathFinder.find_spec
    spec = find_spec("detectron2", [str(target)]) if target else importlib.util.find_spec("detectron2")
    if spec is None:
        return None
    if not spec.origin:
        folder = target / "detectron2" if target else "the folder detectron2 on Python's path"
        raise failure(f"{folder} is not a Python package (it has no __init__.py); remove it")
    return Path(spec.origin).parent


def check_import(target: Path | None) -> None:
    """Import detectron2 in a fresh interpreter, because a broken one may end it or be half imported.

    Raises:
        SystemExit: that fails, and not because detectron2 needs a package that is missing.
    """
    environment = dict(os.environ)
    if target:
        environment["PYTHONPATH"] = os.pathsep.join([str(target), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as empty:  # the working directory is on the path
        result = subprocess.run(
            [sys.executable, "-c", f"import {VERIFIED_MODULES}"],
            env=environment,
            cwd=empty,
            capture_output=True,
            text=True,
        )
    if result.returncode == 0:
        return
    reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
    missing = re.fullmatch(r"ModuleNotFoundError: No module named '(.*)'", reason)
    if not missing or missing[1].split(".")[0] == "detectron2":
        raise failure(
            f"the installed detectron2 cannot be imported: {reason}. Repair it or remove it "
            "(`pip uninstall detectron2`), then run this again"
        )
    print(
        f"note: detectron2 needs {missing[1]}, which this Python lacks; installing distill_d2 "
        "installs all that it needs",
        file=sys.stderr,
    )


def download(folder: Path) -> Path:
    """Let pip download the pinned wheel, from the index that pip is configured for."""
    print(f"downloading {SOURCE} (1.9 MB), which carries detectron2", flush=True)
    # Only files are taken out of the wheel: its dependencies and its Requires-Python do not matter.
    options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder)]
    pip("download", *options, SOURCE)
    return next(folder.glob("*.whl"))


def check_sha256(wheel: Path) -> None:
    """Accept only the one file that this program was written for."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise failure(
            f"{wheel} has sha256 {digest}, expected {SOURCE_SHA256} ({SOURCE}); download it again"
        )


def repackage(wheel: Path, work: Path) -> Path:
    """Make a wheel of detectron2 from that of LabGym; return its path."""
    named = work / "labgym-3.1.2-py3-none-any.whl"  # a local copy may have another name
    shutil.copy(wheel, named)
    run_module("wheel", "unpack", "--dest", str(work / "unpacked"), str(named))
    (package,) = (work / "unpacked").glob(f"*/{SOURCE_PACKAGE.replace('.', '/')}")
    content = work / "content"
    info = content / f"detectron2-{VERSION}.dist-info"
    info.mkdir(parents=True)
    package.rename(content / "detectron2")
    # Import statements and strings alike contain the package's name.
    for file in filter(Path.is_file, content.rglob("*")):
        file.write_bytes(file.read_bytes().replace(SOURCE_PACKAGE.encode(), b"detectron2"))
    (info / "METADATA").write_text(METADATA_FILE)
    (info / "WHEEL").write_text(WHEEL_FILE)
    (info / "top_level.txt").write_text("detectron2\n")
    # detectron2 and distill_d2 have the same license, Apache 2.0, whose text belongs to every copy.
    shutil.copy(Path(__file__).with_name("LICENSE"), info)
    run_module("wheel", "pack", "--dest-dir", str(work), str(content))
    return work / f"detectron2-{VERSION}-py3-none-any.whl"


def pip(*arguments: str) -> None:
    run_module("pip", "--disable-pip-version-check", "--no-input", *arguments)


def run_module(module: str, *arguments: str) -> None:
    """Run a module of Python.

    Raises:
        SystemExit: it fails; the message has its errors, or its last line.
    """
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if f"No module named {module}" in result.stdout:
        raise failure(f"{sys.executable} has no module {module}; `pip install {module}` installs it")
    if result.returncode:
        lines = result.stdout.strip().splitlines() or ["no message"]
        reason = " ".join(line for line in lines if line.startswith("ERROR:")) or lines[-1]
        raise failure(f"`{module} {' '.join(arguments)}` failed: {reason}")


def failure(message: str) -> SystemExit:
    return SystemExit(f"install-detectron2: {message}")


if __name__ == "__main__":
    main()
