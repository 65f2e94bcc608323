"""Every law that some training steps show, of every recipe on every kind of detector."""

import pytest

from distill_d2.testing import LAWS, Cell, families, recipes

# Of detectors that differ from another by their backbone alone: losses of levels, of stages, with queries.
FEW = {"timm ViT": ("PKD", "GHND", "InstanceConditionalDistillation")}
CELLS = [
    (name, family)
    for name, recipe in recipes().items()
    for family in recipe.only or families()
    if name in FEW.get(family, (name,))
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
