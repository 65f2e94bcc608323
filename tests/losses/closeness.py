"""Numbers that agree to a part of the largest one."""

from __future__ import annotations

import torch


def close(actual, expected, name: str = "", precision: float = 1e-5, floor: float = 0.01) -> None:
    """Equal to ``precision`` of the largest number there, or of ``floor`` where that is larger."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, name
    assert actual.isfinite().all(), name
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, floor)
    torch.testing.assert_close(
        actual, expected, atol=precision * scale, rtol=0, msg=lambda text: f"{name}: {text}"
    )
