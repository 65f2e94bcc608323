"""The losses from given outputs."""

import naive_solov2 as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.solov2.losses import class_loss, dice_loss, mask_loss, predict_masks
from distill_d2.projects.solov2.targets import ImageTargets

SIZE, CELLS, WEIGHTS = (5, 7), 11, 4


def image(entries, fill=0, masks=3, seed=0):
    """Targets with these (cell, object), and ``fill`` that do not count."""
    random = np.random.default_rng(seed)
    cell, index = zip(*entries) if entries else ((), ())
    return ImageTargets(
        classes=torch.zeros(CELLS, dtype=torch.int64),
        cell=torch.tensor([*cell, *[0] * fill], dtype=torch.int64),
        object=torch.tensor([*index, *[0] * fill], dtype=torch.int64),
        valid=torch.tensor([True] * len(entries) + [False] * fill),
        masks=torch.tensor(random.uniform(size=(masks, *SIZE)) < 0.4),
    )


def outputs(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kernels = torch.randn(images, CELLS, WEIGHTS, generator=generator, requires_grad=True)
    features = torch.randn(images, WEIGHTS, *SIZE, generator=generator, requires_grad=True)
    return kernels, features


def test_dice_by_loops():
    masks, wanted = torch.rand(4, *SIZE), torch.rand(4, *SIZE) < 0.4
    wanted[3] = False
    expected = [naive.dice(*pair) for pair in zip(masks.numpy(), wanted.numpy())]
    np.testing.assert_allclose(dice_loss(masks, wanted), expected, rtol=1e-5)


def test_masks_by_hand():
    """A kernel is a 1x1 convolution."""
    feature = torch.randn(WEIGHTS, *SIZE)
    kernels = torch.randn(3, WEIGHTS)
    expected = torch.nn.functional.conv2d(feature[None], kernels[:, :, None, None])[0].sigmoid()
    torch.testing.assert_close(predict_masks(kernels, feature), expected)


def test_mask_loss_by_loops():
    """The mean of all entries of all images, duplicates too."""
    entries = [[(0, 0), (0, 0), (3, 2), (10, 1)], [], [(3, 1)]]
    targets = [image(e, fill=2 * i, seed=i) for i, e in enumerate(entries)]
    kernels, features = outputs(3)
    loss = mask_loss(kernels, features, targets)
    losses = []
    for i, found in enumerate(entries):
        for cell, k in found:
            mask = np.tensordot(kernels[i, cell].detach(), features[i].detach(), axes=1)
            losses.append(naive.dice(1 / (1 + np.exp(-mask)), targets[i].masks[k].numpy()))
    assert len(losses) == 5 and loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_fills_up_changes_nothing():
    entries, found = [(1, 0), (2, 1), (2, 2)], []
    for fill in (0, 5):
        kernels, features = outputs(1)
        mask_loss(kernels, features, [image(entries, fill=fill)]).backward()
        assert set(kernels.grad[0].abs().sum(dim=1).nonzero().flatten().tolist()) == {1, 2}
        found.append((kernels.grad, features.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fill", [0, 3])
def test_no_entries(fill):
    kernels, features = outputs(2)
    loss = mask_loss(kernels, features, [image([], fill=fill), image([], fill=fill, masks=1)])
    loss.backward()
    assert loss.item() == 0.0 and not kernels.grad.any() and not features.grad.any()
    assert kernels.grad.isfinite().all() and features.grad.isfinite().all()


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.0)])
def test_class_loss_by_loops(alpha, gamma):
    logits = 2 * torch.randn(2, CELLS, 3)
    classes = torch.randint(0, 5, (2, CELLS)).clamp(max=3)
    expected = naive.focal(logits.flatten(0, 1).tolist(), classes.flatten().tolist(), alpha, gamma)
    assert class_loss(logits, classes, alpha, gamma).item() == pytest.approx(expected, rel=1e-4)
