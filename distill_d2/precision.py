"""What a device computes in reduced precision."""

from __future__ import annotations

import torch


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes bfloat16 itself instead of emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Private names, so guarded; mkldnn's own check also says yes where oneDNN only emulates.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
