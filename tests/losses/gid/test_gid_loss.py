"""GID as a whole on random predictions: against the naive version, and what is not computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gid_case import OFF, TERMS, Case, close, heads_view, only, or_zero, refuse

from distill_d2.losses.gid import GID
from distill_d2.losses.gid import loss as loss_module

MODES = ("all", "pos", "semi_pos", "neg", "gt")
POINTS = {"ltrb": True, "centerness": True}
PROPOSALS = {"proposals": (24, 15)}
CLASSES = {**PROPOSALS, "class_specific": True}

# Against the naive version

SETTINGS = {
    "default": {},
    "max_first": {"gi_score": "max_first"},
    "points": {**POINTS, "response_reg_mode": "GIoU", "response_mask": "inside"},
    "centerness": {**POINTS, "gi_centerness": True, "gi_score": "max_first"},
    "proposals": PROPOSALS,
    "proposals_max_first": {**PROPOSALS, "gi_score": "max_first", "response_reg_mode": "GIoU"},
    "classes": {**CLASSES, "response_reg_mode": "L2", "response_cls_mode": "L1"},
    "classes_pos": {**CLASSES, "gi_mode": "pos", "response_reg_mask": "gi_pos"},
    "classes_inside": {**CLASSES, "response_mask": "inside", "response_reg_mode": "GIoU"},
    "l1": {"feature_mode": "L1", "response_cls_mode": "L1", "response_reg_mode": "L2"},
    "betas": {
        "feature_mode": "L1",
        "feature_smooth_l1_beta": 0.7,
        "relation_smooth_l1_beta": 0.01,
        "response_cls_mode": "L1",
        "response_cls_smooth_l1_beta": 0.3,
        "response_reg_smooth_l1_beta": 0.1,
    },
    "norm": {"feature_mode": "norm", "response_cls_mode": "L2", "response_reg_mode": "BCE"},
    "image": {"relation_scope": "image"},
    "inside": {"response_mask": "inside", "response_reg_mask": "gi_pos"},
    "gi_pos": {"response_reg_mask": "gi_pos", "objects": (5, 4)},
    "few": {"gi_post_nms_topk": 2},
    "one": {"gi_post_nms_topk": 1},
    "small": {"gi_pre_nms_topk": 30, "gi_nms_thresh": 0.6, "gi_min_side": 25.0},
    "pooling": {"pooler_resolution": 3, "pooler_sampling_ratio": 3, "in_features": ("p4", "p3")},
    "weights": dict(zip(OFF, (0.5, 2.0, 3.0, 0.1))),
    "default_weights": {name: getattr(GID.Settings(), name) for name in OFF},
    "adapter": {"adapter": True},
    "adapters": {"channels": (3, 5), "adapter_share_weights": False, "adapter_kernel_size": 1},
    "shared_adapter": {"channels": (5, 3)},
}

RARE = ("one", "classes_pos")  # not enough instances of an image, or of a kind, for each term


@pytest.mark.parametrize("settings", SETTINGS)
def test_naive_settings(settings):
    terms = Case(seed=1, **SETTINGS[settings]).compare()
    assert len(terms) == 4 and all(term > 0 or settings in RARE for term in terms.values())


@pytest.mark.parametrize("seed", range(30, 38))
def test_naive_loss_of_random_sizes(seed):
    random = np.random.default_rng(seed)
    images = int(random.integers(1, 4))
    padded = tuple((32 * random.integers(2, 4, 2)).tolist())
    sizes = [tuple(int(side - random.integers(0, 31)) for side in padded) for _ in range(images)]
    proposals = random.integers(1, 25, images).tolist() if seed % 3 == 0 else ()
    Case(
        seed=seed,
        objects=random.integers(0, 4, images).tolist(),
        sizes=sizes,
        padded=padded,
        strides=(4, 8, 16, 32)[int(random.integers(1, 4)) :],
        classes=int(random.integers(1, 5)),
        channels=tuple(random.choice([2, 4], 2).tolist()),
        proposals=proposals,
        class_specific=bool(proposals and random.integers(0, 2)),
        centerness=not proposals,
        ltrb=bool(random.integers(0, 2)),
        gi_centerness=bool(random.integers(0, 2)),
        gi_score=str(random.choice(["classwise", "max_first"])),
        gi_mode=str(random.choice(["all", "neg", "gt"])),
        gi_post_nms_topk=int(random.integers(1, 8)),
        relation_scope=str(random.choice(["batch", "image"])),
        response_mask=str(random.choice(["matcher", "inside"])),
        response_reg_mask=str(random.choice(["gi", "gi_pos"])),
        response_reg_mode=str(random.choice(["L1", "GIoU"])),
    ).compare()


@pytest.mark.parametrize("thresholds", [(0.4, 0.5), (0.0, 1.0), (0.2, 0.2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_naive_modes(mode, thresholds):
    case = Case(seed=5, objects=(4, 3), gi_mode=mode, iou_thresholds=thresholds)
    case.compare()
    kept, every = case.instances(), Case(seed=5, objects=(4, 3)).instances()
    if mode in ("pos", "semi_pos", "neg"):  # of those selected, not others in their place
        assert torch.equal(kept.boxes, every.boxes) and not (kept.valid & ~every.valid).any()
        assert kept.valid.sum() < every.valid.sum()


@pytest.mark.parametrize("kind", [{}, POINTS, {**CLASSES, "proposals": (24, 15, 9)}], ids=str)
def test_naive_kinds_of_instances(kind):
    for mode in ("pos", "semi_pos", "neg"):
        case = Case(seed=5, objects=(4, 0, 3), gi_mode=mode, **kind)
        assert case.instances().valid.sum(dim=1).tolist() == [
            len(i.boxes) for i in case.naive_instances()
        ]


@pytest.mark.parametrize("mode", ["gt", "semi_pos"])
def test_modes_in_any_case_of_letters(mode):
    terms, others = (Case(gi_mode=name, objects=(0, 3)).step() for name in (mode, mode.title()))
    assert terms == others


@pytest.mark.parametrize("kind", [{}, PROPOSALS], ids=["anchors", "proposals"])
def test_ground_truth_in_place_of_a_selection(kind):
    case = Case(objects=(3, 1), gi_mode="gt", **kind)
    found = case.instances()
    assert found.valid.tolist() == [[True] * 3, [True, False, False]]
    for image, boxes in enumerate(case.truth):
        assert torch.equal(found.boxes[image, : len(boxes)], boxes)
    assert (found.scores == found.valid.float()).all() and (found.rows == -1).all()
    case.compare()


def test_unlabeled_images():
    """Nothing but kinds of instances, "gt" and "gi_pos" needs annotations."""
    case, needing = Case(), Case(gi_mode="gt")
    batch = case.batch()
    for item in batch.inputs:
        del item["instances"]
    assert case.loss(*case.views(), batch) == case.forward()
    with pytest.raises(KeyError, match="instances"):
        needing.loss(*needing.views(), batch)


def test_order_of_levels_does_not_matter():
    case, other = Case(), Case(in_features=("p5", "p3", "p4"))
    sizes, order = [192, 48, 12], [1, 2, 0]
    parts = case.rows.anchors[0].split(sizes)
    anchors = torch.cat([parts[i] for i in order])
    heads = []
    for model in (other.student, other.teacher):
        p = other.predictions(model)
        match = lambda boxes, valid, p=p: torch.cat(  # noqa: E731
            [p.match(boxes, valid).split(sizes, dim=1)[i] for i in order], dim=1
        )
        levels = {n: [getattr(p, n)[i] for i in order] for n in ("logit_levels", "delta_levels")}
        heads.append(replace(p, anchors=anchors, match=match, **levels))
    other.loss.predictions = lambda *_: heads
    terms = case.step()
    for name, term in other.step().items():
        close(term, terms[name], name)
    for name, leaf in other.leaves().items():
        close(or_zero(leaf), or_zero(case.leaves()[name]), name)


# Few instances or none

EMPTY = {
    "no instances": {"gi_min_side": 1000.0},
    "no ground truth": {"objects": (0, 0), "gi_mode": "gt"},
    "no positives": {"objects": (0, 0), "gi_mode": "pos"},
    "no semi-positives": {"objects": (0, 0), "gi_mode": "semi_pos", "response_reg_mask": "gi_pos"},
    "an image without": {"objects": (0, 3), "gi_mode": "gt"},
    "one instance": {"objects": (0, 1), "gi_mode": "gt"},
    "two instances": {"objects": (1, 1), "gi_mode": "gt"},
    "three instances": {"objects": (2, 1), "gi_mode": "gt", "relation_scope": "image"},
    "one of each": {"gi_post_nms_topk": 1},
}
EXTRA = {
    "plain": {},
    "classes": CLASSES,
    "other": {
        **POINTS,
        "feature_mode": "norm",
        "response_reg_mode": "GIoU",
        "response_mask": "inside",
        "channels": (3, 5),
    },
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("empty", EMPTY)
def test_few_instances_or_none(empty, extra):
    case = Case(**{**EXTRA[extra], **EMPTY[empty]})
    count = int(case.instances().valid.sum())
    terms = case.compare()
    leaves = [*case.leaves().values(), *case.loss.parameters()]
    assert all(leaf.grad is not None for leaf in leaves)
    if empty.startswith("no "):
        assert count == 0 and all(term == 0 for term in terms.values())
        assert not any(leaf.grad.any() for leaf in leaves)
    else:
        assert count in (1, 2, 3) and terms["loss_gid_feature"] > 0
    if empty != "an image without":
        assert terms["loss_gid_relation"] == 0


# What is not asked for is not computed

COMPUTED = {weight: f"{weight.split('_')[-2]}_term" for weight in OFF}


@pytest.mark.parametrize("name", OFF)
def test_term_of_weight_zero_is_not_computed(name, monkeypatch):
    monkeypatch.setattr(loss_module, COMPUTED[name], refuse)
    terms = Case(**{name: 0.0}).compare()
    assert [TERMS[term] for term in terms] == [other for other in OFF if other != name]


@pytest.mark.parametrize("settings", [{}, {"gi_mode": "gt"}], ids=str)
@pytest.mark.parametrize("name", ["feature", "relation", "cls", "reg"])
def test_each_term_alone(name, settings):
    (term,) = Case(**only(name), **settings).compare()
    assert TERMS[term].split("_")[-2] == name


def test_no_features_no_adapter():
    """Levels are not read either, so they may be of any channels and strides."""
    case = Case(channels=(3, 5), adapter=True, **only("cls", "reg"))
    assert not list(case.loss.parameters()) and not case.loss.feature_pairs()
    views = case.views()
    for view in views:
        view.level = refuse
    assert len(case.loss(*views, case.batch())) == 2
    student, teacher = (
        heads_view(maps, view.role, view.predictions)
        for view, maps in zip(views, ({"p3": torch.zeros(2, 3, 4, 4)}, {"p5": torch.zeros(2, 3, 2, 2)}))
    )
    GID(**only("cls", "reg")).bind(student, teacher)


def test_ground_truth_without_responses_needs_no_heads():
    case = Case(gi_mode="gt", **only("feature", "relation"))
    views = case.views()
    for view in views:
        view.dense = view.box_head = view.sampled_proposals = view.require = refuse
    loss = GID(**case.settings)
    loss.bind(*views)
    assert loss(*views, case.batch()).keys() == {"loss_gid_feature", "loss_gid_relation"}


def test_features_alone_match_nothing():
    case = Case(**only("feature", "relation"))
    predictions = case.predictions
    case.predictions = lambda model: replace(predictions(model), match=refuse)
    assert len(case.forward()) == 2


def test_teachers_proposals_are_the_students():
    """HeadsView checks who is given any; the student's have been scored already."""
    case = Case(**PROPOSALS)
    student, teacher = case.views()
    given, proposals = [], object()
    student.sampled_proposals = lambda: proposals
    teacher.box_head = lambda boxes: given.append(boxes) or case.predictions(case.teacher)
    case.loss.predictions(student, teacher)
    assert given == [proposals]
