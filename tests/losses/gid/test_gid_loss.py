"""GID as a whole on random predictions: against the naive version, what does not matter, and what is not
computed."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from gid_case import (
    OFF,
    TERMS,
    Case,
    close,
    heads_view,
    naive_categories,
    only,
    or_zero,
    permuted_images,
    refuse,
)
from test_gid_response import as_on_a_gpu  # noqa: F401  a fixture

from distill_d2.losses.gid import GID
from distill_d2.losses.gid import loss as loss_module
from distill_d2.testing.synchronization import no_synchronization

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
    "default_weights": {name: vars(GID.Settings())[name] for name in OFF},
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


# Kinds of instances


def test_categories_are_the_naive_ones():
    seen = set()
    for seed, kind in enumerate(({}, POINTS, {**CLASSES, "proposals": (24, 15, 9)})):
        case = Case(seed=seed + 5, objects=(4, 0, 3), **kind)
        found = case.instances()
        kinds = case.loss.categories(found, case.predictions(case.student), case.batch())
        assert list(kinds) == ["pos", "semi_pos", "neg"]
        for image, instances in enumerate(case.naive_instances()):
            expected = naive_categories(instances, case.rows, image, case.truth[image], (0.4, 0.5))
            for name, mask in kinds.items():
                length = mask.shape[1] - len(expected)
                assert mask[image].tolist() == [e == name for e in expected] + [False] * length
            seen.update(expected)
    assert seen == {"pos", "semi_pos", "neg", "none"}


@pytest.mark.parametrize("thresholds", [(0.4, 0.5), (0.0, 1.0), (0.2, 0.2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_naive_modes(mode, thresholds):
    case = Case(seed=5, objects=(4, 3), gi_mode=mode, iou_thresholds=thresholds)
    case.compare()
    kept, every = case.instances(), Case(seed=5, objects=(4, 3)).instances()
    if mode in ("pos", "semi_pos", "neg"):  # of those selected, not others in their place
        assert torch.equal(kept.boxes, every.boxes) and not (kept.valid & ~every.valid).any()
        assert kept.valid.sum() < every.valid.sum()


@pytest.mark.parametrize("mode", ["gt", "semi_pos"])
def test_modes_in_any_case_of_letters(mode):
    for settings in ({}, {"objects": (0, 3)}):
        terms, others = (Case(gi_mode=name, **settings).step() for name in (mode, mode.title()))
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


def test_unlabelled_image_is_an_error():
    case = Case(gi_mode="gt")
    batch = case.batch()
    del batch.inputs[1]["instances"]
    with pytest.raises(KeyError, match="instances"):
        case.loss(*case.views(), batch)


def test_unlabelled_images_have_general_instances():
    """Nothing but kinds of instances, "gt" and "gi_pos" needs annotations."""
    case = Case()
    batch = case.batch()
    for item in batch.inputs:
        del item["instances"]
    assert case.loss(*case.views(), batch) == case.forward()


# What does not matter


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [{**POINTS, "gi_centerness": True}, {}], ids=["points", "anchors"])
def test_order_of_images_does_not_matter(mode, kind):
    case = Case(seed=5, objects=(4, 0, 3), gi_mode=mode, relation_scope="image", **kind)
    order = [2, 0, 1]
    other = permuted_images(case, order)
    terms = case.step()
    gradients = {name: or_zero(leaf) for name, leaf in case.leaves().items()}
    for name, term in other.step().items():
        close(term, terms[name], name)
    for name, leaf in other.leaves().items():
        close(or_zero(leaf), gradients[name][order], name)


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


def test_order_of_instances_does_not_matter():
    case = Case(objects=(5, 4), gi_mode="gt")
    terms = case.step()
    case.truth = [boxes.flip(0) for boxes in case.truth]
    for name, term in case.step().items():
        close(term, terms[name], name)


@pytest.mark.parametrize("score", ["classwise", "max_first"])
@pytest.mark.parametrize("kind", [POINTS, {}, CLASSES], ids=["points", "anchors", "classes"])
def test_student_equal_to_teacher_has_no_loss(kind, score):
    case = Case(gi_score=score, **kind)
    case.student = copy.deepcopy(case.teacher)
    for leaf in case.leaves().values():
        leaf.requires_grad_()
    assert all(term == 0 for term in case.step().values())
    assert not case.instances().valid.any()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in case.leaves().values())


def test_student_equal_to_teacher_on_ground_truth():
    """Where instances are given, but for the entropy of the teacher's classes."""
    case = Case(gi_mode="gt")
    case.student = copy.deepcopy(case.teacher)
    terms = case.forward()
    assert terms.pop("loss_gid_response_cls") > 0
    assert all(term == 0 for term in terms.values()) and len(terms) == 3


@pytest.mark.parametrize("count", [1, 3, 10])
def test_never_more_than_k_instances(count):
    for seed in range(3):
        case = Case(seed=seed, gi_post_nms_topk=count)
        pooled = case.loss.pooled(*case.views(), case.instances())
        assert case.instances().valid.shape == (2, count) == pooled[0].shape[:2]


def test_a_repeated_step_is_equal_and_leaves_its_inputs():
    case = Case(**{**POINTS, "gi_centerness": True})
    before = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
    teacher = copy.deepcopy(case.teacher)
    assert case.step() == case.step()
    assert all(torch.equal(leaf, before[name]) for name, leaf in case.leaves().items())
    for part in ("logits", "deltas", "centerness"):
        assert torch.equal(getattr(case.teacher, part), getattr(teacher, part))


# Nothing to distil

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
    terms = case.step()
    assert terms.keys() == TERMS.keys() and all(term.isfinite() for term in terms.values())
    leaves = [*case.leaves().values(), *case.loss.parameters()]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    if empty.startswith("no "):
        assert count == 0 and all(term == 0 for term in terms.values())
        assert not any(leaf.grad.any() for leaf in leaves)
    else:
        assert count in (1, 2, 3) and terms["loss_gid_feature"] > 0
    if empty != "an image without":
        assert terms["loss_gid_relation"] == 0
    case.compare()


def test_image_without_instances_gets_no_gradient():
    case = Case(objects=(3, 0), gi_mode="gt")
    case.step()
    assert case.student.maps["p3"].grad[0].any()
    assert all(not leaf.grad[1].any() for leaf in case.leaves().values())


# What is not asked for is not computed


COMPUTED = {
    "feature_weight": ("feature_term",),
    "relation_weight": ("relation_term",),
    "response_cls_weight": ("cls_term",),
    "response_reg_weight": ("reg_term",),
}


@pytest.mark.parametrize("name", OFF)
def test_term_of_weight_zero_is_not_computed(name, monkeypatch):
    (function,) = COMPUTED[name]
    monkeypatch.setattr(loss_module, function, refuse)
    terms = Case(**{name: 0.0}).compare()
    assert [TERMS[term] for term in terms] == [other for other in OFF if other != name]


@pytest.mark.parametrize("names", [("feature",), ("relation",), ("cls",), ("reg",)], ids=str)
def test_each_term_alone(names):
    for settings in ({}, {"gi_mode": "gt"}):
        (term,) = Case(**only(*names), **settings).compare()
        assert TERMS[term].split("_")[-2] == names[0]


def test_no_features_no_adapter(monkeypatch):
    """Levels are not read either, so they may be of any channels and strides."""
    monkeypatch.setattr(loss_module, "pool", refuse)
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


# Law 7


@pytest.mark.parametrize("mode", MODES)
def test_a_step_does_not_synchronise(as_on_a_gpu, mode):
    kinds = ({**POINTS, "gi_centerness": True}, {"channels": (3, 5), "relation_scope": "image"}, CLASSES)
    for kind in kinds:
        for settings in ({}, {"response_mask": "inside", "response_reg_mask": "gi_pos"}):
            case = Case(gi_mode=mode, **kind, **settings)
            views, batch = case.views(), case.batch()
            expected = case.forward()
            with as_on_a_gpu(), no_synchronization():
                terms = case.loss(*views, batch)
            for name, term in terms.items():
                close(term, expected[name], name)


@pytest.mark.parametrize("mode", ["L2", "L1", "BCE", "GIoU"])
def test_no_mode_synchronises(as_on_a_gpu, mode):
    feature = mode if mode in ("L1", "L2") else "norm"
    modes = {"response_reg_mode": mode, "feature_mode": feature}
    case = Case(response_cls_mode="BCE" if mode == "GIoU" else mode, **modes)
    views, batch = case.views(), case.batch()
    with as_on_a_gpu(), no_synchronization():
        case.loss(*views, batch)
