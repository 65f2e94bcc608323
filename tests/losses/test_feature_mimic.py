"""FeatureMimic against literals, and against the formula in its docstring."""

import pytest
import torch

from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.testing.maps import compare, plane

S, T = plane([1, 2], [3, 4]), plane([1, 4], [3, 3.5])  # differences 0, -2, 0, 0.5
FORMS = {"L2": 1.0625, "L1": 0.625, "smoothL1": 0.40625}


def mimic(student, teacher, **options):
    return compare(FeatureMimic(**options), {"p3": student}, {"p3": teacher})["loss_feature_mimic"]


@pytest.mark.parametrize("form, expected", FORMS.items())
def test_literals(form, expected):
    assert mimic(S, T, loss_form=form).item() == pytest.approx(expected)


def test_levels_count_the_same_whatever_their_size():
    large = S.repeat(1, 1, 4, 4)
    terms = compare(FeatureMimic(), {"p3": large, "p4": S}, {"p3": large, "p4": T})
    assert terms["loss_feature_mimic"].item() == pytest.approx(1.0625 / 2)


def test_channel_normalization_literal():
    # 2 (1 - r) with r = 0.8
    value = mimic(S, plane([1, 2], [4, 3]), normalize="channel")
    assert value.item() == pytest.approx(0.4, rel=1e-4)


@pytest.mark.parametrize("normalize, expected", [("none", 4.0), ("channel", 0.0), ("level", 4.0)])
def test_what_is_normalized_together(normalize, expected):
    low, high = plane([0, 0], [0, 0]), plane([2, 2], [2, 2])
    student, teacher = torch.cat([low, high], dim=1), torch.cat([high, low], dim=1)
    assert mimic(student, teacher, normalize=normalize).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", ["none", "channel", "level"])
def test_equals_the_plain_formula(form, normalize):
    student, teacher = torch.randn(2, 3, 5, 4) * 3 + 1, torch.randn(2, 3, 5, 4)
    leaf = student.clone().requires_grad_()
    value = mimic(leaf, teacher, loss_form=form, normalize=normalize)
    value.backward()

    plain = student.double().requires_grad_()
    expected = _plain(plain, teacher.double(), form, normalize)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=1e-5, atol=1e-7)


def _plain(student, teacher, form, normalize):
    maps = []
    for feature in (student, teacher):
        if normalize == "channel":
            flat = feature.transpose(0, 1).reshape(feature.shape[1], -1)
            mean, var = flat.mean(1).view(-1, 1, 1), flat.var(1, correction=0).view(-1, 1, 1)
            feature = (feature - mean) / (var + 1e-6).sqrt()
        if normalize == "level":
            feature = (feature - feature.mean()) / (feature.var(correction=0) + 1e-6).sqrt()
        maps.append(feature)
    gap = (maps[0] - maps[1]).abs()
    rounded = torch.where(gap < 1, gap**2 / 2, gap - 0.5)
    return {"L2": gap**2, "L1": gap, "smoothL1": rounded}[form].mean()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 4, 4)])
@pytest.mark.parametrize("normalize", ["none", "channel", "level"])
def test_constant_maps_are_finite(shape, normalize):
    feature = torch.full(shape, 0.1, requires_grad=True)
    value = mimic(feature, torch.randn(shape), normalize=normalize)
    value.backward()
    assert value.isfinite() and feature.grad.isfinite().all()
