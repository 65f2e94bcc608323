"""AT by hand."""

import pytest
import torch

from distill_d2.losses.at import AT, normalized_attention
from distill_d2.testing.maps import compare, plane


def test_by_hand():
    """Channels may differ: of (3, 4) and (4, 3) the mean is (12.5, 12.5), of the teacher (1, 0)."""
    student = {"p3": torch.cat([plane([3, 4]), plane([4, 3])], dim=1)}
    found = compare(AT(weight=1.0), student, {"p3": plane([1, 0])})
    even = 0.5**0.5
    expected = ((even - 1) ** 2 + even**2) / 2
    assert found["loss_at"].item() == pytest.approx(expected)


def test_a_map_of_zeros_has_no_gradient():
    feature = torch.zeros(1, 2, 1, 3, requires_grad=True)
    found = compare(AT(), {"p3": feature}, {"p3": torch.ones(1, 1, 1, 3)})
    found["loss_at"].backward()
    assert not feature.grad.any()


def test_scale_does_not_matter():
    feature = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(normalized_attention(7 * feature), normalized_attention(feature))
