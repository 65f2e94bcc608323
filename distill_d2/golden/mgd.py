"""Fixtures of MGD, of the authors' code, with the random numbers that it drew."""

from __future__ import annotations

import torch

from distill_d2.losses.mgd import MGD

from . import Fixture
from .neck import cases_of, maps_of, neck_kind, run_case


@neck_kind(inputs="mgd/alpha mgd/lambda mgd/*/uniform/*")
def mgd(fixture: Fixture) -> None:
    for case in cases_of(fixture, "mgd"):
        drawn = maps_of(fixture, f"mgd/{case}/uniform")
        weight, ratio = float(fixture["mgd/alpha"]), float(fixture["mgd/lambda"])
        loss = _Drawn(drawn, weight=weight, mask_ratio=ratio)
        parameters = {"pairs.adapters.{}": "align", "generation.{}": "generation"}
        run = run_case(fixture, f"mgd/{case}", loss, parameters)
        for level, feature in run.maps.items():
            fixture.compare(f"mgd/{case}/kept/{level}", loss.kept(level, feature, 0)[:, 0])


class _Drawn(MGD):
    """MGD with given random numbers, (N, H, W) by level."""

    def __init__(self, drawn: dict[str, torch.Tensor], **keys: float):
        super().__init__(**keys)
        self._drawn = drawn

    def uniform(self, level: str, feature: torch.Tensor, iteration: int) -> torch.Tensor:
        return self._drawn[level][:, None]
