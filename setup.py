"""Packaging of distill_d2: the library, all configs, and the detectors of projects/.

configs/ and projects/ lie beside the package in a checkout, where people edit them, and inside it in an
installed wheel, where distill_d2.model_zoo finds them: configs/ becomes distill_d2/configs/, and
projects/<Name>/<package>/ becomes distill_d2/projects/<package>/.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CONFIG_FILES = ["**/*.yaml", "**/*.py"]

# detectron2 is needed too, but is not on the package index: see tools/install_detectron2.py.
REQUIREMENTS = [
    "torch>=2.3",
    "torchvision>=0.18",
    "numpy>=1.22",
    "Pillow>=8.0",
    # "headless": the plain opencv-python needs system libraries (libGL) that bare machines lack.
    "opencv-python-headless>=4.5",
    "pycocotools>=2.0.6",
    "fvcore>=0.1.5",
    "iopath>=0.1.9",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "PyYAML>=5.1",
    "yacs>=0.1.8",
    "tabulate",
    "termcolor>=1.1",
    "cloudpickle",
    "matplotlib",
    "tensorboard",
    "tqdm>4.29.0",
    "packaging",
    # Random crops of images with polygon masks.
    "shapely>=1.8",
    # The one-to-one assignment of POTO.
    "scipy>=1.7",
    # detectron2.model_zoo imports pkg_resources, which later versions drop.
    "setuptools<81",
]


def project_packages():
    """Return {"distill_d2.projects.<package>": "projects/<Name>/<package>"}, subpackages included."""
    packages = {}
    for project in sorted((ROOT / "projects").glob("*/")):
        for name in find_packages(str(project)):
            packages[f"distill_d2.projects.{name}"] = f"projects/{project.name}/{name.replace('.', '/')}"
    return packages


def read_version():
    text = (ROOT / "distill_d2" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "0.1.0"


def read_readme():
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


PROJECTS = project_packages()

setup(
    name="distill_d2",
    version=read_version(),
    description="Knowledge distillation of object detectors with detectron2",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    install_requires=REQUIREMENTS,
    extras_require={"test": ["pytest>=7.0", "pytest-xdist>=3.2"]},
    packages=[*find_packages(include=["distill_d2", "distill_d2.*"]), "distill_d2.configs", *PROJECTS],
    package_dir={"distill_d2.configs": "configs", **PROJECTS},
    package_data={"distill_d2.configs": CONFIG_FILES, **dict.fromkeys(PROJECTS, CONFIG_FILES)},
)
