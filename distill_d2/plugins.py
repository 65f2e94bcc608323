"""Detectors, losses and datasets that are not part of the library, and how they are found.

Three kinds of modules register themselves when they are imported:

- ``projects/<Name>/<package>_plugin.py`` describes a detector of this repository with ``register_detector``.
  The package itself is imported when detectron2 looks up a name that it registers, and not before.
- Modules of installed packages, named in the entry point group ``distill_d2.plugins``.
- Modules and files that the command line names: ``train_distill.py --import my_detector.py``.

The last two are imported before a config is read, in every process. Whatever they register is chosen by name,
as detectron2 does it: losses in MODEL.DISTILLER.TYPES, meta-architectures in MODEL.META_ARCHITECTURE,
backbones in MODEL.BACKBONE.NAME, datasets in DATASETS.TRAIN, mappers in INPUT.MAPPER, augmentations in
INPUT.AUGMENTATIONS. A loss needs no more than its registration. A detector has a view, so that losses can
read it, and a ``Detector``, which adds its config keys. A whole package::

    # my_detector.py
    from detectron2.data import DatasetCatalog
    from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
    from distill_d2 import DISTILL_LOSS_REGISTRY, DistillLoss, register_view
    from distill_d2.plugins import Detector, register_detector
    from distill_d2.rules import Number
    from distill_d2.views import RetinaNetView

    @META_ARCH_REGISTRY.register()
    class MyDetector(RetinaNet): ...

    @register_view(MyDetector)
    class MyView(RetinaNetView): ...

    @DISTILL_LOSS_REGISTRY.register()
    class MyLoss(DistillLoss):
        NODE = "MY_LOSS"  # the node MODEL.DISTILLER.MY_LOSS

        def forward(self, student, teacher, batch):
            return {"loss_mine": (student.level("p3") - teacher.level("p3")).square().mean()}

    def add_config(cfg):
        cfg.MODEL.MY_DETECTOR = type(cfg)({"SCALE": 1.0})

    rules = {"MODEL.MY_DETECTOR.SCALE": Number(above=0)}
    register_detector(Detector("My detector", "MyDetector", add_config=add_config, rules=rules))
    DatasetCatalog.register("my_dataset", load_my_dataset)

    # pyproject.toml of an installed package; without one: --import my_detector.py
    [project.entry-points."distill_d2.plugins"]
    my_detector = "my_detector"
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.utils.logger import log_first_n
from fvcore.common.registry import Registry

from . import projects
from .imports import import_entry_points

if TYPE_CHECKING:
    from .rules import Rule
    from .testing import Family

logger = logging.getLogger(__name__)


def _nothing(cfg: CfgNode) -> None:
    pass


def _boxes_alone(cfg: CfgNode) -> set[str]:
    return set()


def _of_rcnn(cfg: CfgNode) -> set[str]:
    keys = {"masks": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return {name for name, is_on in keys.items() if is_on}


def _of_panoptic_fpn(cfg: CfgNode) -> set[str]:
    return {*_of_rcnn(cfg), "semantic segmentation"}


def _finds_no_boxes(cfg: CfgNode) -> None:
    raise ValueError(
        "the student is a SemanticSegmentor (MODEL.META_ARCHITECTURE), which finds no objects; distill_d2 trains "
        "and evaluates detectors. As a teacher it works, for losses on features"
    )


@dataclass(frozen=True)
class Detector:
    """Describes a detector or a backbone.

    Attributes:
        name: for tables and messages, such as "FCOS (AdelaiDet)".
        architecture: its name in META_ARCH_REGISTRY; "": it has none.
        add_config: adds its config keys to a config, in place.
        complete: fills in, in place, values that a config leaves to it, once the config is read; raises nothing.
        num_classes_key: the key that holds its number of classes, such as "MODEL.FCOS.NUM_CLASSES"; "": the
            datasets' classes are not compared with it.
        rules: what its keys may hold, by their full names, such as {"MODEL.FCOS.NUM_CLASSES": Integer(at_least=1)}
            (see ``distill_d2.rules``); checked where a config names one of its ``names``.
        check: raises ValueError before training if a config of this architecture cannot work.
        ground_truth: what this architecture is trained on, besides boxes and classes, with a config: "masks",
            "keypoints", "semantic segmentation".
        modules: modules that register it, imported when one of its names is looked up; none: they are imported.
        registers: other names that these modules register: backbones, proposal generators.
        family: a small instance for tests, "module:attribute" of a ``distill_d2.testing.Family``; "": none.
    """

    name: str
    architecture: str = ""
    add_config: Callable[[CfgNode], None] = _nothing
    complete: Callable[[CfgNode], None] = _nothing
    num_classes_key: str = ""
    rules: Mapping[str, Rule] = field(default_factory=dict)
    check: Callable[[CfgNode], None] = _nothing
    ground_truth: Callable[[CfgNode], set[str]] = _boxes_alone
    modules: Sequence[str] = ()
    registers: Sequence[str] = ()
    family: str = ""

    @property
    def names(self) -> set[str]:
        """All that it registers."""
        return {self.architecture, *self.registers} - {""}

    def load_family(self) -> Family:
        """The small instance; its module is imported."""
        module, _, attribute = self.family.partition(":")
        return getattr(importlib.import_module(module), attribute)


_DETECTORS: dict[str, Detector] = {}
_found = False


def register_detector(detector: Detector) -> None:
    """Make a detector known.

    Raises:
        ValueError: another one has this name.
    """
    if detector.name in _DETECTORS:
        raise ValueError(f"a detector named '{detector.name}' is registered already")
    _DETECTORS[detector.name] = detector


def register_if_free(registry: Registry) -> Callable:
    """Decorator: register a class or function under its name, unless another package has taken the name, such
    as AdelaiDet; then that one stays, and the log says so."""

    def register(thing: Any) -> Any:
        name = thing.__name__
        if name not in registry:
            registry.register(thing)
        else:
            taken = f"'{name}' is registered by {registry.get(name).__module__}"
            logger.info(f"{taken}, which is left alone; {thing.__module__} is not used for it")
        return thing

    return register


def detectors() -> dict[str, Detector]:
    """All known detectors by name, sorted: detectron2's, those of projects/ and those of installed packages.

    Raises:
        ImportError: an installed package's module cannot be imported.
    """
    _find()
    return dict(sorted(_DETECTORS.items()))


def complete(cfg: CfgNode) -> None:
    """Let the detectors and backbones that a config names fill in the values that it leaves to them, in place."""
    names = {_student_architecture(cfg), cfg.MODEL.BACKBONE.NAME}
    for detector in detectors().values():
        if detector.names & names:
            detector.complete(cfg)


def of_student(cfg: CfgNode) -> list[Detector]:
    """The detectors with the architecture of a config's student."""
    return _of_architecture(_student_architecture(cfg))


def ground_truth(cfg: CfgNode) -> set[str]:
    """What the student of a config is trained on, besides boxes and classes: see ``Detector``. An architecture
    without a description is taken for the nearest of its base classes that has one."""
    name = _student_architecture(cfg)
    found = _of_architecture(name)
    if not found and name in META_ARCH_REGISTRY:
        found = of_base_class(META_ARCH_REGISTRY.get(name))
    return set().union(*(detector.ground_truth(cfg) for detector in found))


def of_base_class(architecture: type) -> list[Detector]:
    """The detectors of an architecture, or of the nearest of its base classes that has any."""
    bases = getattr(architecture, "__mro__", ())  # a registered function has none
    return next(filter(None, (_of_architecture(base.__name__) for base in bases)), [])


def _student_architecture(cfg: CfgNode) -> str:
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        return cfg.MODEL.DISTILLER.STUDENT_META_ARCH
    return cfg.MODEL.META_ARCHITECTURE


def _of_architecture(name: str) -> list[Detector]:
    return [detector for detector in detectors().values() if detector.architecture == name]


def _find() -> None:
    """Import the descriptions of projects/, then the modules of entry points, once."""
    global _found
    if _found:
        return
    _found = True  # first: these modules may call add_distill_config
    for module in pkgutil.iter_modules(projects.__path__):
        if module.name.endswith("_plugin"):
            importlib.import_module(f"{projects.__name__}.{module.name}")
    try:
        import_entry_points()
    except ImportError:
        _found = False
        raise


def _get(registry: Registry, name: str) -> Any:
    """``Registry.get``, which first imports the modules of detectors that register this name. A name that
    another package has registered is left alone, and the log says so."""
    missing = name not in registry
    for detector in detectors().values():
        modules = [module for module in detector.modules if module not in sys.modules]
        if name not in detector.names or not modules:
            continue
        if missing:
            for module in modules:
                importlib.import_module(module)
        else:
            owner = Registry.get(registry, name).__module__
            text = f"'{name}' is registered by {owner} and left alone; {modules[0]} is not imported"
            log_first_n(logging.INFO, text, name=__name__, key="message")
    return Registry.get(registry, name)


# Names of detectors are found when detectron2 looks them up, so that an unused one costs no import.
for _registry in (META_ARCH_REGISTRY, BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY):
    _registry.get = functools.partial(_get, _registry)  # type: ignore[method-assign]

for _detector in (
    Detector(
        "RetinaNet",
        "RetinaNet",
        num_classes_key="MODEL.RETINANET.NUM_CLASSES",
        family="distill_d2.testing.family:RETINANET",
    ),
    Detector(
        "Faster R-CNN",
        "GeneralizedRCNN",
        num_classes_key="MODEL.ROI_HEADS.NUM_CLASSES",
        ground_truth=_of_rcnn,
        family="distill_d2.testing.family:FASTER_RCNN",
    ),
    Detector(
        "Mask R-CNN",
        "GeneralizedRCNN",
        num_classes_key="MODEL.ROI_HEADS.NUM_CLASSES",
        ground_truth=_of_rcnn,
        family="distill_d2.testing.family:MASK_RCNN",
    ),
    Detector("FCOS (detectron2)", family="distill_d2.testing.family:FCOS_OF_DETECTRON2"),
    Detector("Panoptic FPN", "PanopticFPN", ground_truth=_of_panoptic_fpn),
    Detector("Semantic FPN", "SemanticSegmentor", check=_finds_no_boxes),
):
    register_detector(_detector)
