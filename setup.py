"""Where the packages lie; everything else is in pyproject.toml.

configs/ and projects/ lie beside the package in a checkout, where people edit them, and inside it in an
installed wheel, where distill_d2.model_zoo finds them: configs/ becomes distill_d2/configs/, and
projects/<Name>/<package>/ becomes distill_d2/projects/<package>/.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CONFIG_FILES = ["**/*.yaml", "**/*.py"]


def project_packages() -> dict[str, str]:
    """Return {"distill_d2.projects.<package>": "projects/<Name>/<package>"}, subpackages included."""
    packages = {}
    for project in sorted((ROOT / "projects").glob("*/")):
        for name in find_packages(str(project)):
            packages[f"distill_d2.projects.{name}"] = f"projects/{project.name}/{name.replace('.', '/')}"
    return packages


PROJECTS = project_packages()

setup(
    packages=[*find_packages(include=["distill_d2", "distill_d2.*"]), "distill_d2.configs", *PROJECTS],
    package_dir={"distill_d2.configs": "configs", **PROJECTS},
    package_data={
        "distill_d2": ["py.typed"],
        "distill_d2.configs": CONFIG_FILES,
        **dict.fromkeys(PROJECTS, CONFIG_FILES),
    },
)
