"""The keys of the reference implementation in MODEL.DISTILLER, and what they may be."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN

from .mimic import LOSS_FORMS, NORMS
from .sampling import SAMPLE_RULES

# Arguments of InstanceConditionalDistillation by node; "" is MODEL.DISTILLER itself.
_ARGUMENTS = {
    "": "bypass_distill bypass_distill_after stop_joint distill_off distill_on".split(),
    "INS": (
        "input_feats num_classes hidden_dim att_heads att_layers project_pos use_pos_embedding "
        "decoder_posemb_on_v distill_norm dropout add_scale_indicator sample_rule num_neg_pos_ratio "
        "num_labels max_labels uniform_sample_class uniform_sample_box confidence_loss_weight "
        "value_reconst reference_bugs"
    ).split(),
    "INS_ATT_MIMIC": (
        "weight_value temp_value temp_decay temp_decay_to distill_negative loss_form sample_range"
    ).split(),
}
# Keys that choose nothing: the names of the reference's only classes, and keys that it never reads.
_CLASSES = {
    "TEACHER": "ModelTeacher_II",
    "INS.TASK_NAME": "InstanceEncoder",
    "INS.DECODER": "DecoderWrapper",
}
_UNREAD = {"IGNORE_DISTILL": [""], "INS.DISTILL_WITH_POS": False, "INS_ATT_MIMIC.TEMP_MASK": 1.0}


def argument_names() -> list[str]:
    """The loss's arguments that are keys."""
    return [name for names in _ARGUMENTS.values() for name in names]


def add_keys(distiller: CN, defaults: dict[str, Any]) -> None:
    """Add the keys of all nodes to MODEL.DISTILLER.

    Args:
        defaults: of the loss's arguments, by name.
    """
    for node, names in _ARGUMENTS.items():
        if node:
            distiller[node] = CN()
        for name in names:
            _node(distiller, node)[name.upper()] = defaults[name]
    for path, value in {**_CLASSES, **_UNREAD}.items():
        node, _, key = path.rpartition(".")
        _node(distiller, node)[key] = value


def read_arguments(distiller: CN) -> dict[str, Any]:
    """The loss's arguments from the keys of MODEL.DISTILLER.

    Raises:
        ValueError: a key that names one of the reference's classes names another one.
    """
    for path, name in _CLASSES.items():
        node, _, key = path.rpartition(".")
        found = _node(distiller, node)[key]
        if found != name:
            raise ValueError(
                f"MODEL.DISTILLER.{path} is '{found}'; '{name}' is the only one here. Another method "
                "is a distillation loss of its own (MODEL.DISTILLER.TYPES)"
            )
    return {
        name: _node(distiller, node)[name.upper()]
        for node, names in _ARGUMENTS.items()
        for name in names
    }


def check_arguments(values: dict[str, Any]) -> None:
    """Check the loss's arguments, by name.

    Raises:
        ValueError: one cannot be; the message names its key.
    """
    v = values
    _one_of(v, "loss_form", LOSS_FORMS)
    _one_of(v, "distill_norm", NORMS)
    _one_of(v, "sample_rule", SAMPLE_RULES)
    for name in ("hidden_dim", "att_heads", "max_labels", "num_labels"):
        _require(v, name, v[name] >= 1, "at least 1")
    for name in ("num_classes", "att_layers", "num_neg_pos_ratio", "confidence_loss_weight"):
        _require(v, name, v[name] >= 0, "0 or more")
    multiple = f"a multiple of INS.ATT_HEADS, which is {v['att_heads']}"
    _require(v, "hidden_dim", v["hidden_dim"] % v["att_heads"] == 0, multiple)
    # The positional embedding is half for the row, half for the column; layer norm of 1 channel is 0.
    fits = v["hidden_dim"] % 2 == 0 and v["hidden_dim"] > v["att_heads"]
    _require(v, "hidden_dim", fits, f"an even number, at least twice INS.ATT_HEADS ({v['att_heads']})")
    _require(v, "sample_range", 0 <= v["sample_range"] <= 0.5, "0 to 0.5, a point inside the box")
    _require(v, "dropout", 0 <= v["dropout"] < 1, "0 or more and below 1")
    _require(v, "temp_decay_to", v["temp_decay_to"] > 0, "above 0")
    holds = v["temp_value"] > 0 or (v["temp_value"] < 0 and v["reference_bugs"])
    reason = "below 0 the reference names the temperature learnable, but gives it no gradient"
    _require(v, "temp_value", holds, f"above 0 ({reason})")


def _one_of(values: dict[str, Any], name: str, allowed) -> None:
    _require(values, name, values[name] in allowed, f"one of {list(allowed)}")


def _require(values: dict[str, Any], name: str, holds: bool, expected: str) -> None:
    if holds:
        return
    node = next(node for node, names in _ARGUMENTS.items() if name in names)
    key = ".".join(part for part in ("MODEL.DISTILLER", node, name.upper()) if part)
    raise ValueError(f"{key} is {values[name]!r}; expected {expected}")


def _node(distiller: CN, name: str) -> CN:
    return distiller[name] if name else distiller
