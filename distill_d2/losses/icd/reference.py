"""Parameters from the checkpoints of ICD's reference implementation (their entry "teacher")."""

from __future__ import annotations

import re

import torch

State = dict[str, torch.Tensor]

_OF_TEACHER = "teacher."
_OF_STUDENT = "distillers.0."
# Names in the reference, without their prefix, to names here. Its MLPs number their three linear layers,
# torchvision's also count the layers between them. With ATT_LAYERS 0 a layer has no number.
_MLP = {"0": "0", "1": "3", "2": "6"}
_ENCODER = re.compile(r"ins_encoder\.encoder\.layers\.(\d)\.(\w+)$")
_PREDICTOR = re.compile(r"ins_encoder\.predictor\.layers\.(\d)\.(\w+)$")
_RECONSTRUCTOR = re.compile(r"reconst_projector\.(\d+)\.(\w+)$")
_LAYER = re.compile(r"attention_module\.matt\.(?:(\d+)\.matt\.|(\d+)\.)?(.+)$")
_BARE_POSITIONS = re.compile(r"attention_module\.pos_projector\.(\w+)$")


def from_reference(state: State) -> State:
    """The state_dict of InstanceConditionalDistillation from that of the reference's Distillator.

    Names may have the prefix "module." of a run on several GPUs. Of the student's side, of which the
    reference uses no more, the value projection and the projector of positions are taken.
    """
    converted: State = {}
    for name, value in state.items():
        name = _plain(name)
        if name.startswith(_OF_TEACHER):
            converted.update(_of_teacher(name[len(_OF_TEACHER) :], value))
        elif name.startswith(_OF_STUDENT):
            converted.update(_of_student(name[len(_OF_STUDENT) :], value))
    return converted


def _plain(name: str) -> str:
    return name[len("module.") :] if name.startswith("module.") else name


def _of_teacher(name: str, value: torch.Tensor) -> State:
    match = _ENCODER.match(name)
    if match:
        return {f"queries.encoder.{_MLP[match[1]]}.{match[2]}": value}
    match = _PREDICTOR.match(name)
    if match:
        return {f"auxiliary.predictor.{_MLP[match[1]]}.{match[2]}": value}
    match = _RECONSTRUCTOR.match(name)
    if match:
        return {f"reconstructors.{match[1]}.{match[2]}": value}
    layer, rest = _of_layer(name)
    return {f"decoder.{layer}.{rest}": value} if rest else {}


def _of_student(name: str, value: torch.Tensor) -> State:
    layer, rest = _of_layer(name)
    if rest.startswith("in_proj_"):  # rows of queries, keys, values
        return {f"student.{layer}.values.{rest[len('in_proj_') :]}": value.chunk(3)[2]}
    if rest.startswith("pos_projector."):
        return {f"student.{layer}.{rest}": value}
    return {}


def _of_layer(name: str):
    """Number and name of a parameter of a decoder layer; ("", "") for others."""
    match = _BARE_POSITIONS.match(name)
    if match:
        return "0", f"pos_projector.{match[1]}"
    match = _LAYER.match(name)
    if not match:
        return "", ""
    return match[1] or match[2] or "0", match[3]
