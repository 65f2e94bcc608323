"""The head: its layers, their names, their initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from distill_d2.projects.fcos.deformable import DeformConv2d, DFConv2d
from distill_d2.projects.fcos.head import FCOSHead, LevelNorms
from fcos_case import fcos
from torch import nn


def head(**options):
    options = {"channels": 32, "num_levels": 3, "num_classes": 5, **options}
    return FCOSHead(**options)


def levels():
    return [torch.randn(2, 32, *shape) for shape in ((8, 6), (4, 3), (2, 2))]


def names(model):
    return set(model.state_dict())


@pytest.mark.parametrize("norm", ["GN", "NaiveGN"])
def test_by_hand(norm):
    """What comes from which tower, and where the scale and the ReLU are."""
    model = head(norm=norm, num_share_convs=1, num_cls_convs=1, num_box_convs=1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "scale" in name else 0.0, std=0.3)
    x = levels()
    found = model(x)
    assert len(found) == 3

    def convolved(tower, x):
        x = F.conv2d(x, tower[0].weight, tower[0].bias, padding=1)
        return F.relu(F.group_norm(x, 32, tower[1].weight, tower[1].bias))

    for index, level in enumerate(x):
        shared = convolved(model.share_tower, level)
        towers = [convolved(tower, shared) for tower in (model.cls_tower, model.bbox_tower)]
        logits, distances, quality = (
            F.conv2d(towers[t], layer.weight, layer.bias, padding=1)
            for t, layer in ((0, model.cls_logits), (1, model.bbox_pred), (1, model.ctrness))
        )
        distances = (distances * model.scales[index].scale).clamp(min=0)
        for actual, expected in zip(found, (logits, distances, quality)):
            torch.testing.assert_close(actual[index], expected, rtol=1e-4, atol=1e-5)
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


def test_initial_weights():
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
    # A head that counts its calls would take the norms of other levels after a call with fewer.
    model.eval()
    before = model(x)
    assert torch.equal(model(x[:1])[0][0], before[0][0])
    assert all(all(map(torch.equal, *outputs)) for outputs in zip(before, model(x)))


# Deformable


def test_the_last_convolution_of_each_tower_is_deformable():
    model = head(deformable=True, num_share_convs=2, num_cls_convs=2, num_box_convs=3)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, DFConv2d))}
    assert {name for name, kind in kinds.items() if kind is DFConv2d} == {"cls_tower.3", "bbox_tower.6"}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes["cls_tower.3.offset.weight"] == (27, 32, 3, 3)
    assert shapes["bbox_tower.6.conv.bias"] == (32,)
    sum(level.sum() for part in model(levels()) for level in part).backward()
    assert model.cls_tower[3].offset.weight.grad.any()


# Checkpoints


def test_centerness_of_old_checkpoints():
    model, other = fcos(), fcos()
    state = {
        name.replace("ctrness", "centerness"): tensor + 1 for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(dict(state))  # strict
    found = other.proposal_generator.fcos_head.ctrness.weight
    assert torch.equal(found, state["proposal_generator.fcos_head.centerness.weight"])
