"""The value distance: the fast path, the plain path and the naive version agree."""

import pytest
import torch
from naive_icd import value_loss

from distill_d2.losses.icd import mimic
from distill_d2.losses.icd.mimic import LOSS_FORMS, NORMS, layer_norm, value_distance
from distill_d2.losses.icd.projection import project_levels

HEADS, CHANNELS, DIM, S = 3, 5, 12, 19
SIZES = ((3, 4), (2, 2), (1, 3))


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Inputs:
    """Maps, projection, teacher's values and a mass that differs much between places."""

    def __init__(self, images=2, dtype=torch.float64, layout=torch.contiguous_format):
        self.maps = [
            random(images, CHANNELS, *size, seed=i).to(dtype, memory_format=layout).requires_grad_()
            for i, size in enumerate(SIZES)
        ]
        self.weight = random(DIM, CHANNELS).to(dtype).requires_grad_()
        self.bias = random(DIM).to(dtype).requires_grad_()
        self.teacher = (2 * random(images, S, DIM) + 1).to(dtype)
        self.mass = (3 * random(images, HEADS, S)).softmax(-1).to(dtype) * torch.arange(
            1, images + 1, dtype=dtype
        ).view(-1, 1, 1)
        rows, columns = random(images, 6, DIM), random(images, 9, DIM)
        self.offsets = rows.to(dtype).requires_grad_(), columns.to(dtype).requires_grad_()

    def leaves(self, with_offsets=False):
        return [self.weight, *(self.offsets if with_offsets else [self.bias]), *self.maps]

    def distance(self, with_offsets=False, **options):
        offsets = self.offsets if with_offsets else None
        projection = (self.maps, self.weight, self.bias, offsets)
        return value_distance(*projection, self.teacher, self.mass, **options)

    def plain(self, form="mse", norm="ln"):
        student = project_levels(self.maps, self.weight, self.bias)
        return mimic._plain_distance(student, self.teacher, self.mass, form, norm)

    def naive(self, form, norm, with_offsets=False):
        positions = torch.cat([feature.flatten(2).transpose(1, 2) for feature in self.maps], dim=1)
        student = positions @ self.weight.t()
        if with_offsets:
            heights, widths = zip(*SIZES)
            rows, columns = (o.split(n, dim=1) for o, n in zip(self.offsets, (heights, widths)))
            grids = [(r[:, :, None] + c[:, None]).flatten(1, 2) for r, c in zip(rows, columns)]
            student = student + torch.cat(grids, dim=1)
        else:
            student = student + self.bias
        student, teacher = (  # (S, N, h, d)
            values.unflatten(-1, (HEADS, -1)).transpose(0, 1) for values in (student, self.teacher)
        )
        if norm == "ln":
            student = layer_norm(student)
        if norm in ("ln", "tln"):
            teacher = layer_norm(teacher)
        return value_loss("L2" if form == "l2" else form, student, teacher, self.mass[:, :, None])


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def same_gradients(actual, expected_result, leaves, **tolerance):
    for found, expected in zip(gradients(actual, leaves), gradients(expected_result, leaves)):
        assert found.shape == expected.shape and expected.abs().max() > 0
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("with_offsets", [False, True], ids=["bias", "offsets"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", LOSS_FORMS)
def test_naive_distance(form, norm, with_offsets):
    inputs = Inputs()
    actual = inputs.distance(with_offsets, form=form, norm=norm)
    expected = inputs.naive(form, norm, with_offsets)
    torch.testing.assert_close(actual, expected)
    same_gradients(actual, expected, inputs.leaves(with_offsets))


def test_only_the_default_takes_the_fast_path(monkeypatch):
    inputs = Inputs()
    monkeypatch.setattr(mimic, "_plain_distance", lambda *_: pytest.fail("the plain path"))
    inputs.distance()
    inputs.distance(form="MSE")
    for options in ({"form": "l1"}, {"norm": "tln"}, {"with_offsets": True}):
        with pytest.raises(pytest.fail.Exception):
            inputs.distance(**options)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 8, 10, 2048])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_fast_path_is_the_plain_path(monkeypatch, images, chunk, layout):
    """Levels have 12, 4 and 3 positions; chunks end inside them, at their ends, or not at all."""
    monkeypatch.setattr(mimic, "_CPU_CHUNK", chunk)
    inputs = Inputs(images, layout=layout)
    actual, expected = inputs.distance(), inputs.plain()
    torch.testing.assert_close(actual, expected)
    same_gradients(actual, expected, inputs.leaves())


def test_fast_path_with_one_channel_varying_little():
    """Where eps of the layer norm counts: values almost equal within each head."""
    inputs = Inputs()
    with torch.no_grad():
        inputs.weight *= 1e-3
        inputs.bias.fill_(3.0)
        inputs.teacher.mul_(1e-3)
    actual, expected = inputs.distance(), inputs.plain()
    torch.testing.assert_close(actual, expected)
    same_gradients(actual, expected, inputs.leaves())


def test_values_without_variance_are_finite():
    inputs = Inputs()
    with torch.no_grad():
        inputs.weight.zero_()
        inputs.bias.fill_(1.0)
        inputs.teacher.fill_(2.0)
    loss = inputs.distance()
    assert loss == 0
    assert all(gradient.isfinite().all() for gradient in gradients(loss, inputs.leaves()))


def test_maps_that_need_no_gradient_get_none():
    inputs, detached = Inputs(), Inputs()
    for index in (0, 2):
        detached.maps[index].requires_grad_(False)
    inputs.distance().backward()
    detached.distance().backward()
    assert [feature.grad is None for feature in detached.maps] == [True, False, True]
    torch.testing.assert_close(detached.maps[1].grad, inputs.maps[1].grad)
    torch.testing.assert_close(detached.weight.grad, inputs.weight.grad)


def test_second_backward_is_a_clear_error():
    loss = Inputs().distance()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", LOSS_FORMS)
def test_without_mass_nothing_is_there(form, norm):
    inputs = Inputs(dtype=torch.float32)
    inputs.mass.zero_()
    loss = inputs.distance(form=form, norm=norm)
    assert loss == 0
    for gradient in gradients(loss, inputs.leaves()):
        assert (gradient == 0).all()


def test_empty_image_dilutes_mse_but_not_the_pooled_forms():
    both, first = Inputs(2), Inputs(2)
    for inputs in (both, first):
        inputs.mass[1] = 0
    first.maps = [feature[:1].detach().requires_grad_() for feature in first.maps]
    first.teacher, first.mass = first.teacher[:1], first.mass[:1]
    torch.testing.assert_close(2 * both.distance(), first.distance())
    torch.testing.assert_close(both.distance(form="l1"), first.distance(form="l1"))
