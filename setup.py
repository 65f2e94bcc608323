"""Where the packages lie; everything else is in pyproject.toml.

configs/ and projects/ lie beside the package in a checkout, where people edit them, and inside it in an
installed wheel, where distill_d2.model_zoo finds them: configs/ becomes distill_d2/configs/, and
projects/<Name>/<package>/ becomes distill_d2/projects/<package>/, and projects/<Name>/<package>_plugin.py,
which describes it, distill_d2/projects/<package>_plugin.py.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CONFIG_FILES = ["**/*.yaml", "**/*.py"]


def project_packages() -> dict[str, str]:
    """Return {"distill_d2.projects.<package>": "projects/<Name>/<package>"}, subpackages included."""
    packages = {}
    for project in sorted((ROOT / "projects").glob("*/")):
        for name in find_packages(str(project)):
            packages[f"distill_d2.projects.{name}"] = f"projects/{project.name}/{name.replace('.', '/')}"
    return packages


class BuildWithPlugins(build_py):
    """Adds the modules that lie beside the projects' packages."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package == "distill_d2.projects":
            plugins = sorted(ROOT.glob("projects/*/*_plugin.py"))
            modules += [(package, path.stem, str(path.relative_to(ROOT))) for path in plugins]
        return modules


PROJECTS = project_packages()

setup(
    cmdclass={"build_py": BuildWithPlugins},
    packages=[*find_packages(include=["distill_d2", "distill_d2.*"]), "distill_d2.configs", *PROJECTS],
    package_dir={"distill_d2.configs": "configs", **PROJECTS},
    package_data={
        "distill_d2": ["py.typed", "LICENSE"],
        "distill_d2.configs": CONFIG_FILES,
        **dict.fromkeys(PROJECTS, CONFIG_FILES),
    },
)
