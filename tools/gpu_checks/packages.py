"""Which packages a machine lacks, and how to install them there."""

from __future__ import annotations

import importlib.util

# Modules, and what the package index calls them.
PACKAGES = {
    "antlr4": "antlr4-python3-runtime==4.9.3",
    "cloudpickle": "cloudpickle",
    "cv2": "opencv-python-headless",
    "fvcore": "fvcore",
    "hydra": "hydra-core",
    "iopath": "iopath",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "omegaconf": "omegaconf==2.3.1",
    "packaging": "packaging",
    "PIL": "pillow",
    "pkg_resources": "setuptools==80.10.2",
    "portalocker": "portalocker",
    "psutil": "psutil",
    "pycocotools": "pycocotools",
    "scipy": "scipy",
    "shapely": "shapely",
    "tabulate": "tabulate",
    "tensorboard": "tensorboard",
    "termcolor": "termcolor",
    "torch": "torch",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "yacs": "yacs",
    "yaml": "PyYAML",
}
# These have no wheels on the package index; they are pure Python.
SOURCES = ("antlr4", "fvcore", "iopath")
ADVICE = """\
These packages are missing: {names}
On a machine with a network (the wheels are for Linux, x86-64, Python 3.12):
{commands}
On this machine:
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 tools/test_gpu.py"""


def missing_packages() -> list[str]:
    """The modules that cannot be imported; "detectron2" among them if it is not there."""
    return [name for name in [*PACKAGES, "detectron2"] if importlib.util.find_spec(name) is None]


def advice(missing: list[str]) -> str:
    """The missing packages, and the commands that install them."""
    commands = []
    sources = [PACKAGES[name] for name in missing if name in SOURCES]
    wheels = [PACKAGES[name] for name in missing if name in PACKAGES and name not in SOURCES]
    if sources:
        commands.append(f"python3 -m pip wheel --no-deps -w wheels {' '.join(sources)}")
    if wheels:
        tags = ("2_28", "2_27", "2_17", "2014", "2010", "1")
        platforms = " ".join(
            f"--platform manylinux{'' if tag.startswith('20') or tag == '1' else '_'}{tag}_x86_64"
            for tag in tags
        )
        commands.append(
            "python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 "
            f"{platforms} -d wheels {' '.join(wheels)}"
        )
    if "detectron2" in missing:
        commands.append(
            "python3 tools/install_detectron2.py --target site   # then copy the folder site"
        )
    lines = "\n".join(f"    {command}" for command in commands)
    return ADVICE.format(names=", ".join(missing), commands=lines)
