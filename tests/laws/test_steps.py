"""Every law that some training steps show, of every recipe on every kind of detector."""

import pytest

from distill_d2.losses import DISTILL_LOSS_REGISTRY
from distill_d2.losses.neck import NeckLoss
from distill_d2.testing import LAWS, Cell, families, recipes
from distill_d2.testing.laws import trains_the_student

#: Losses on necks read all detectors alike, as PKD does. They take a step on each in every run; the other laws are
#: tested on these, and on all in the slow tests.
OF_NECKS = ("RetinaNet", "Faster R-CNN", "SSD")


def marks(loss, family, law):
    on_necks = issubclass(DISTILL_LOSS_REGISTRY.get(loss), NeckLoss)
    return (
        [pytest.mark.slow]
        if on_necks and family not in OF_NECKS and law is not trains_the_student
        else []
    )


LAWS_OF_CELLS = [
    pytest.param(
        (name, family), law, marks=marks(recipe.loss, family, law), id=f"{name}, {family}-{law.__name__}"
    )
    for name, recipe in recipes().items()
    for family in recipe.only or families()
    for law in LAWS
]


@pytest.fixture(scope="module")
def cell(request):
    recipe, family = request.param
    cell = Cell.of_recipe(recipes()[recipe], families()[family])
    if cell.refusal:
        pytest.skip(f"refused: {cell.refusal}")
    return cell


@pytest.mark.parametrize("cell, law", LAWS_OF_CELLS, indirect=["cell"])
def test_law(cell, law):
    law(cell)
