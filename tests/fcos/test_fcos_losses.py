"""FCOS' losses, by loops."""

import itertools

import naive_fcos as naive
import pytest
import torch
from distill_d2.projects.fcos import losses as module
from distill_d2.projects.fcos.losses import FCOSLoss
from distill_d2.projects.fcos.targets import Targets

from distill_d2.testing.synchronization import no_synchronization

IMAGES, ROWS, CLASSES = 2, 9, 3


def case(positives=6, seed=0):
    """Leaves (N, K, R), (N, 4, R), (N, R), and targets."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.full((IMAGES * ROWS,), CLASSES)
    rows = torch.randperm(IMAGES * ROWS, generator=g)[:positives]
    classes[rows] = torch.randint(CLASSES, (positives,), generator=g)
    classes = classes.view(IMAGES, ROWS)
    ltrb = torch.rand(IMAGES, 4, ROWS, generator=g) * 3 + 0.1
    ltrb = torch.where((classes < CLASSES)[:, None], ltrb, -ltrb)  # outside of every box
    targets = Targets(classes, ltrb, torch.zeros_like(classes), classes < CLASSES)
    leaves = (
        torch.randn(IMAGES, CLASSES, ROWS, generator=g),
        torch.rand(IMAGES, 4, ROWS, generator=g) * 3,
        torch.randn(IMAGES, ROWS, generator=g),
    )
    return [leaf.requires_grad_() for leaf in leaves], targets


def rows_of(x):
    """(N, C, R) as N R lists of C."""
    return x.transpose(1, 2).flatten(0, 1).double().tolist()


def expected(leaves, targets, **options):
    logits, ltrb, quality = leaves
    return naive.losses(
        *(rows_of(logits), rows_of(ltrb), quality.flatten().double().tolist()),
        *(targets.classes.flatten().tolist(), rows_of(targets.ltrb)),
        **options,
    )


@pytest.mark.parametrize(
    "box, quality, gamma", list(itertools.product(module.BOX_LOSSES, module.QUALITIES, (2.0, 1.5)))
)
@pytest.mark.parametrize("positives", [6, 1, 0])
def test_by_loops(box, quality, gamma, positives):
    leaves, targets = case(positives)
    loss = FCOSLoss(box_loss=box, quality=quality, alpha=0.3, gamma=gamma, weight_cls=2.0)
    found = loss(*leaves, targets)
    name = "loss_fcos_ctr" if quality == "ctrness" else "loss_fcos_iou"
    assert list(found) == ["loss_fcos_cls", "loss_fcos_loc", name]
    classes, loc, other, count = expected(leaves, targets, alpha=0.3, gamma=gamma, box=box, kind=quality)
    assert count == max(positives, 1) and (loc > 0) == (other > 0) == (positives > 0)
    assert found["loss_fcos_cls"].item() == pytest.approx(2 * classes / count, rel=1e-5)
    assert found["loss_fcos_loc"].item() == pytest.approx(loc, rel=1e-5)
    assert found[name].item() == pytest.approx(other, rel=1e-5)


def test_normalizers():
    """Without making the host wait for the device."""
    leaves, targets = case()
    classes, *_ = expected(leaves, targets)

    def found(kind, times=1):
        loss = FCOSLoss(normalizer_cls=kind)
        with no_synchronization():
            terms = [loss(*leaves, targets)["loss_fcos_cls"] for _ in range(times)]
        return [classes / term.item() for term in terms]

    assert found("fg") == pytest.approx([6], rel=1e-4)
    assert found("all") == pytest.approx([IMAGES * ROWS], rel=1e-4)
    first = 0.9 * 100 + 0.6
    assert found("moving_fg", 2) == pytest.approx([first, 0.9 * first + 0.6], rel=1e-4)
    assert FCOSLoss(normalizer_cls="moving_fg").state_dict() == {}


@pytest.mark.parametrize("kind", ["fg", "moving_fg", "all"])
def test_over_two_processes(monkeypatch, kind):
    """The other one has twice as many positive locations, and their centerness."""
    monkeypatch.setattr(module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(3))
    leaves, targets = case()
    found = FCOSLoss(normalizer_cls=kind)(*leaves, targets)
    classes, loc, other, _ = expected(leaves, targets)
    normalizer = {"fg": 9, "moving_fg": 0.9 * 100 + 0.9, "all": IMAGES * ROWS * 1.5}[kind]
    assert found["loss_fcos_cls"].item() == pytest.approx(classes / normalizer, rel=1e-5)
    assert found["loss_fcos_loc"].item() == pytest.approx(loc / 1.5, rel=1e-5)
    assert found["loss_fcos_ctr"].item() == pytest.approx(other / 1.5, rel=1e-5)


@pytest.mark.parametrize("box", module.BOX_LOSSES)
def test_background_boxes_do_not_matter(box):
    """Not even infinite ones, as half precision may have."""
    leaves, targets = case()
    background = ~targets.positive[:, None].expand(-1, 4, -1)
    with torch.no_grad():
        leaves[1][background] = torch.inf
        leaves[1][0, :, targets.positive[0].nonzero()[0]] = 0.0  # a box without area
    found = FCOSLoss(box_loss=box)(*leaves, targets)
    sum(found.values()).backward()
    assert all(term.isfinite() for term in found.values())
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[1].grad[background] == 0).all() and leaves[1].grad.abs().sum() > 0


def test_the_predicted_iou_does_not_train_the_boxes():
    leaves, targets = case()
    term = FCOSLoss(quality="iou")(*leaves, targets)["loss_fcos_iou"]
    assert torch.autograd.grad(term, leaves[1], allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_comes(dtype):
    leaves, targets = case()
    halves = [leaf.to(dtype) for leaf in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FCOSLoss()(*halves, targets)
    exact = FCOSLoss()(*(half.float() for half in halves), targets)
    for name, term in found.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name])
