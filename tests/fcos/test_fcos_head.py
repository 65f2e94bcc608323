"""The head: its layers, their names, their start; what the config may ask for."""

import math

import pytest
import torch
import torch.nn.functional as F
from distill_d2.projects.fcos.deformable import DeformConv2d, DFConv2d
from distill_d2.projects.fcos.head import FCOSHead, LevelNorms
from fcos_case import fcos
from torch import nn

SHAPES = [(8, 8), (4, 4), (2, 2)]


def head(**options):
    options = {"channels": 32, "num_levels": 3, "num_classes": 5, **options}
    return FCOSHead(**options)


def levels(count=2, channels=32, shapes=SHAPES):
    return [torch.randn(count, channels, *shape) for shape in shapes]


def names(model):
    return set(model.state_dict())


def test_by_hand():
    """Two convolutions: what comes from which tower, and where the scale and the ReLU are."""
    model = head(num_cls_convs=1, num_box_convs=1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "scale" in name else 0.0, std=0.3)
    x = levels()
    found = model(x)
    assert len(found) == 3
    for index, level in enumerate(x):
        towers = []
        for tower in (model.cls_tower, model.bbox_tower):
            y = F.conv2d(level, tower[0].weight, tower[0].bias, padding=1)
            towers.append(F.relu(F.group_norm(y, 32, tower[1].weight, tower[1].bias)))
        logits, distances, quality = (
            F.conv2d(towers[t], layer.weight, layer.bias, padding=1)
            for t, layer in ((0, model.cls_logits), (1, model.bbox_pred), (1, model.ctrness))
        )
        distances = (distances * model.scales[index].scale).clamp(min=0)
        for ours, expected in zip(found, (logits, distances, quality)):
            torch.testing.assert_close(ours[index], expected, rtol=1e-4, atol=1e-5)
        assert (distances == 0).any() and (distances > 0).any()


def test_names():
    found = names(head(num_cls_convs=2, num_box_convs=1, num_share_convs=1))
    towers = {("cls_tower", (0, 1, 3, 4)), ("bbox_tower", (0, 1)), ("share_tower", (0, 1))}
    modules = [f"{tower}.{i}" for tower, layers in towers for i in layers]
    modules += ["cls_logits", "bbox_pred", "ctrness"]
    expected = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    assert found == expected | {f"scales.{level}.scale" for level in range(3)}
    assert not any("scales" in name for name in names(head(use_scale=False)))
    assert {name for name in names(head(norm="none", num_cls_convs=2)) if "cls_tower" in name} == {
        f"cls_tower.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }


def test_start():
    model = head(prior_prob=0.02, deformable=True)
    assert model.cls_logits.bias.unique().item() == pytest.approx(-math.log(0.98 / 0.02))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            std = layer.weight.std().item()
            if isinstance(layer, DeformConv2d):
                assert std > 0.03 and (layer.bias == 0).all()
            else:
                assert 0.008 < std < 0.012
    assert all(scale.scale.item() == 1 for scale in model.scales)


def test_shared_convolutions_come_first():
    model = head(num_share_convs=2, num_cls_convs=0, num_box_convs=0).eval()
    x = levels()
    shared = [model.share_tower(level, i) for i, level in enumerate(x)]
    found, _, _ = model(x)
    torch.testing.assert_close(found[1], model.cls_logits(shared[1]))


def test_group_norm_by_another_name():
    torch.manual_seed(0)
    first = head()
    second = head(norm="NaiveGN")
    second.load_state_dict(first.state_dict())
    x = levels()
    for ours, theirs in zip(first(x), second(x)):
        assert all(map(torch.equal, ours, theirs))


# A batch norm per level


@pytest.mark.parametrize("norm, kind", [("BN", nn.BatchNorm2d), ("SyncBN", nn.SyncBatchNorm)])
def test_each_level_has_its_own_norm(norm, kind):
    model = head(norm=norm, num_share_convs=1, num_cls_convs=1, num_box_convs=1).train()
    norms = [layer for layer in model.modules() if isinstance(layer, LevelNorms)]
    assert len(norms) == 3 and all(type(each) is kind for layer in norms for each in layer)
    assert "cls_tower.1.2.num_batches_tracked" in names(model)
    x = [level * (10.0**i) + i for i, level in enumerate(levels())]
    model(x)
    for index in range(3):
        own = model.share_tower[1][index]
        y = model.share_tower[0](x[index])
        torch.testing.assert_close(own.running_mean, 0.1 * y.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert own.num_batches_tracked == 1


def test_norms_know_their_level_whatever_was_called_before():
    """A head that counts its calls would be wrong after one with fewer levels, or a repeated one."""
    model = head(norm="BN", num_cls_convs=1, num_box_convs=1).train()
    x = [level * (10.0**i) + i for i, level in enumerate(levels())]
    for _ in range(3):
        model(x)
    model.eval()
    before = model(x)
    model(x[:2])
    for ours, again in zip(before, model(x)):
        assert all(map(torch.equal, ours, again))
    first = model(x[:1])
    assert torch.equal(first[0][0], before[0][0])


# Deformable


def test_the_last_convolution_of_each_tower_is_deformable():
    model = head(deformable=True, num_share_convs=2, num_cls_convs=2, num_box_convs=3)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, DFConv2d))}
    assert {name for name, kind in kinds.items() if kind is DFConv2d} == {"cls_tower.3", "bbox_tower.6"}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes["cls_tower.3.offset.weight"] == (27, 32, 3, 3)
    assert shapes["bbox_tower.6.conv.bias"] == (32,)
    found = model(levels())
    sum(level.sum() for part in found for level in part).backward()
    assert model.cls_tower[3].offset.weight.grad.abs().sum() > 0


# Checkpoints


def test_centerness_of_old_checkpoints():
    model, other = fcos(), fcos()
    state = {
        name.replace("ctrness", "centerness"): tensor + 1 for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(dict(state))  # strict
    found = other.proposal_generator.fcos_head.ctrness.weight
    assert torch.equal(found, state["proposal_generator.fcos_head.centerness.weight"])


# What the config asks for


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"NORM": "LN"}, r"MODEL.FCOS.NORM is 'LN'; expected one of \['GN', 'NaiveGN', "),
        ({"channels": 48}, "NORM is 'GN', with 32 groups, but the levels have 48 channels; expec"),
        ({"IN_FEATURES": ["p2", "p9", "p4"]}, r"is \['p2', 'p9', 'p4'\], but .* \['p2', 'p3', "),
        ({"IN_FEATURES": []}, r"IN_FEATURES is \[\], but the backbone has"),
        ({"FPN_STRIDES": [8, 16, 32]}, r"FPN_STRIDES is \[8, 16, 32\], but .* the strides \[4, 8, 16\]"),
        ({"SIZES_OF_INTEREST": [64]}, r"SIZES_OF_INTEREST is \[64\]; expected 2 rising distances"),
        ({"SIZES_OF_INTEREST": [64, 32]}, r"SIZES_OF_INTEREST is \[64, 32\]; expected 2 rising"),
    ],
)
def test_wrong_values(keys, message):
    with pytest.raises(ValueError, match=message):
        fcos(**keys)
