"""Detectors, losses, datasets, mappers and augmentations of a user's package; names that another package has."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import distill_d2
from distill_d2 import plugins
from distill_d2.engine import argument_parser, main
from distill_d2.imports import import_modules
from distill_d2.testing import distiller_config, save_teacher, tiny_config, write_dataset

ROOT = Path(__file__).resolve().parents[1]

PACKAGE = """
import sys  # stderr takes a line at once, so that processes do not tear each other's
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from distill_d2 import DISTILL_LOSS_REGISTRY, DistillLoss, register_view
from distill_d2.data import AUGMENTATION_REGISTRY, DATASET_MAPPER_REGISTRY
from distill_d2.losses import FeaturePairs
from distill_d2.plugins import Detector, register_detector
from distill_d2.views import RetinaNetView


@META_ARCH_REGISTRY.register()
class Wheat(RetinaNet):
    @classmethod
    def from_config(cls, cfg):
        sys.stderr.write(f"scale of the wheat: {cfg.MODEL.WHEAT.SCALE}\\n")
        return super().from_config(cfg)


@register_view(Wheat)
class WheatView(RetinaNetView):
    pass


@DISTILL_LOSS_REGISTRY.register()
class WheatLoss(DistillLoss):
    NODE = "WHEAT_LOSS"

    def __init__(self, **keys):
        super().__init__(**keys)
        self.pairs = FeaturePairs(["p3"])

    def forward(self, student, teacher, batch):
        assert type(student) is type(teacher) is WheatView
        ((level, target),) = self.pairs(student, teacher).values()
        return {"loss_wheat": (level - target).square().mean()}


@DATASET_MAPPER_REGISTRY.register()
class WheatMapper(DatasetMapper):
    def __call__(self, record):
        return {**super().__call__(record), "mapper": "wheat"}


@AUGMENTATION_REGISTRY.register()
def wheat_flips(cfg):
    sys.stderr.write("augmentations of the wheat\\n")
    return [T.RandomFlip(1.0, horizontal=False, vertical=True)]


def add_config(cfg):
    cfg.MODEL.WHEAT = type(cfg)({"SCALE": 1.0})


def check(cfg):
    if cfg.MODEL.WHEAT.SCALE <= 0:
        raise ValueError(f"MODEL.WHEAT.SCALE is {cfg.MODEL.WHEAT.SCALE}; expected a number above 0")


register_detector(
    Detector(
        "Wheat",
        "Wheat",
        add_config=add_config,
        num_classes_key="MODEL.RETINANET.NUM_CLASSES",
        check=check,
    )
)
register_coco_instances("wheat", {}, "JSON", "IMAGES")
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "wheat"
version = "1.0"
[project.entry-points."distill_d2.plugins"]
wheat = "wheat_detector"
[tool.setuptools]
py-modules = ["wheat_detector"]
"""


@pytest.fixture
def package(tmp_path):
    """The user's file, with a project file beside it."""
    entry = write_dataset(tmp_path / "data")
    folder = tmp_path / "wheat"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    file = folder / "wheat_detector.py"
    file.write_text(PACKAGE.replace("JSON", entry["JSON"]).replace("IMAGES", entry["IMAGES"]))
    return file


@pytest.fixture
def config(tmp_path):
    """A yaml file that names what the user's package registers; its teacher is such a detector, too."""
    teacher = Path(save_teacher(tiny_config(width=16), tmp_path / "teacher"))
    values = yaml.safe_load(teacher.read_text())
    values["MODEL"].update(META_ARCHITECTURE="Wheat", WHEAT={"SCALE": 3.0})
    teacher.write_text(yaml.safe_dump(values))
    values = yaml.safe_load(distiller_config(tiny_config(), str(teacher), ["WheatLoss"]).dump())
    values["MODEL"]["DISTILLER"].update(STUDENT_META_ARCH="Wheat", WHEAT_LOSS={"WEIGHT": 2.0})
    values["MODEL"]["WHEAT"] = {"SCALE": 2.0}
    values["DATASETS"].update(TRAIN=["wheat"], TEST=[])
    values["SOLVER"]["MAX_ITER"] = 2
    values.update(VERSION=2, OUTPUT_DIR=str(tmp_path / "output"))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def command(*words, path=""):
    """Run a Python program; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [str(path)])])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def train(config, *words, path=""):
    """Distill with the script; what it printed, and the last line of metrics.json."""
    script = ROOT / "train_distill.py"
    text = command(script, "--num-gpus", 0, "--config-file", config, *words, path=path)
    lines = (config.parent / "output" / "metrics.json").read_text().splitlines()
    return text, json.loads(lines[-1])


def test_installed_package(tmp_path, package, config):
    """Its entry point is enough: keys, checks, detector, loss, dataset and mapper are there by name."""
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    command(*install, "--target", tmp_path / "site", package.parent)
    text, metrics = train(config, "INPUT.MAPPER", "WheatMapper", path=tmp_path / "site")
    assert math.isfinite(metrics["loss_wheat"]) and metrics["loss_wheat"] > 0
    assert "scale of the wheat: 2.0" in text and "scale of the wheat: 3.0" in text
    assert "Imported wheat_detector (" in text and "entry point wheat of distill_d2.plugins" in text
    assert not (tmp_path / "output" / "imports.txt").exists()


def test_file_in_two_processes(tmp_path, package, config):
    words = ["INPUT.AUGMENTATIONS", "wheat_flips"]
    text, metrics = train(config, "--import", package, "--num-procs", 2, *words)
    assert math.isfinite(metrics["loss_wheat"]) and metrics["loss_wheat"] > 0
    assert text.count("scale of the wheat: 2.0") == 2
    assert text.count("augmentations of the wheat") == 3  # once more where the mapper is tried
    assert f"Imported wheat_detector ({package}; --import {package})" in text
    assert (tmp_path / "output" / "imports.txt").read_text() == f"{package}\n"


@pytest.mark.parametrize("model", ["{}", "{WHEAT: {SCALE: 2.0}}", "{DISTILLER: {TYPES: [WheatLoss]}}"])
@pytest.mark.parametrize("words", [["--resume"], ["--eval-only"], []])
def test_a_later_command_without_the_import(tmp_path, words, model):
    """By the note beside the config file, or that in OUTPUT_DIR, before a name of the module is refused."""
    (tmp_path / "imports.txt").write_text("/somewhere/wheat_detector.py\nother.module\n")
    config = tmp_path / "config.yaml"
    if words:  # the original config, elsewhere
        config = tmp_path / "elsewhere" / "config.yaml"
        config.parent.mkdir()
    config.write_text(f"OUTPUT_DIR: {tmp_path}\nMODEL: {model}")
    words = ["--num-gpus", "0", "--config-file", str(config), *words, "--import", "json"]
    with pytest.raises(ValueError) as caught:
        main(argument_parser().parse_args(words), distill=True)
    assert "with --import /somewhere/wheat_detector.py --import other.module, which" in str(caught.value)


def test_what_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_wheat.py").write_text("import no_such_module_of_mine")
    (tmp_path / "json.py").write_text("")
    for name, text in {
        "no_such_package.wheat": "ModuleNotFoundError: No module named 'no_such_package'. Expected a module",
        str(tmp_path / "none.py"): f"FileNotFoundError: '{tmp_path}/none.py' does not exist",
        str(tmp_path / "broken_wheat.py"): "no_such_module_of_mine' ("
        + str(tmp_path / "broken_wheat.py, line 1)"),
        str(tmp_path / "json.py"): "another module has the name 'json'",
    }.items():
        with pytest.raises(ImportError) as caught:
            import_modules([name])
        assert str(caught.value).startswith(f"--import {name}: ") and text in str(caught.value)


def test_entry_point_that_cannot_be_imported(tmp_path, monkeypatch):
    """Said at each attempt, not only the first."""
    folder = tmp_path / "wheat-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: wheat\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[distill_d2.plugins]\nwheat = no_such_wheat\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_found", False)
    for _ in range(2):
        with pytest.raises(
            ImportError, match="^entry point wheat of distill_d2.plugins: ModuleNotFound"
        ):
            plugins.detectors()


def test_names_are_given_once():
    with pytest.raises(ValueError, match="a detector named 'RetinaNet' is registered already"):
        plugins.register_detector(plugins.Detector("RetinaNet"))


# AdelaiDet's names, in a package of its name.
STAND_IN = """
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY

def register(registry, *names):
    for name in names:
        registry.register(type(name, (), {"__module__": "adet"}))

register(META_ARCH_REGISTRY, "OneStageDetector", "CondInst", "SOLOv2")
register(PROPOSAL_GENERATOR_REGISTRY, "FCOS")
register(
    BACKBONE_REGISTRY,
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_resnet_bifpn_backbone",
    "build_fcos_dla_fpn_backbone",
)
"""
LAZY = """
import logging, sys
IMPORTS
logging.basicConfig(level=logging.INFO, format="%(message)s")
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from distill_d2 import add_distill_config
from distill_d2.plugins import detectors

add_distill_config(get_cfg())
packages = {module for each in detectors().values() for module in each.modules}
def imported():
    return sorted(packages & set(sys.modules))
assert len(packages) == 8 and imported() == []
for _ in range(2):
    assert META_ARCH_REGISTRY.get("OneStageDetector").__module__ == "adet"
assert imported() == []
META_ARCH_REGISTRY.get("SSD")
BACKBONE_REGISTRY.get("build_small_resnet_backbone")
assert imported() == ["distill_d2.projects.small_resnet", "distill_d2.projects.ssd"], imported()
import distill_d2.projects.condinst
assert META_ARCH_REGISTRY.get("CondInst").__module__ == "adet"
"""


@pytest.mark.parametrize("order", ["import adet, distill_d2", "import distill_d2, adet"])
def test_names_that_adelaidet_has(tmp_path, order):
    """They stay, whichever is imported first; and no code of a detector is imported that nobody uses."""
    (tmp_path / "adet.py").write_text(STAND_IN)
    text = command("-c", LAZY.replace("IMPORTS", order), path=tmp_path)
    (line,) = [line for line in text.splitlines() if "is not imported" in line]
    assert "'OneStageDetector' is registered by adet and left alone" in line
    assert "distill_d2.projects.fcos is not imported" in line
    assert "'CondInst' is registered by adet, which is left alone" in text


ALONE = """
import sys
from pathlib import Path
folders = [folder for folder in Path("projects").iterdir() if folder.is_dir()]
sys.path += map(str, folders)
from detectron2.modeling import META_ARCH_REGISTRY
for folder in folders:
    (package,) = [path.parent.name for path in folder.glob("*/__init__.py")]
    __import__(package)
assert META_ARCH_REGISTRY.get("SSD").__module__ == "ssd.ssd"
assert not {"distill_d2.engine", "distill_d2.projects.ssd"} & set(sys.modules)
"""


def test_projects_packages_alone(monkeypatch):
    """As those of detectron2's projects/: from their folders, without the scripts."""
    monkeypatch.chdir(ROOT)
    command("-c", ALONE)


def test_public_names():
    from distill_d2.losses import PKD, InstanceConditionalDistillation, build_losses

    assert PKD.NODE == "PKD" and InstanceConditionalDistillation and build_losses
    assert all(hasattr(distill_d2, name) for name in distill_d2.__all__)
    with pytest.raises(ImportError, match="cannot import name 'NoLoss'"):
        from distill_d2.losses import NoLoss  # noqa: F401
