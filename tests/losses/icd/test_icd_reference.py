"""Parameters from the reference's checkpoints, and those to start from."""

import pytest
import torch
from icd_case import Case
from naive_icd import random_weights

from distill_d2.losses.icd.reference import from_reference


def weights(layers=1, reconst=False):
    """A whole checkpoint entry "teacher"."""
    options = {"hidden_dim": 16, "heads": 4, "layers": layers, "classes": 7, "reconst": reconst}
    pixels = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    return {**pixels, **random_weights(torch.Generator().manual_seed(0), **options)}


def prefixed(state):
    return {f"module.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("reconst", [False, True])
def test_every_parameter_is_there(layers, prefix, reconst):
    state = {prefix + name: value for name, value in weights(layers, reconst).items()}
    settings = {"att_layers": layers, "value_reconst": 1.0 if reconst else -1.0}
    loss = Case(decoder_posemb_on_v=True, **settings).loss
    loss.load_state_dict(from_reference(state))  # strict: nothing is missing or more


@pytest.mark.parametrize("layers", [0, 2])
def test_values_go_where_they_belong(layers):
    state, last = weights(layers), max(layers, 1) - 1
    converted = from_reference(prefixed(state))
    side, matt = ("matt.", "") if layers == 0 else (f"matt.{last}.matt.", f"matt.{last}.")
    for part in ("weight", "bias"):
        packed = state[f"distillers.0.attention_module.{side}in_proj_{part}"]
        assert torch.equal(converted[f"student.{last}.values.{part}"], packed[32:])
        expected = state[f"teacher.attention_module.{side}in_proj_{part}"]
        assert torch.equal(converted[f"decoder.{last}.in_proj_{part}"], expected)
        expected = state[f"teacher.attention_module.{matt}pos_projector.{part}"]
        assert torch.equal(converted[f"decoder.{last}.pos_projector.{part}"], expected)
        for layer, number in ((0, 0), (1, 3), (2, 6)):
            encoder = state[f"teacher.ins_encoder.encoder.layers.{layer}.{part}"]
            assert torch.equal(converted[f"queries.encoder.{number}.{part}"], encoder)
            predictor = state[f"teacher.ins_encoder.predictor.layers.{layer}.{part}"]
            assert torch.equal(converted[f"auxiliary.predictor.{number}.{part}"], predictor)


# What a run starts from


@pytest.mark.parametrize("prefix", ["", "module."])
def test_all_of_a_reference_checkpoint(prefix):
    state = {prefix + name: value for name, value in weights().items()}
    loss = Case(decoder_posemb_on_v=True).loss
    imported = loss.starting_state(loss.from_reference(state), "all")
    expected = from_reference(weights())
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], expected[name]) for name in expected)


def test_teacher_only_of_a_reference_checkpoint():
    loss = Case().loss
    imported = loss.starting_state(loss.from_reference(prefixed(weights())), "teacher_only")
    expected = {name for name in from_reference(weights()) if not name.startswith("student.")}
    assert set(imported) == expected and expected


@pytest.mark.parametrize("part", ["all", "teacher_only"])
def test_own_checkpoint(part):
    loss = Case(channels=(10, 12), value_reconst=1.0).loss
    state = loss.state_dict()
    imported = loss.starting_state(dict(state), part)
    left_out = set(state) - set(imported)
    of_student = {name for name in state if name.startswith(("student.", "pairs.adapters."))}
    assert left_out == (of_student if part == "teacher_only" else set())
    assert len(of_student) == 2 + 2 * 2 and any("teacher_adapters" in name for name in imported)
    assert all(torch.equal(imported[name], state[name]) for name in imported)
