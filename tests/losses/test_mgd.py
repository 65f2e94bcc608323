"""MGD: the formula by hand, and what is drawn."""

import pytest
import torch

from distill_d2.losses.mgd import MGD
from distill_d2.testing.maps import plane, view_of
from distill_d2.views import Batch


def bound(maps, teacher, **keys):
    loss = MGD(weight=1.0, **keys)
    views = view_of(maps, "student"), view_of(teacher, "teacher")
    loss.bind(*views)
    return loss, views


def test_hidden_cells_have_the_teachers_squares():
    """A generator that changes nothing: kept cells cost (s - t)^2, hidden ones t^2."""
    s, t = plane([1, 2, 3], [4, 5, 6]), plane([3, 3, 3], [3, 3, 3])
    loss, views = bound({"p3": s.repeat(2, 1, 1, 1)}, {"p3": t.repeat(2, 1, 1, 1)}, mask_ratio=0.5)
    with torch.no_grad():
        for layer in (loss.generation["p3"][0], loss.generation["p3"][2]):
            layer.weight.zero_()[..., 1, 1] = 1
            layer.bias.zero_()
    batch = Batch([], (0, 0), iteration=3, max_iter=9)
    kept = loss.kept("p3", s.repeat(2, 1, 1, 1), 3)
    assert 0 < kept.sum() < kept.numel()
    expected = torch.where(kept > 0, (s - t) ** 2, t**2).sum() / 2
    assert loss(*views, batch)["loss_mgd"].item() == pytest.approx(expected.item())


def test_what_is_drawn():
    """By iteration and level alone; other random numbers stay, and so does a map of another size's share."""
    maps = {"p3": torch.zeros(2, 3, 40, 50), "p4": torch.zeros(2, 3, 40, 50)}
    loss, _ = bound(maps, maps)
    state = torch.get_rng_state()
    kept = loss.kept("p3", maps["p3"], 7)
    torch.rand(3)
    assert torch.equal(kept, loss.kept("p3", maps["p3"], 7))
    torch.set_rng_state(state)
    loss.kept("p3", maps["p3"], 8)
    assert torch.equal(state, torch.get_rng_state())
    others = [loss.kept("p3", maps["p3"], 8), loss.kept("p4", maps["p4"], 7)]
    assert all((other != kept).float().mean() > 0.3 for other in others)
    assert (kept[0] != kept[1]).any()
    assert kept.mean().item() == pytest.approx(0.35, abs=0.03)
    with pytest.raises(ValueError, match=r"MODEL.DISTILLER.MGD.MASK_RATIO is 1.0; expected"):
        MGD(mask_ratio=1.0)
