"""From predictions to detections, and what the detector returns."""

import naive_fcos as naive
import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from distill_d2.projects.fcos.inference import Selection
from fcos_case import fcos

from distill_d2.testing import CLASSES, tiny_batch

SHAPES, STRIDES, SIZES = [(6, 8), (3, 4), (2, 2)], (8, 16, 32), [(48, 64), (40, 50)]
ANCHORS = DefaultAnchorGenerator(
    sizes=[[8], [16], [32]], aspect_ratios=[1.0], strides=STRIDES, offset=0.5
)([torch.empty(1, 1, *shape) for shape in SHAPES])


def outputs(seed=0, top=0):
    """Of the head, for two images; ``top`` are the channels of a fourth output."""
    g = torch.Generator().manual_seed(seed)
    channels = [CLASSES, 4, 1] + [top] * bool(top)
    parts = [[torch.randn(2, c, *shape, generator=g) for shape in SHAPES] for c in channels]
    parts[1] = [level.abs() for level in parts[1]]
    return parts


def loops(parts, image, selection):
    def rows(level):
        return level[image].flatten(1).t().double().tolist()

    levels = [
        (
            *(rows(logits), rows(ltrb), [q for (q,) in rows(quality)]),
            *(naive.locations(*shape, stride), stride),
        )
        for logits, ltrb, quality, shape, stride in zip(*parts[:3], SHAPES, STRIDES)
    ]
    return naive.detect(
        levels,
        threshold=selection.threshold,
        with_quality=selection.with_quality,
        before=selection.pre_nms_topk,
        nms=selection.nms_threshold,
        after=selection.post_nms_topk,
    )


@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection(with_quality=True, threshold=0.3),
        Selection(threshold=0.3, pre_nms_topk=10, nms_threshold=0.3),
        Selection(post_nms_topk=7),
    ],
)
def test_by_loops(selection):
    """And what belongs to a location stays with it."""
    parts = outputs(top=5)
    found = selection.detect(parts, ANCHORS, SIZES)
    assert [each.image_size for each in found] == SIZES
    for image, each in enumerate(found):
        expected = loops(parts, image, selection)
        assert len(each) == len(expected) >= 7
        scores, classes, levels, places, boxes = zip(*expected)
        np.testing.assert_allclose(each.scores, scores, rtol=1e-5)
        assert each.pred_classes.tolist() == list(classes) and each.fpn_levels.tolist() == list(levels)
        assert each.locations.tolist() == [list(place) for place in places]
        np.testing.assert_allclose(each.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-4)
        for top, level, (x, y) in zip(each.top_feat, levels, places):
            column, row = int(x // STRIDES[level]), int(y // STRIDES[level])
            assert torch.equal(top, parts[3][level][image, :, row, column])


def test_an_image_without_candidates():
    parts = outputs(top=2)
    for level in parts[0]:
        level[0] = -20.0
    first, second = Selection().detect(parts, ANCHORS, SIZES)
    assert len(first) == 0 and len(second) > 0
    assert first.pred_boxes.tensor.shape == (0, 4) and first.top_feat.shape == (0, 2)
    assert first.locations.shape == (0, 2) and first.pred_classes.dtype == torch.int64


# The detector


def test_detections_have_the_size_that_the_input_asks_for():
    model, inputs = fcos().eval(), tiny_batch(2)
    inputs[1].update(height=128, width=224)
    with torch.no_grad():
        first, second = (output["instances"] for output in model(inputs))
        plain = model(tiny_batch(2))[1]["instances"]
    assert second.image_size == (128, 224) and first.image_size == (48, 80)
    found = second.pred_boxes.tensor
    assert found.min() >= 0 and (found[:, 2] <= 224).all() and (found[:, 3] <= 128).all()
    scale = torch.tensor([4.0, 2.0, 4.0, 2.0])
    torch.testing.assert_close(found, plain.pred_boxes.tensor * scale, rtol=1e-4, atol=1e-2)
    assert second.pred_boxes.nonempty().all()


def test_selection_of_the_config():
    keys = {"INFERENCE_TH_TEST": 0.2, "NMS_TH": 0.3, "PRE_NMS_TOPK_TEST": 9, "POST_NMS_TOPK_TEST": 4}
    model = fcos(THRESH_WITH_CTR=True, **keys)
    assert model.proposal_generator.test_selection == Selection(0.2, True, 9, 0.3, 4)
    assert model.proposal_generator.train_selection is None


def test_annotations_are_needed_in_training_only():
    model = fcos().eval()
    images = [{"image": item["image"]} for item in tiny_batch(2)]
    with torch.no_grad():
        assert len(model(images)) == 2
    with pytest.raises(ValueError, match="FCOS is trained without annotations: .* no 'instances'"):
        model.train()(images)


def test_what_the_config_yields_in_training():
    keys = {"POST_NMS_TOPK_TRAIN": 3, "INFERENCE_TH_TRAIN": 0.01}
    model = fcos(YIELD_PROPOSAL=True, YIELD_BOX_FEATURES=True, **keys).train()
    plain = fcos().train()
    plain.load_state_dict(model.state_dict())
    seen = []
    for each in (model, plain):
        each.proposal_generator.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    losses, expected = model(tiny_batch()), plain(tiny_batch())
    assert losses.keys() == expected.keys() and all(torch.equal(losses[k], expected[k]) for k in losses)
    (extras, _), (none, _) = seen
    assert [len(p) for p in extras["proposals"]] == [3, 3]
    assert not extras["proposals"][0].scores.requires_grad
    shapes = {name: tuple(level.shape) for name, level in extras["box_features"].items()}
    assert shapes == {"p2": (2, 32, 16, 20), "p3": (2, 32, 8, 10), "p4": (2, 32, 4, 5)}
    assert extras.keys() - none.keys() == {"proposals", "box_features"} and "top" not in none
