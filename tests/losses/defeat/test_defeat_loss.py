"""DeFeat and FGFI on random maps, heads and boxes: against the naive version, and what is not computed."""

import numpy as np
import pytest
import torch
from defeat_case import ALL, BACKBONE, HEAD, NECK, OFF, WEIGHTS, Case

from distill_d2.losses.fgfi import FGFI
from distill_d2.testing.maps import plane

NAMES = ("neck", "neck_back", "bb", "bb_back", "hcls", "hcls_back")
TERMS = dict(zip(WEIGHTS, (f"loss_defeat_{name}" for name in NAMES)))


# Against the naive version

SETTINGS = {
    "default": {},
    "all terms": ALL,
    "roi": {**NECK, "mask": "roi", "roi_phi": 0.4},
    "gaussian": {**NECK, "mask": "gaussian"},
    "one": {**NECK, "mask": "one"},
    "all levels": {**NECK, "level_assign": "all"},
    "all levels, gaussian": {**NECK, "level_assign": "all", "mask": "gaussian"},
    "L1": {**ALL, "loss_form": "L1"},
    "smoothL1": {**ALL, "loss_form": "smoothL1"},
    "inverted": {**ALL, "loss_form": "smoothL1", "reference_bugs": True},
    "L2 as ever": {**ALL, "reference_bugs": True},
    "no adapters": {**NECK, **BACKBONE, "hint_neck_w": 1.0, "neck_adapt": False},
    "adapters of the backbone": {**BACKBONE, "bb_adapt": True},
    "other channels": {**ALL, "channels": (2, 4), "stage_channels": (1, 3), "neck_adapt": False},
    "other sizes": {**ALL, "enlarged": ("p3", "p4", "res4"), "bb_adapt": True},
    "some levels": {**ALL, "in_features": ("p4", "p2"), "bb_features": ("res5", "res3")},
    "one level": {**NECK, "in_features": ("p3",), "finest_scale": 1000.0},
    "objects alone": {**OFF, "hint_neck_w": 2.0, "hint_bb_w": 3.0, "head_cls_w": 4.0},
    "background alone": {**OFF, "hint_neck_back_w": 2.0, "hint_bb_back_w": 3.0, "head_cls_back_w": 4.0},
    "temperatures": {**HEAD, "head_cls_t": 3.0, "head_cls_back_t": 0.5},
    "all rows": {**HEAD, "head_cls_rows": "all", "head_cls_t": 2.0, "head_cls_back_t": 7.0},
    "correct rows": {**HEAD, "head_cls_rows": "correct", "head_cls_t": 2.0, "head_cls_back_t": 7.0},
    "correct objects": {**HEAD, "head_cls_rows": "cfore", "classes": 2, "rows": (20, 14)},
    "teacher's proposals": {**HEAD, "proposals": "teacher"},
    "both proposals": {**HEAD, "proposals": "both", "head_cls_t": 2.0},
    "all rows of both": {**HEAD, "proposals": "both", "head_cls_rows": "all"},
    "dense": {**ALL, "dense": True, "head_cls_t": 3.0, "head_cls_back_t": 0.5},
    "all dense rows": {**HEAD, "dense": True, "head_cls_rows": "all", "head_cls_t": 2.0},
    "linear": {**ALL, "decay": "linear", "iteration": 3, "max_iter": 10},
    "cos": {**ALL, "decay": "cos", "iteration": 3, "max_iter": 10},
    "up": {**ALL, "decay": "up-down", "iteration": 2, "max_iter": 10},
    "down": {**ALL, "decay": "up-down", "iteration": 7, "max_iter": 10},
    "three images": {**ALL, "objects": (2, 0, 4)},
    "one image": {**ALL, "objects": (2,)},
    "no multiples": {**ALL, "padded": (50, 75)},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_naive_settings(settings):
    Case(seed=1, **{"finest_scale": 14.0, **SETTINGS[settings]}).compare()


@pytest.mark.parametrize("seed", range(12))
def test_naive_loss_of_random_steps(seed):
    random = np.random.default_rng(seed)
    images, dense = int(random.integers(1, 4)), bool(random.integers(0, 2))
    first = int(random.integers(0, 2))
    Case(
        seed=seed,
        objects=random.integers(0, 5, images).tolist(),
        padded=tuple(random.integers(33, 90, 2).tolist()),
        strides=(4, 8, 16, 32)[first : first + int(random.integers(1, 4))],
        channels=tuple(random.integers(1, 4, 2).tolist()),
        stage_channels=tuple(random.integers(1, 4, 2).tolist()),
        rows=random.integers(1, 12, images).tolist(),
        classes=int(random.integers(1, 5)),
        dense=dense,
        **{name: float(random.choice([0.5, 3.0])) for name in WEIGHTS},
        mask=str(random.choice(["gt", "gt", "roi", "gaussian"])),
        level_assign=str(random.choice(["single", "all"])),
        finest_scale=float(random.uniform(5, 60)),
        roi_phi=float(random.uniform(0.2, 0.8)),
        loss_form=str(random.choice(["L2", "L1", "smoothL1"])),
        neck_adapt=bool(random.integers(0, 2)),
        bb_adapt=bool(random.integers(0, 2)),
        head_cls_t=float(random.uniform(0.5, 4)),
        head_cls_back_t=float(random.uniform(0.5, 4)),
        head_cls_rows=str(
            random.choice(["decouple", "all"] if dense else ["decouple", "correct", "cfore"])
        ),
        proposals="student" if dense else str(random.choice(["student", "teacher", "both"])),
        decay=str(random.choice(["none", "linear", "cos", "up-down"])),
        iteration=int(random.integers(0, 9)),
        max_iter=10,
    ).compare()


FGFI_SETTINGS = {
    "default": {},
    "relu": {"adapter_relu": True},
    "no adapter": {"adapter": False},
    "other channels": {"adapter": False, "channels": (2, 3)},
    "all levels": {"level_assign": "all", "roi_phi": 0.8},
    "phi 0": {"roi_phi": 0.0},
    "some levels": {"in_features": ("p4", "p2")},
    "three images": {"objects": (0, 4, 1), "padded": (50, 75)},
    "no boxes": {"objects": (0, 0)},
}


@pytest.mark.parametrize("settings", FGFI_SETTINGS)
def test_naive_fgfi(settings):
    for seed in (1, 2):
        case = Case(seed=seed, loss=FGFI, **{"finest_scale": 14.0, **FGFI_SETTINGS[settings]})
        terms = case.compare()
        assert (terms["loss_fgfi"] > 0) == (settings != "no boxes")


# By hand

S, T = plane([1, 2, 3, 4], [0, 0, 0, 0]), plane([1, 0, 2, 4], [3, 0, 0, 1])  # squares 0 4 1 0, 9 0 0 1


def test_neck_by_hand():
    """An object in the first two cells: 4 / (2 * 2) of it, and 11 / (2 * 6) of the background."""
    case = Case(objects=(1,), strides=(8,), channels=(1, 1), padded=(16, 32), neck_adapt=False)
    case.truth = [torch.tensor([[0.0, 0, 16, 8]])]
    case.maps["student"]["p3"], case.maps["teacher"]["p3"] = S.clone().requires_grad_(), T
    terms = case.run()
    assert terms["loss_defeat_neck"].item() == pytest.approx(3.0 * 4 / 4)
    assert terms["loss_defeat_neck_back"].item() == pytest.approx(12.0 * 11 / 12)
    gradient = torch.tensor(
        [[[[0, 3.0 * 4 / 4, 12.0 * 2 / 12, 0], [12.0 * -6 / 12, 0, 0, 12.0 * -2 / 12]]]]
    )
    torch.testing.assert_close(case.maps["student"]["p3"].grad, gradient)


@pytest.mark.parametrize(
    "decay, factors",
    [
        ("none", (1, 1, 1, 1, 1)),
        ("linear", (1, 0.875, 0.75, 0.5, 0.125)),
        ("cos", (1, 0.9619398, 0.8535534, 0.5, 0.0380602)),
        ("up-down", (1, 1.5, 2, 4 / 3, 1 / 3)),
    ],
)
def test_decay_by_hand(decay, factors):
    """At 0, 1, 2, 4 and 7 of 8 iterations, of all terms."""
    plain = Case(**ALL).run()
    for iteration, factor in zip((0, 1, 2, 4, 7), factors):
        terms = Case(**ALL, decay=decay, iteration=iteration, max_iter=8).run()
        for name, term in terms.items():
            assert term.item() == pytest.approx(factor * plain[name].item(), rel=1e-5)


@pytest.mark.parametrize("decay", ["linear", "cos", "up-down"])
def test_decay_needs_the_length_of_the_run(decay):
    message = f"MODEL.DISTILLER.DEFEAT.DECAY is '{decay}', but the length of the run is not known"
    with pytest.raises(ValueError, match=message):
        Case(decay=decay, max_iter=0).run()
    terms = Case(decay=decay, iteration=9, max_iter=8).run()  # goes on after its end
    assert all(abs(term) < 1e-6 for term in terms.values())
    Case(max_iter=0).run()


# What does not matter


@pytest.mark.parametrize("mask", ["gt", "roi", "gaussian"])
@pytest.mark.parametrize("objects", [(0,), (0, 0), (0, 2)], ids=str)
def test_images_without_objects(mask, objects):
    """Terms are finite and differentiable; without any object, those of objects in maps are 0."""
    case = Case(objects=objects, mask=mask, **ALL)
    terms = case.compare()
    for name in ("loss_defeat_neck", "loss_defeat_bb"):
        assert (terms[name] > 0) == any(objects)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.loss.parameters())


# Gradients, and what is not computed


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_term_without_a_weight_is_absent(weight):
    others = Case(**{**ALL, weight: 0.0}).run()
    assert set(others) == set(TERMS.values()) - {TERMS[weight]}
    assert set(Case(**{**OFF, weight: 1.0}).run()) == {TERMS[weight]}


def test_what_no_term_needs_is_not_asked_for():
    neck, stages = ["backbone"], ["backbone", "backbone.bottom_up"]
    for settings, needed, paths in (
        (NECK, set(), neck),
        ({**NECK, "mask": "roi"}, {"anchors"}, neck),
        (BACKBONE, set(), stages),
        ({**BACKBONE, "mask": "roi"}, set(), stages),  # which is the neck's
        ({**BACKBONE, "head_cls_back_w": 1.0, "head_cls_w": 1.0}, {"box_head"}, stages),
        (HEAD, {"box_head"}, neck),
    ):
        views = Case(**settings).views
        assert views[0].required == needed and views[1].required == needed - {"anchors"}
        assert all(view.taps.paths == paths for view in views)
    case = Case(**HEAD, proposals="teacher")
    assert case.views[1].required == {"box_head", "own_proposals"}
    assert not list(case.loss.parameters())


# Adapters


def test_adapters_start_from_a_cut_normal_distribution():
    case = Case(channels=(16, 16), fresh=True, adapt_init_std=0.01)
    adapters = case.loss.neck.adapters
    assert list(adapters) == ["p2", "p3", "p4"]
    weights = [adapter.weight for adapter in adapters.values()]
    assert not torch.equal(weights[0], weights[1])
    for weight in weights:
        assert weight.shape == (16, 16, 3, 3) and abs(weight.mean()) < 0.001
        # Of a normal distribution's numbers beyond 2 the remainder: a deviation of 0.866.
        assert 0.019 < weight.abs().max() < 0.02 and 0.0083 < weight.std() < 0.0090
    biases = torch.cat([adapter.bias for adapter in adapters.values()])
    assert 0.05 < biases.abs().max() <= 1 / 12  # as torch chooses: within 1 / sqrt(16 * 9)


@pytest.mark.parametrize(
    "settings, adapters",
    [
        ({}, ["neck.p2", "neck.p3", "neck.p4"]),
        ({"neck_adapt": False}, []),
        ({"neck_adapt": False, "channels": (2, 3)}, ["neck.p2", "neck.p3", "neck.p4"]),
        ({**BACKBONE}, []),
        ({**BACKBONE, "bb_features": ("res4",), "bb_adapt": True}, ["backbone.res4"]),
        ({**BACKBONE, "stage_channels": (2, 3)}, ["backbone.res3", "backbone.res4", "backbone.res5"]),
    ],
)
def test_which_adapters(settings, adapters):
    loss = Case(**settings).loss
    found = [
        f"{part}.{name}"
        for part in ("neck", "backbone")
        for name in getattr(getattr(loss, part), "adapters", ())
    ]
    assert found == adapters
