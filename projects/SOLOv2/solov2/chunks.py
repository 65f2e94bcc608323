"""Full-size masks are made and used a part at a time, so that memory does not grow with their number."""

from __future__ import annotations

_PIXELS_AT_ONCE = 2**23  # 32 MiB of float32: on a CPU larger ones take three times as long


def masks_at_once(height: int, width: int) -> int:
    """How many masks (H, W) to work on at once, at least one."""
    return max(1, _PIXELS_AT_ONCE // (height * width))
