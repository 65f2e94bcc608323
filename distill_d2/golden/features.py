"""Fixtures of the losses on feature maps.

Inputs "student/<level>" and "teacher/<level>", (N, C, H, W) of equal shapes. Outputs with weight 1,
"pkd/loss" and "feature_mimic/<form>/<normalize>/loss" (the values of LOSS_FORM and NORMALIZE), and
beside each loss its gradients "grad/<level>" with respect to the student's maps.
"""

from __future__ import annotations

import numpy as np

from distill_d2 import DistillLoss
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.pkd import PKD
from distill_d2.testing.maps import Maps, compare

from . import Fixture, golden_kind

_INPUTS = ["student/*", "teacher/*"]


@golden_kind(holds=[*_INPUTS, "pkd/loss"], rtol=1e-5, atol=1e-7)
def pkd(fixture: Fixture) -> None:
    _compare(fixture, PKD(weight=1.0), "pkd")


@golden_kind(holds=[*_INPUTS, "feature_mimic/*/loss"], rtol=1e-5, atol=1e-7)
def feature_mimic(fixture: Fixture) -> None:
    for name in fixture.names("feature_mimic/*/loss"):
        folder = name.rpartition("/")[0]
        _, form, normalize = folder.split("/")
        _compare(fixture, FeatureMimic(loss_form=form, normalize=normalize), folder)


def _compare(fixture: Fixture, loss: DistillLoss, folder: str) -> None:
    student = read_maps(fixture, "student", requires_grad=True)
    strides = {name: 2**index for index, name in enumerate(student)}  # only compared for equality
    total = sum(compare(loss, student, read_maps(fixture, "teacher"), strides).values())
    total.backward()
    fixture.compare(f"{folder}/loss", total)
    for level, maps in student.items():
        name = f"{folder}/grad/{level}"
        # The larger the maps, the smaller each gradient.
        fixture.compare(name, maps.grad, atol=1e-6 * np.nanmax(abs(fixture[name])))


def read_maps(fixture: Fixture, folder: str, requires_grad: bool = False) -> Maps:
    """The arrays "folder/level" by level name."""
    names = fixture.names(f"{folder}/*")
    return {
        name.rpartition("/")[2]: fixture.tensor(name).requires_grad_(requires_grad) for name in names
    }
