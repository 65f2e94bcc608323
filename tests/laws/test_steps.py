"""Every law that some training steps show, of every recipe on every kind of detector."""

import pytest

from distill_d2.losses import DISTILL_LOSS_REGISTRY
from distill_d2.losses.neck import NeckLoss
from distill_d2.testing import LAWS, Cell, families, recipes

#: Losses on necks read all detectors alike, as PKD does: of them these, and all in the slow tests.
OF_NECKS = ("RetinaNet", "Faster R-CNN", "SSD")


def marks(loss, family):
    on_necks = issubclass(DISTILL_LOSS_REGISTRY.get(loss), NeckLoss)
    return [pytest.mark.slow] if on_necks and family not in OF_NECKS else []


CELLS = [
    pytest.param((name, family), marks=marks(recipe.loss, family))
    for name, recipe in recipes().items()
    for family in recipe.only or families()
]


@pytest.fixture(scope="module", params=CELLS, ids=", ".join)
def cell(request):
    recipe, family = request.param
    cell = Cell.of_recipe(recipes()[recipe], families()[family])
    if cell.refusal:
        pytest.skip(f"refused: {cell.refusal}")
    return cell


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(cell, law):
    law(cell)
