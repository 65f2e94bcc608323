"""The decoder's layers and the attention mass, against the naive version and by what they mean."""

import random

import numpy as np
import pytest
import torch
from icd_case import Case, close

from distill_d2.losses.icd import decoder

SIZES = {"padded": ((60, 90), (50, 128)), "full": ((64, 128), (64, 128))}


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_layer_is_the_naive_one(layers, sizes):
    case = Case(att_layers=layers, instances=(2, 1), sizes=sizes)
    decoded, queries, _ = case.decode()
    _, out, _ = case.naive()
    assert len(decoded) == max(layers, 1)
    for index, layer in enumerate(decoded):
        expected = {name: out[f"dec/{index}/{name}"] for name in ("feat", "attn_logits", "tea_value")}
        close(layer.features, expected["feat"].transpose(0, 1), "feat")
        close(layer.values, expected["tea_value"].flatten(2).transpose(0, 1), "tea_value")
        logits = torch.stack([layer.logits(image, slice(None)) for image in range(2)])
        outside = expected["attn_logits"].isinf()
        assert torch.equal(logits.isinf(), outside) and outside.any() == (sizes[0] != (64, 128))
        close(logits.masked_fill(outside, 0), expected["attn_logits"].masked_fill(outside, 0), "logits")
        mass = layer.attention_mass(queries.real, 1.0)
        close(mass, out[f"dec/{index}/value_mask"].squeeze(2), "value_mask")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_attention_mass_sums_to_the_instances(temperature):
    (layer,), queries, _ = Case(instances=(3, 0, 1)).decode()
    mass = layer.attention_mass(queries.real, temperature)
    sums = mass.sum(-1)
    torch.testing.assert_close(sums, torch.tensor([3.0, 0, 1])[:, None].expand(3, 4))
    assert (mass >= 0).all() and (mass[layer.padding[:, None].expand_as(mass)] == 0).all()
    assert not mass.requires_grad


@pytest.mark.parametrize("chunk", [1, 5, 6, 7])
def test_chunks_of_slots_change_nothing(monkeypatch, chunk):
    (layer,), _, _ = Case(instances=(7, 6), sample_rule="fixed", num_labels=20).decode()
    counts = [20, 6]
    whole = layer.attention_mass(counts, 1.5)
    monkeypatch.setattr(decoder, "_MASS_CHUNK", chunk)
    torch.testing.assert_close(layer.attention_mass(counts, 1.5), whole)


def test_no_position_without_embedding():
    """Without it, cells of equal features get equal attention, wherever they are."""
    for used in (True, False):
        case = Case(use_pos_embedding=used, sizes=((64, 128),), instances=(2,))
        for level in case.teacher.values():
            level[:] = level[..., :1, :1]
        (layer,), _, _ = case.decode()
        constant = layer.logits(0, slice(None))[..., :32]
        assert (constant.std(-1).max() < 1e-5) != used


def test_initial_weights():
    """Packed Xavier uniform, bound sqrt(6 / 4C), and biases 0."""
    torch.manual_seed(0)
    layer = decoder.DecoderLayer(64, 8)
    bound = (6 / (4 * 64)) ** 0.5
    assert 0.99 * bound < layer.in_proj_weight.abs().max() <= bound
    assert not layer.in_proj_bias.any() and not layer.out_proj.bias.any()


# Dropout


def dropout_case(**settings):
    return Case(dropout=0.5, **settings)


def test_dropout_repeats_with_the_iteration():
    case = dropout_case()
    first, again, other = (case.forward(iteration) for iteration in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["loss_icd_conf_0"] != other["loss_icd_conf_0"]


def test_dropout_changes_only_the_attended_features():
    dropped, plain = dropout_case().forward(), Case().forward()
    assert dropped["loss_icd_conf_0"] != plain["loss_icd_conf_0"]
    assert torch.equal(dropped["loss_icd_value"], plain["loss_icd_value"])


def test_no_dropout_in_evaluation():
    dropped, plain = dropout_case(), Case()
    dropped.loss.eval()
    assert torch.equal(dropped.forward()["loss_icd_conf_0"], plain.forward()["loss_icd_conf_0"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("part", ["step", "pretrain"])
def test_no_global_random_numbers_are_drawn(dropout, part):
    case = Case(dropout=dropout)
    states = []
    for _ in range(2):
        states.append((torch.get_rng_state(), np.random.get_state(), random.getstate()))
        getattr(case, part)()
    (torch_before, numpy_before, python_before), (torch_after, numpy_after, python_after) = states
    assert torch.equal(torch_before, torch_after) and python_before == python_after
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, numpy_after))
