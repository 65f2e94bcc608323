"""A detector's weights alone: one file with its classes and its config, and a yaml for detectron2."""

from __future__ import annotations

import os

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..checkpoint import write_whole
from ..engine.config_writing import plain_student_config
from ..inference import Trained

# Their keys say nothing about the model and its input.
_OF_TRAINING = ("DATASETS", "DATALOADER", "SOLVER", "TEST")

_USE = 'DefaultPredictor(cfg)(image)["instances"]'
_PLAIN = """\
# For detectron2 alone, from the folder of this file:
#     cfg = get_cfg()
#     cfg.merge_from_file("{yaml}")
#     DefaultPredictor(cfg)(image)["instances"]
"""
_OURS = """\
# {parts} of distill_d2, not of detectron2. From the folder of this file:
#     import distill_d2
#     cfg = get_cfg()
#     distill_d2.add_distill_config(cfg)
#     cfg.merge_from_file("{yaml}")
#     DefaultPredictor(cfg)(image)["instances"]
# or distill_d2.inference.load_trained("{weights}").predict([image])
"""


def export_weights(trained: Trained, path: str) -> list[str]:
    """Write {"model", "metadata": {"thing_classes"}, "config"} to ``path``, without optimizers, and a yaml of the
    same name beside it. ``load_trained(path)`` and `distill-d2 predict --run path` take the file as a run.

    Returns:
        what of the detector detectron2 alone lacks; []: the yaml is all that detectron2's DefaultPredictor needs.

    Raises:
        ValueError: the detector was trained from a LazyConfig; ``path`` is a training's checkpoint, or the yaml
            beside it exists and is no export's.
        OSError: a file cannot be written.
    """
    if not isinstance(trained.cfg, CfgNode):
        raise ValueError(
            f"the detector of {trained.source} comes from a LazyConfig, which is code and cannot be part of "
            "a file of weights; keep the .py file, or export onnx, torchscript or torch-export, which need none"
        )
    yaml = f"{os.path.splitext(path)[0]}.yaml"
    _check_free(path, yaml, trained.cfg.MODEL.WEIGHTS)
    config = _config(trained)
    content = {
        "model": {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()},
        "metadata": {"thing_classes": trained.classes},
        "config": config.dump(),
    }
    write_whole(path, lambda file: torch.save(content, file))
    config.MODEL.WEIGHTS = os.path.basename(path)
    missing = _not_in_detectron2(config)
    parts = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
    comment = (_OURS if missing else _PLAIN).format(
        parts=parts, yaml=os.path.basename(yaml), weights=os.path.basename(path)
    )
    text = comment + config.dump()
    write_whole(yaml, lambda file: file.write(text.encode()))
    return missing


def _check_free(path: str, yaml: str, weights: str) -> None:
    """Files of an earlier export are replaced, no others."""
    if os.path.exists(path):
        if os.path.realpath(path) == os.path.realpath(weights):
            raise ValueError(f"'{path}' is the file that the weights come from; name another one")
        folder, name = os.path.split(path)
        if name.startswith("model_") and os.path.isfile(os.path.join(folder, "last_checkpoint")):
            raise ValueError(f"'{path}' is a checkpoint of a training; name another file")
    if os.path.exists(yaml):
        with open(yaml, encoding="utf-8", errors="replace") as file:
            if _USE not in file.read():
                raise ValueError(
                    f"'{yaml}', which would be written beside '{os.path.basename(path)}', exists and is no "
                    "export's; name another file"
                )


def _config(trained: Trained) -> CfgNode:
    config, known = plain_student_config(trained.cfg), get_cfg()
    for section in _OF_TRAINING:
        for key in [key for key in config[section] if key not in known[section]]:
            del config[section][key]
    config.OUTPUT_DIR = known.OUTPUT_DIR
    config.MODEL.WEIGHTS = ""
    return config


def _not_in_detectron2(config: CfgNode) -> list[str]:
    """Names of parts, and of keys, that detectron2 alone does not know."""
    parts = []
    for registry, name in (
        (META_ARCH_REGISTRY, config.MODEL.META_ARCHITECTURE),
        (BACKBONE_REGISTRY, config.MODEL.BACKBONE.NAME),
    ):
        if not registry.get(name).__module__.startswith("detectron2."):
            parts.append(name)
    return parts + _unknown_keys(config, get_cfg())


def _unknown_keys(node: CfgNode, known: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        if name not in known:
            keys.append(prefix + name)
        elif isinstance(value, CfgNode):
            keys += _unknown_keys(value, known[name], f"{prefix}{name}.")
    return keys
