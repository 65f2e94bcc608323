"""The plain GID against arrays recorded from its authors' code, by hand, and against other libraries."""

import functools
import json
import math

import gid_fixture
import naive_gid as naive
import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.matcher import Matcher

NEW = {"student_narrow_feat": "student_feat"}  # by what they are called in a fixture without them
TERMS = ("feature", "relation", "cls_logits", "reg_deltas")
UNMATCHED = ("ref_stats_json", "margins_json", "cfg_json")  # counted otherwise, more of them


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# -- recorded


@functools.cache
def recorded_and_ours(path):
    """The arrays of a file with one scenario of all images, and what comes of its inputs here."""
    recorded = dict(np.load(path).items())
    images = range(len(recorded["image_sizes"]))
    return recorded, gid_fixture.outputs(recorded, {"out_": images}, narrow="student_feat")


@functools.cache
def fixture():
    return gid_fixture.make_fixture()


@pytest.fixture
def golden(shared):
    return recorded_and_ours(shared / "golden" / "gid.npz")


def test_everything_recorded_is_computed(golden):
    recorded, ours = golden
    assert ours.keys() - recorded.keys() == {"out_images"}
    prefixes = ("out_", "adapter_out_", "gi_")
    assert {name for name in recorded if name.startswith(prefixes)} <= ours.keys()
    for name in ours.keys() & recorded.keys() - set(UNMATCHED):
        assert ours[name].dtype == recorded[name].dtype, name
        assert ours[name].shape == recorded[name].shape, name


def test_recorded_decisions(golden):
    recorded, ours = golden
    integers = [name for name in ours if ours[name].dtype.kind in "iu" and name in recorded]
    assert {"out_gi_index", "out_gi_level", "out_response_mask", "gt_labels"} < set(integers)
    for name in integers:
        np.testing.assert_array_equal(ours[name], recorded[name], name)


def test_recorded_boxes_and_scores(golden):
    recorded, ours = golden
    for name in ("gi_box_all", "out_gi_boxes", "out_paper_gi_boxes"):
        np.testing.assert_allclose(ours[name], recorded[name], rtol=5e-7, atol=5e-5, err_msg=name)
    for name in ("gi_diff_all", "out_gi_scores", "out_paper_gi_score_all", "out_paper_gi_scores"):
        np.testing.assert_allclose(ours[name], recorded[name], rtol=0, atol=3e-7, err_msg=name)


def test_recorded_losses_and_gradients(golden):
    recorded, ours = golden
    names = [name for name in ours if "_loss_" in name or "_grad_" in name or "_mode_" in name]
    assert len(names) == 9 + 5 + 5 + 1 + 1 + 7 + 7 + 2 + 7 + 7
    for name in names:  # 1e-9: the gradient of a relation by the bias is only rounding
        close = 5e-6 * np.abs(recorded[name]).max() + 1e-9
        assert np.abs(ours[name] - recorded[name]).max() < close, name


def test_recorded_margins(golden):
    recorded, ours = (json.loads(str(arrays["margins_json"])) for arrays in golden)
    assert ours["margins"] == pytest.approx(recorded["margins"], abs=1e-6)
    for theirs, mine in zip(recorded["nms"], ours["nms"]):
        assert mine["nms_margin"] == pytest.approx(theirs["nms_margin"], abs=1e-6)
        assert mine["kept"] == theirs["kept"]


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_pooling_of_the_recorded_boxes(golden, model):
    recorded, _ = golden
    images, boxes = recorded["out_gi_image"].tolist(), list(map(list, recorded["out_gi_boxes"]))
    batch = [[b for i, b in zip(images, boxes) if i == image] for image in sorted(set(images))]
    maps = [torch.from_numpy(recorded[f"{model}_feat_p{level}"]) for level in gid_fixture.LEVELS]
    config = gid_fixture.config_of(recorded)
    pooled = naive.pool(maps, recorded["strides"].tolist(), batch, config["res"], config["sr"])
    expected = torch.from_numpy(recorded[f"out_pooled_{model}"])
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)


# -- the second fixture


def renamed(names):
    """What the fixture's arrays would be called in the recorded file."""
    for old, new in (("adapter_all_", "adapter_out_"), ("all_", "out_"), *NEW.items()):
        names = {new + name[len(old) :] if name.startswith(old) else name for name in names}
    return names


def test_fixture_has_the_recorded_layout(golden):
    recorded, _ = golden
    other = ("empty_", "two_", "empty_two_")
    names = {name for name in fixture() if not name.startswith(other)}
    assert renamed(names) == recorded.keys() | {"out_images"}
    for name in names:
        (old,) = renamed({name})
        if old == "out_images":
            continue
        assert fixture()[name].dtype.kind == recorded[old].dtype.kind, name
        assert fixture()[name].dtype.itemsize == recorded[old].dtype.itemsize or old in UNMATCHED, name
        assert fixture()[name].ndim == recorded[old].ndim, name


@pytest.mark.parametrize("prefix", gid_fixture.SCENARIOS)
def test_every_scenario_has_all_arrays(prefix):
    arrays = fixture()
    extra = ("mode_", "paper_")
    expected = {name[4:] for name in arrays if name.startswith("all_")}
    expected = {name for name in expected if not name.startswith(extra)}
    if prefix == "two_":
        expected = {name for name in expected if not name.startswith("grad_")}
    others = [other for other in gid_fixture.SCENARIOS if other != prefix and other.startswith(prefix)]
    names = [n for n in arrays if n.startswith(prefix) and not n.startswith(tuple(others) or "-")]
    names = {name[len(prefix) :] for name in names}
    assert {name for name in names if not name.startswith(extra)} == expected


def shapes(arrays, prefix):
    """Of one scenario."""
    images, rows, classes = len(arrays[prefix + "images"]), len(arrays["anchors"]), arrays["num_classes"]
    instances, side = int(arrays[prefix + "gi_count"].sum()), gid_fixture.config_of(arrays)["res"]
    pooled = (instances, arrays["teacher_feat_p3"].shape[1], side, side)
    of_instance = ("gi_scores", "gi_index", "gi_image", "gi_from_teacher", "gi_level")
    found = {
        **dict.fromkeys(of_instance, (instances,)),
        "images": (images,),
        "gi_count": (images,),
        "gi_boxes": (instances, 4),
        "response_mask": (images, rows),
        "pooled_teacher": pooled,
        "pooled_student": pooled,
        **{f"loss_{kind}_{term}": () for kind in ("raw", "weighted") for term in TERMS},
        "loss_raw_relation_f64": (),
        "grad_cls_logits__student_logits": (images, rows, classes),
        "grad_reg_deltas__student_deltas": (images, rows, 4),
        "grad_weighted_total__student_logits": (images, rows, classes),
        "grad_weighted_total__student_deltas": (images, rows, 4),
    }
    for level in gid_fixture.LEVELS:
        name = f"student_feat_p{level}"
        for term in ("feature", "relation", "weighted_total"):
            found[f"grad_{term}__{name}"] = (images, *arrays[name].shape[1:])
    return found


@pytest.mark.parametrize("prefix", gid_fixture.SCENARIOS)
def test_fixture_shapes(prefix):
    arrays = fixture()
    for name, shape in shapes(arrays, prefix).items():
        if prefix != "two_" or not name.startswith("grad_"):
            assert arrays[prefix + name].shape == shape, name


def test_recorded_shapes(golden):
    recorded, ours = golden
    whole = {**ours, **recorded}
    for name, shape in shapes(whole, "out_").items():
        assert whole["out_" + name].shape == shape, name


def test_fixture_adapter_is_of_the_narrow_maps():
    arrays = fixture()
    for level in gid_fixture.LEVELS:
        for term in ("feature", "relation"):
            gradient = arrays[f"adapter_all_grad_{term}__student_feat_p{level}"]
            assert gradient.shape == arrays[f"student_narrow_feat_p{level}"].shape
    assert arrays["adapter_all_pooled_student"].shape == arrays["all_pooled_teacher"].shape
    assert arrays["adapter_weight"].shape[:2] == (8, 6)


def test_fixture_scenarios():
    arrays = fixture()
    assert arrays["all_gi_count"].tolist() == [10, 0, 2]
    assert set(arrays["all_gi_level"]) == {3, 4} and set(arrays["all_gi_from_teacher"]) == {0, 1}
    assert set(arrays["gt_labels"][0]) >= {-1, 0, 1, 3, 5} and set(arrays["gt_labels"][1]) == {5}
    assert arrays["empty_two_gi_image"].tolist() == [1, 1]
    for term in TERMS:
        assert arrays[f"empty_loss_raw_{term}"] == 0
        assert arrays[f"empty_two_loss_raw_{term}"] == arrays[f"two_loss_raw_{term}"]
        assert arrays[f"all_loss_raw_{term}"] > 0
    zero = [n for n in arrays if n.startswith("empty_grad_")]
    assert zero and not any(arrays[name].any() for name in zero)


def test_rounding_changes_no_decision_of_the_fixture():
    margins = json.loads(str(fixture()["margins_json"]))
    assert margins["margins"]["anchor_iou_margin"] > 1e-5
    assert margins["margins"]["lowq_top2_gap_nonzero"] > 1e-4
    assert margins["margins"]["level_margin"] > 1e-2
    for image in margins["nms"]:
        assert image["size_margin"] > 1e-2
        if image["kept"]:
            decisions = (image[name] for name in ("nms_margin", "score_gap", "sub_sign_margin"))
            assert min(decisions) > 1e-3


# -- probabilities and scores


def test_scores_of_different_classes():
    teacher, student = [0.9, 0.2], [0.3, 0.8]
    assert naive.gi_score(teacher, student, "classwise") == pytest.approx(0.6)
    assert naive.gi_score(teacher, student, "max_first") == pytest.approx(0.1)
    with pytest.raises(ValueError, match="max_last"):
        naive.gi_score(teacher, student, "max_last")


def test_probabilities():
    logits = tensor([0, math.log(3)], [-1e4, 1e4])
    (a, b), extremes = naive.sigmoid_probabilities(logits)
    assert (a, b) == pytest.approx((0.5, 0.75)) and extremes == [0, 1]
    rows = naive.sigmoid_probabilities(logits, torch.tensor([-math.log(3), 0]).double())
    assert rows[0] == pytest.approx([0.125, 0.1875]) and rows[1] == [0, 0.5]


def test_softmax_leaves_the_background_out():
    (row,) = naive.softmax_probabilities(tensor([math.log(2), 0, math.log(5)]) + 800)
    assert row == pytest.approx([2 / 8, 1 / 8])
    assert naive.highest_class(row) == 0


# -- boxes


def random_boxes(count, size=100):
    corners, sides = torch.rand(2, count, 2, dtype=torch.float64) * size
    return torch.cat([corners, corners + 5 + sides / 2], dim=1)


def test_decoding_is_that_of_the_detectors():
    anchors, deltas = random_boxes(30), torch.randn(30, 4, dtype=torch.float64) * 4
    for weights in ((1, 1, 1, 1), (10, 10, 5, 5)):
        expected = Box2BoxTransform(weights).apply_deltas(deltas, anchors)
        decode = functools.partial(naive.decode_deltas, weights=weights)
        found = torch.tensor(np.array(naive.decode_rows(anchors, deltas, decode)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, check_dtype=False)
    expected = Box2BoxTransformLinear(normalize_by_size=True).apply_deltas(deltas, anchors)
    found = torch.tensor(np.array(naive.decode_rows(anchors, deltas, naive.decode_ltrb)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, check_dtype=False)


def test_scale_is_clamped():
    box = naive.decode_deltas([0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 9.0, 0.0])
    assert box == pytest.approx([-492, 0, 508, 16])


def test_iou():
    assert naive.iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
    assert naive.iou([0, 0, 2, 2], [2, 0, 4, 2]) == 0


def test_giou_of_disjoint_boxes():
    assert naive.giou([0, 0, 1, 1], [2, 0, 3, 1]) == pytest.approx(-1 / 3)
    assert naive.giou([0, 0, 2, 2], [0, 0, 2, 2]) == 1


def test_giou_is_torchvisions():
    a, b = random_boxes(9), random_boxes(7)
    found = torch.tensor([[naive.giou(x, y) for y in b] for x in a]).double()
    torch.testing.assert_close(found, torchvision.ops.generalized_box_iou(a, b), rtol=1e-6, atol=1e-6)


def test_deltas_of_classes():
    deltas = torch.arange(24.0).reshape(2, 12)
    expected = [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert naive.deltas_of_classes(deltas, [2, 0]).tolist() == expected
    assert naive.deltas_of_classes(deltas[:, :4], [2, 0]).tolist() == deltas[:, :4].tolist()


# -- selection

A, B, FAR = [0, 0, 20, 20], [0, 0, 20, 50], [100, 100, 140, 140]  # IoU of A and B is 0.4


def chosen(teacher, student, boxes, image_size=(200, 200), student_boxes=None, **options):
    teacher, student = ([[p] for p in rows] for rows in (teacher, student))
    (found,) = naive.select(
        [teacher], [student], [boxes], [student_boxes or boxes], [image_size], **options
    )
    return found


def rows(instances):
    return [instance.row for instance in instances]


def test_nms_of_three_boxes():
    found = chosen([0.5, 0.9, 0.3], [0, 0, 0], [A, B, FAR])
    assert rows(found) == [1, 2] and [instance.score for instance in found] == [0.9, 0.3]
    assert rows(chosen([0.5, 0.9, 0.3], [0, 0, 0], [A, B, FAR], nms_thresh=0.4)) == [1, 0, 2]


def test_top_k_before_and_after():
    assert rows(chosen([0.5, 0.9, 0.3], [0, 0, 0], [A, B, FAR], pre_nms_topk=2)) == [1]
    boxes = [[30 * i, 0, 30 * i + 20, 20] for i in range(12)]
    assert rows(chosen([0.5] * 12, [0] * 12, boxes, (20, 400))) == list(range(10))
    assert rows(chosen([0.5] * 12, [0] * 12, boxes, (20, 400), post_nms_topk=2)) == [0, 1]


def test_box_of_the_surer_model():
    found = chosen([0.5, 0.2], [0.4, 0.6], [A, A], student_boxes=[FAR, FAR])
    assert [(i.box, i.from_teacher) for i in found] == [(FAR, False), (A, True)]
    teacher, student = [[[0.5, 0.1]]], [[[0.1, 0.5]]]
    (found,) = naive.select(teacher, student, [[A]], [[FAR]], [(200, 200)])
    assert found == [naive.Instance(FAR, 0.4, 0, False)]  # equally sure


def test_boxes_are_clipped_before_they_are_measured():
    boxes = [[-20, -5, 90, 11], [0, 30, 60, 40], [20, 50, 30, 90], [0, 95, 60, 108]]
    found = chosen([0.5] * 4, [0] * 4, boxes, (99, 60))
    assert [instance.box for instance in found] == [[0, 0, 60, 11]]
    assert rows(chosen([0.5], [0], [[0, 0, 10.5, 10]], min_side=9.9)) == [0]


def test_agreement_is_no_instance():
    assert chosen([0.5, 0.5], [0.5, 0.5], [A, FAR]) == []
    (found,) = naive.select([[[0.9, 0.1]]], [[[0.1, 0.9]]], [[A]], [[A]], [(99, 99)], score="max_first")
    assert found == []


@pytest.mark.parametrize(
    "box, label, expected",
    [
        (FAR, 0, "pos"),
        (FAR, 3, "neg"),
        (FAR, -1, "neg"),
        ([0, 0, 20, 40], 3, "semi_pos"),  # a half of it is A
        ([0, 0, 20, 40], -1, "semi_pos"),
        ([0, 0, 20, 45], 3, "none"),
        ([0, 0, 20, 50], 3, "none"),
        ([0, 0, 20, 51], 3, "neg"),
        ([5, 5, 10, 10], 3, "semi_pos"),
    ],
)
def test_category(box, label, expected):
    assert naive.category(box, label, [FAR[:2] * 2, A], 3) == expected


def test_category_without_ground_truth():
    assert naive.category(A, 3, [], 3) == "neg"


# -- pooling


def test_roi_align_of_a_ramp_gives_coordinates():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    pooled = naive.roi_align(torch.stack([x, y]), [2.0, 1.0, 6.0, 5.0], 1.0, 4, 2)
    assert pooled[0, 0].tolist() == [2, 3, 4, 5] and pooled[1, :, 0].tolist() == [1, 2, 3, 4]
    pooled = naive.roi_align(torch.stack([x, y]), [4.0, 2.0, 12.0, 10.0], 0.5, 2, 2)
    assert pooled[0, 0].tolist() == [2.5, 4.5] and pooled[1, :, 0].tolist() == [1.5, 3.5]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
def test_roi_align_is_torchvisions(sampling_ratio):
    feature = torch.randn(3, 7, 9, dtype=torch.float64, requires_grad=True)
    edges = tensor([-30, -9, 20, 200], [0, 0, 72, 56], [68, 50, 99, 70])
    boxes = torch.cat([random_boxes(4, 60), edges])
    found = torch.stack([naive.roi_align(feature, b.tolist(), 1 / 8, 3, sampling_ratio) for b in boxes])
    options = (3, 1 / 8, sampling_ratio, True)
    expected = torchvision.ops.roi_align(feature[None], [boxes], *options)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((x * weights).sum(), feature) for x in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side, level", [(5, 3), (223, 3), (224, 4), (447, 4), (448, 5), (9999, 7)])
def test_level_of_a_box(side, level):
    assert naive.level_of([0, 0, side / 2, side * 2], [8, 16, 32, 64, 128]) == level


def test_pooling_keeps_image_and_level():
    maps = [torch.full((2, 1, 64, 64), 10.0), torch.full((2, 1, 32, 32), 20.0)]
    maps = [level + torch.arange(2.0).reshape(2, 1, 1, 1) for level in maps]
    boxes = [[[0, 0, 448, 448], [0, 0, 40, 40]], [[8, 8, 40, 40]]]
    assert naive.pool(maps, [8, 16], boxes, 1, 1).flatten().tolist() == [20, 10, 11]
    assert naive.pool(maps, [8, 16], [[], []], 5, 2).shape == (0, 1, 5, 5)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_adapter_keeps_the_size(kernel):
    weight = torch.zeros(4, 3, kernel, kernel)
    weight[1, 2, kernel // 2, kernel // 2] = 2
    maps = [torch.randn(2, 3, 6, 7), torch.randn(2, 3, 3, 4)]
    adapted = naive.adapt(maps, [weight, weight], [torch.ones(4), torch.zeros(4)])
    torch.testing.assert_close(adapted[0][:, 1], 2 * maps[0][:, 2] + 1)
    torch.testing.assert_close(adapted[1][:, 1], 2 * maps[1][:, 2])


# -- feature and relation loss


@pytest.mark.parametrize(
    "mode, beta, expected",
    [
        ("L2", 0.0, (9 + 16 + 1) / 4),
        ("L1", 0.0, (3 + 4 + 1) / 4),
        ("L1", 2.0, (2 + 3 + 0.25) / 4),
        ("norm", 0.0, (5 + 1) / 2),
    ],
)
def test_feature_modes(mode, beta, expected):
    teacher = torch.zeros(2, 3, 1, 2)
    teacher[0, 0, 0, 0], teacher[0, 2, 0, 1], teacher[1, 1, 0, 1] = 3, -4, 1
    loss = naive.feature_loss(teacher, torch.zeros_like(teacher), mode, beta)
    assert loss.item() == pytest.approx(expected)
    assert naive.feature_loss(teacher[:0], teacher[:0], mode, beta) == 0


CORNERS = torch.tensor([[0.0, 0], [3, 0], [0, 4]])  # distances 3, 4, 5
EVEN = torch.tensor([[0.0, 0], [2, 0], [1, 3**0.5]])


def test_relation_of_three_points():
    """3/4, 1 and 5/4 against 1: two differences of 1/4 in three pairs."""
    for student in (EVEN, 7 * EVEN + 1):
        loss = naive.relation_loss(CORNERS, student, [0, 0, 1])
        assert loss.item() == pytest.approx(2 / 3 * 0.25**2 / 2)
    assert naive.relation_loss(CORNERS, EVEN, [0, 0, 0], beta=0.0).item() == pytest.approx(1 / 6)
    assert naive.relation_loss(CORNERS, CORNERS * 2, [0, 0, 0]).item() == pytest.approx(0, abs=1e-9)


def test_relation_of_each_image():
    teacher = torch.cat([CORNERS, EVEN, CORNERS[:2]])
    student = torch.cat([EVEN, EVEN * 9, EVEN[:2]])
    images = [0, 0, 0, 2, 2, 2, 3, 3]
    loss = naive.relation_loss(teacher, student, images, scope="image")
    assert loss.item() == pytest.approx(2 / 3 * 0.25**2 / 2 / 2)
    assert naive.relation_loss(teacher, student, range(8), scope="image") == 0


def test_two_points_have_no_relation():
    assert naive.relation_loss(CORNERS[:2], EVEN[1:], [0, 0]) == 0


# -- masks


def test_matcher_is_detectron2s():
    anchors, boxes = random_boxes(200), random_boxes(4)
    quality = torchvision.ops.box_iou(boxes, anchors)
    for low_quality in (False, True):
        options = ([0.4, 0.5], [0, -1, 1], low_quality)
        expected = [x.tolist() for x in Matcher(*options)(quality)]
        found = naive.match(anchors.tolist(), boxes.tolist(), *options)
        assert [list(column) for column in zip(*found)] == expected


def test_thresholds_belong_to_the_better_label():
    boxes, anchors = [[0, 0, 10, 10]], [[0, 0, 10, 4], [0, 0, 10, 5], [0, 0, 10, 3.9], [0, 0, 10, 4.9]]
    labels = [label for _, label in naive.match(anchors, boxes, (0.4, 0.5), (0, -1, 1), False)]
    assert labels == [-1, 1, 0, -1]


def test_low_quality_ties_are_all_matched():
    anchors = [[0, 0, 10, 10], [10, 0, 20, 10], [10, 10, 20, 20], [50, 50, 60, 60]]
    boxes = [[5, 0, 15, 10], [0, 0, 10, 10]]
    assert naive.matcher_mask(anchors, boxes[:1]) == [True, True, False, False]
    assert naive.matcher_mask(anchors, boxes) == [True, True, False, False]
    assert naive.matcher_mask(anchors, boxes, allow_low_quality=False) == [True, False, False, False]
    assert naive.matcher_mask(anchors, []) == [False] * 4


def test_inside_mask():
    anchors = [[-10, -10, 30, 30], [0, 0, 40, 20], [0, 0, 38, 20], [90, 90, 130, 130], [-9, 0, 9, 20]]
    assert naive.inside_mask(anchors, [A, FAR]) == [True, False, True, True, False]  # edges are outside
    assert naive.inside_mask(anchors, []) == [False] * 5


# -- response loss

MASK = [[True, False], [False, True]]
TEACHER = tensor([[1, -2], [5, 5]], [[7, 7], [0, 3]])
STUDENT = tensor([[0, -1], [0, 0]], [[0, 0], [0, 1]])


@pytest.mark.parametrize(
    "mode, beta, expected",
    [("L1", 0.0, (1 + 1 + 2) / 2), ("L1", 2.0, (0.25 + 0.25 + 1) / 2), ("L2", 0.0, (1 + 1 + 4) / 2)],
)
def test_response_modes(mode, beta, expected):
    assert naive.response_loss(TEACHER, STUDENT, MASK, mode, beta).item() == pytest.approx(expected)


def test_response_bce_is_torchs():
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    pairs = ((TEACHER[0, 0], STUDENT[0, 0]), (TEACHER[1, 1], STUDENT[1, 1]))
    expected = sum(bce(s, t.sigmoid(), reduction="sum") for t, s in pairs) / 2
    torch.testing.assert_close(naive.response_loss(TEACHER, STUDENT, MASK, "BCE"), expected)


def test_response_cross_entropy_by_hand():
    teacher, student = (tensor([[math.log(3), 0]]) + shift for shift in (0, -900))
    loss = naive.response_loss(teacher[None], 2 * student[None], [[True]], "CE")
    assert loss.item() == pytest.approx(0.75 * math.log(10 / 9) + 0.25 * math.log(10))


def test_response_giou():
    anchors = [[[0, 0, 10, 10]] * 2] * 2
    teacher, student = torch.zeros(2, 2, 4).double(), torch.zeros(2, 2, 4).double()
    student[0, 0] = tensor(2, 0, 0, 0)  # 10 pixels between the boxes
    student.requires_grad_()
    loss = naive.response_giou_loss(teacher, student, MASK, anchors)
    assert loss.item() == pytest.approx((1 + 1 / 3 + 0) / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, 0, 0] > 0 and not gradient[0, 1].any()  # nearer is better


def test_nothing_masked_is_zero_with_a_gradient():
    student = STUDENT.clone().requires_grad_()
    nothing = [[False, False]] * 2
    loss = naive.response_loss(TEACHER, student, nothing, "BCE")
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()
