"""From outputs to instances, and what evaluators make of them."""

import dataclasses
import json

import naive_solov2 as naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BitMasks
from distill_d2.projects.solov2 import InstanceSelection, chunks, inference
from distill_d2.projects.solov2.inference import boxes_of
from distill_d2.projects.solov2.nms import mask_ious, mask_nms, matrix_nms
from solov2_case import CELLS, GRIDS, batch, solov2

SIZES = ((48, 64), (44, 50), (66, 75))
STANDARD = dataclasses.asdict(InstanceSelection())


def outputs(seed=0, cells=60, classes=3, size=(12, 16)):
    """Scores, kernels, least areas and features of an image; blobs that overlap much."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    centers = random.uniform(0, 1, (6, 2)) * size
    features = [2 - np.hypot(y - cy, x - cx) / random.uniform(1, 2) for cy, cx in centers]
    kernels = np.eye(6)[random.integers(0, 6, cells)] + random.normal(0, 0.15, (cells, 6))
    scores = random.uniform(0, 1, (cells, classes)) ** 3
    return scores, kernels, random.choice([4, 16, 40], cells), np.array(features)


def tensors(arrays):
    scores, kernels, smallest, features = (torch.tensor(x) for x in arrays)
    return scores.float(), kernels.float(), smallest, features.float()


def full_size(soft, threshold=0.5, sizes=SIZES):
    """As in the paper: to the padded image's size, cropped, to the output's."""
    padded, (height, width), output = sizes
    whole = torch.tensor(soft)[None, None]
    whole = F.interpolate(whole, size=padded, mode="bilinear", align_corners=False)
    whole = whole[:, :, :height, :width]
    return F.interpolate(whole, size=output, mode="bilinear", align_corners=False)[0, 0] > threshold


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nms_kernel": "linear"},
        {"nms_type": "mask"},
        {"nms_sigma": 0.5, "update_threshold": 0.3},
        {"score_threshold": 0.4, "mask_threshold": 0.7},
        {"pre_nms": 20, "max_instances": 5},
        {"nms_type": "mask", "mask_threshold": 0.3, "max_instances": 7},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_by_loops(seed, settings):
    arrays = outputs(seed)
    expected = naive.detect(*arrays, {**STANDARD, **settings})
    found = InstanceSelection(**settings)(*tensors(arrays), SIZES)
    assert len(found) == len(expected) > 3 and found.image_size == (66, 75)
    scores, classes, masks = zip(*expected)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    assert found.pred_classes.tolist() == list(classes)
    threshold = settings.get("mask_threshold", 0.5)
    for mask, soft in zip(found.pred_masks, masks):
        assert (mask ^ full_size(soft, threshold)).sum() <= 1


def test_a_part_of_the_masks_at_a_time(monkeypatch):
    arrays = tensors(outputs(2))
    whole = InstanceSelection()(*arrays, SIZES)
    for at_once in (3 * 66 * 75, 1):
        monkeypatch.setattr(chunks, "_PIXELS_AT_ONCE", at_once)
        parts = InstanceSelection()(*arrays, SIZES)
        assert len(parts) == len(whole) > 10
        torch.testing.assert_close(parts.scores, whole.scores)
        assert torch.equal(parts.pred_masks, whole.pred_masks)


def test_memory_does_not_grow_with_the_candidates(monkeypatch):
    """Masks of all are made a part at a time; at once there are those before and after suppression."""
    made = []

    def spy(kernels, feature):
        made.append(len(kernels))
        return real(kernels, feature)

    real = inference.predict_masks
    monkeypatch.setattr(inference, "predict_masks", spy)
    monkeypatch.setattr(chunks, "_PIXELS_AT_ONCE", 10 * 12 * 16)
    InstanceSelection(pre_nms=15)(*tensors(outputs(0, cells=200)), SIZES)
    assert max(made[:-1]) == 10 and sum(made[:-1]) > 100 and made[-1] == 15


def a_square(shape=(32, 32)):
    """Outputs with one cell whose mask are rows 2 to 5 and columns 3 to 8 of the features."""
    features = torch.full((1, *shape), -20.0)
    features[0, 2:6, 3:9] = 20.0
    scores, kernels = torch.zeros(CELLS, 3), torch.ones(CELLS, 1)
    scores[7, 2] = 0.9
    return scores, kernels, torch.full((CELLS,), 8), features


@pytest.mark.parametrize("image", [(128, 128), (33, 47)])
def test_size_by_hand(image):
    """A small image in a large batch is not scaled by more than the stride of the features."""
    found = InstanceSelection()(*a_square(), ((128, 128), image, image))
    expected = torch.zeros(1, *image, dtype=torch.bool)
    expected[0, 8:24, 12:36] = True
    expected[0, [8, 8, 23, 23], [12, 35, 12, 35]] = False  # corners are rounded
    assert torch.equal(found.pred_masks, expected)
    assert found.pred_classes.tolist() == [2] and found.scores.item() == pytest.approx(0.9)
    large = InstanceSelection()(*a_square(), ((128, 128), image, (2 * image[0], 3 * image[1])))
    assert large.pred_boxes.tensor.tolist() == [[36.0, 16.0, 108.0, 48.0]]


def test_area_must_exceed_the_least():
    scores, kernels, smallest, features = a_square()
    for least, count in ((23, 1), (24, 0)):
        found = InstanceSelection()(scores, kernels, smallest * 0 + least, features, SIZES)
        assert len(found) == count


@pytest.mark.parametrize("nms_type", ["matrix", "mask"])
def test_nothing_found(nms_type):
    scores, *others = tensors(outputs())
    first = InstanceSelection(nms_type=nms_type)(scores * 0, *others, SIZES)
    later = InstanceSelection(update_threshold=2.0)(scores, *others, SIZES)  # after suppression
    for found in (first, later):
        assert len(found) == 0 and found.image_size == (66, 75)
        assert found.scores.dtype == torch.float32 and found.pred_classes.dtype == torch.int64
        assert found.pred_masks.dtype == torch.bool and found.pred_masks.shape == (0, 66, 75)
        assert found.pred_boxes.tensor.shape == (0, 4)
        assert instances_to_coco_json(found, 1) == []


def test_boxes_are_those_of_bit_masks():
    masks = torch.rand(40, 9, 11) < torch.linspace(0, 0.3, 40)[:, None, None]
    masks[0] = False
    masks[1], masks[2] = True, False
    masks[2, 8, 10] = True
    assert torch.equal(boxes_of(masks).tensor, BitMasks(masks).get_bounding_boxes().tensor)


# Non-maximum suppression at its limits


@pytest.mark.parametrize("kernel, factor", [("gaussian", np.exp(-2)), ("linear", 0.0)])
def test_equal_masks(kernel, factor):
    """Finite; what has decayed to 0 makes nothing else decay."""
    masks = torch.eye(4, 9, dtype=torch.bool).view(4, 3, 3)
    masks[1:3] = masks[0]  # three are equal, the last one overlaps them
    masks[3, 0, 0] = True
    one_class = torch.zeros(4, dtype=torch.int64)
    factors = matrix_nms(mask_ious(masks, one_class), kernel)
    last = {"gaussian": np.exp(-2 * 0.25), "linear": 0.5}[kernel]
    assert factors.tolist() == pytest.approx([1.0, factor, factor, last], abs=1e-6)


def test_mask_nms_of_a_chain():
    """Each overlaps the next: every other one stays."""
    ious = torch.diag(torch.full((8,), 0.8), diagonal=1)
    assert mask_nms(ious, 0.5).tolist() == [index % 2 == 0 for index in range(9)]
    assert mask_nms(ious, 0.8).all()  # the threshold itself is no overlap


def test_nothing_to_suppress():
    ious = mask_ious(torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
    assert ious.shape == (0, 0)
    assert matrix_nms(ious).shape == matrix_nms(ious, "linear").shape == (0,)
    assert mask_nms(ious, 0.5).shape == (0,) and mask_nms(ious, 0.5).dtype == torch.bool
    one = mask_ious(torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    assert matrix_nms(one).item() == 1.0 and mask_nms(one, 0.5).item()


# The whole detector


@torch.no_grad()
def detect(model, inputs):
    return [output["instances"] for output in model.eval()(inputs)]


def images(*shapes):
    return [{"image": torch.randint(0, 256, (3, *shape), dtype=torch.uint8)} for shape in shapes]


def test_images_of_different_sizes():
    inputs = images((128, 96), (60, 120), (96, 128))
    inputs[1].update(height=30, width=60)
    inputs[2].update(height=200, width=333)
    found = detect(solov2(), inputs)
    for each, size in zip(found, ((128, 96), (30, 60), (200, 333))):
        assert each.image_size == size and 0 < len(each) <= 100
        assert each.pred_masks.shape == (len(each), *size) and each.pred_masks.dtype == torch.bool
        assert (each.scores[:-1] >= each.scores[1:]).all() and each.pred_classes.max() < 3
        expected = BitMasks(each.pred_masks).get_bounding_boxes().tensor
        assert torch.equal(each.pred_boxes.tensor, expected) and expected.any()


def test_scores_follow_from_the_head():
    """Point NMS per class and level, cells, kernels and least areas in one order, level by level."""
    strides = [128, 8, 16, 140, 32]
    model, inputs = solov2(seed=1, FPN_INSTANCE_STRIDES=strides), images((64, 64))
    seen = []
    model.ins_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model.mask_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    (found,) = detect(model, inputs)
    (logits, kernels), features = seen
    rows, weights, smallest = [], [], []
    for level, (grid, stride) in enumerate(zip(GRIDS, strides)):
        # Neighbors may differ by rounding alone, which float32's sigmoid decides.
        scores = np.stack([naive.point_nms(x.sigmoid().double().numpy()) for x in logits[level][0]])
        for row in range(grid):
            for column in range(grid):
                rows.append(scores[:, row, column])
                weights.append(kernels[level][0, :, row, column].double().numpy())
                smallest.append(stride)
    arrays = (rows, weights, smallest, features[0].double().numpy())
    expected = naive.detect(*arrays, STANDARD)
    assert len(found) == len(expected) > 20
    others = naive.detect(rows, weights, [4] * len(rows), arrays[-1], STANDARD)
    assert [score for score, *_ in others] != [score for score, *_ in expected]
    np.testing.assert_allclose(found.scores, [score for score, _, _ in expected], rtol=1e-3)
    assert found.pred_classes.tolist() == [k for _, k, _ in expected]


def test_features_of_another_stride():
    """The mask branch may begin at p3; masks are as large as the image all the same."""
    model = solov2(MASK_IN_FEATURES=["p3", "p4", "p5"])
    assert model.mask_stride == 8
    seen = []
    model.selection = lambda *arguments: seen.append(arguments)
    model.eval()(images((50, 96)))
    *_, features, sizes = seen[0]
    assert features.shape[-2:] == (8, 12) and sizes == ((64, 96), (50, 96), (50, 96))
    assert all(loss.isfinite() for loss in model.train()(batch(4, 2)).values())


def test_keys_of_the_config_reach_it():
    model = solov2(NMS_PRE=30, MAX_PER_IMG=4, SCORE_THR=0.2, NMS_TYPE="mask", MASK_THR=0.6)
    changed = {"pre_nms": 30, "max_instances": 4, "score_threshold": 0.2}
    changed.update(nms_type="mask", mask_threshold=0.6)
    assert dataclasses.asdict(model.selection) == {**STANDARD, **changed}
    other = solov2(NMS_KERNEL="linear", NMS_SIGMA=3, UPDATE_THR=0.1).selection
    assert (other.nms_kernel, other.nms_sigma, other.update_threshold) == ("linear", 3, 0.1)


def test_what_coco_evaluation_reads():
    """Under autocast, too, scores are float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = detect(solov2(), images((64, 96)))
    assert found.scores.dtype == torch.float32 and found.scores.isfinite().all()
    rows = instances_to_coco_json(found, 5)
    assert len(rows) == len(found) > 0
    row = json.loads(json.dumps(rows[0]))
    assert row["image_id"] == 5 and row["score"] == pytest.approx(found.scores[0].item())
    assert row["segmentation"]["size"] == [64, 96]
    x1, y1, x2, y2 = found.pred_boxes.tensor[0].tolist()
    assert row["bbox"] == [x1, y1, x2 - x1, y2 - y1]
