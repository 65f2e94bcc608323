"""From predictions to detections, and the detector's outputs in evaluation."""

import naive_fcos as naive
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from distill_d2.projects.fcos.inference import Selection
from fcos_case import CLASSES, fcos, fcos_config, without_objects

from distill_d2.testing.tiny import SHAPES, tiny_batch

SHAPES, STRIDES = [(6, 8), (3, 4), (2, 2)], (8, 16, 32)
GENERATOR = DefaultAnchorGenerator(
    sizes=[[8], [16], [32]], aspect_ratios=[1.0], strides=STRIDES, offset=0.5
)


def outputs(count=2, seed=0, top=0):
    g = torch.Generator().manual_seed(seed)
    parts = [[torch.randn(count, c, *shape, generator=g) for shape in SHAPES] for c in (CLASSES, 4, 1)]
    parts[1] = [level.abs() for level in parts[1]]
    if top:
        parts.append([torch.randn(count, top, *shape, generator=g) for shape in SHAPES])
    return parts


def anchors():
    return GENERATOR([torch.empty(1, 1, *shape) for shape in SHAPES])


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
    parts, sizes = outputs(), [(48, 64), (40, 50)]
    found = selection.detect(parts, anchors(), sizes)
    assert [each.image_size for each in found] == sizes
    for image, each in enumerate(found):
        expected = loops(parts, image, selection)
        assert len(each) == len(expected) >= 7
        scores, classes, levels, places, boxes = zip(*expected)
        np.testing.assert_allclose(each.scores, scores, rtol=1e-5)
        assert each.pred_classes.tolist() == list(classes) and each.fpn_levels.tolist() == list(levels)
        assert each.locations.tolist() == [list(place) for place in places]
        np.testing.assert_allclose(each.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-4)


def test_what_belongs_to_a_location_stays_with_it():
    parts = outputs(top=5)
    for image, each in enumerate(Selection(nms_threshold=0.3).detect(parts, anchors(), [(48, 64)] * 2)):
        assert each.top_feat.shape == (len(each), 5)
        for k in range(len(each)):
            level = each.fpn_levels[k]
            x, y = (each.locations[k] // STRIDES[level]).long().tolist()
            assert torch.equal(each.top_feat[k], parts[3][level][image, :, y, x])


def test_no_candidates():
    parts = outputs(top=2)
    (found,) = Selection(threshold=1.0).detect(list(parts), anchors(), [(48, 64)])
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4) and found.top_feat.shape == (0, 2)
    assert found.locations.shape == (0, 2) and found.pred_classes.dtype == torch.int64


def test_some_images_without_candidates():
    parts = outputs()
    for level in parts[0]:
        level[0] = -20.0
    first, second = Selection().detect(parts, anchors(), [(48, 64)] * 2)
    assert len(first) == 0 and len(second) > 0


# The detector


def test_a_batch_is_its_images_one_by_one():
    model = fcos().eval()
    inputs = tiny_batch(3, shapes=[(64, 80), *SHAPES])
    # Padded alike: zeros at the right and bottom are what the network sees.
    alone = [{**item, "image": padded(item["image"])} for item in inputs]
    with torch.no_grad():
        together = [output["instances"] for output in model(inputs)]
        separately = [model([item])[0]["instances"] for item in alone]
    for found, expected, item in zip(together, separately, inputs):
        assert found.image_size == (item["height"], item["width"]) and len(found) > 5
        assert len(expected) > 0
    first = together[0]
    assert torch.allclose(first.scores, separately[0].scores, atol=1e-5)
    assert torch.allclose(first.pred_boxes.tensor, separately[0].pred_boxes.tensor, atol=1e-3)


def padded(image):
    canvas = torch.zeros(3, 64, 80, dtype=image.dtype)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def test_outputs_have_the_size_that_is_asked_for():
    model, inputs = fcos().eval(), tiny_batch(2)
    inputs[1].update(height=128, width=224)
    with torch.no_grad():
        first, second = (output["instances"] for output in model(inputs))
        plain = model(tiny_batch(2))[1]["instances"]
    assert second.image_size == (128, 224)
    found = second.pred_boxes.tensor
    assert found.min() >= 0 and (found[:, 2] <= 224).all() and (found[:, 3] <= 128).all()
    scale = torch.tensor([4.0, 2.0, 4.0, 2.0])
    torch.testing.assert_close(found, plain.pred_boxes.tensor * scale, rtol=1e-4, atol=1e-2)
    assert second.pred_boxes.nonempty().all() and first.image_size == (48, 80)


def test_only_the_configs_selection():
    keys = {"INFERENCE_TH_TEST": 0.2, "NMS_TH": 0.3, "PRE_NMS_TOPK_TEST": 9, "POST_NMS_TOPK_TEST": 4}
    model = fcos(THRESH_WITH_CTR=True, **keys)
    assert model.proposal_generator.test_selection == Selection(0.2, True, 9, 0.3, 4)
    assert model.proposal_generator.train_selection is None


def test_no_detections():
    model = fcos(INFERENCE_TH_TEST=1.0).eval()
    with torch.no_grad():
        for output in model(tiny_batch(2)):
            assert len(output["instances"]) == 0


def test_no_annotations_are_needed():
    model = fcos().eval()
    images = [{"image": item["image"]} for item in tiny_batch(2)]
    with torch.no_grad():
        found = model(images)
        again = model(tiny_batch(2))
    assert torch.equal(found[1]["instances"].scores, again[1]["instances"].scores)
    with pytest.raises(ValueError, match="FCOS is trained without annotations: .* no 'instances'"):
        model.train()(images)


# Training


def test_a_step_trains_everything():
    model = fcos(NUM_CLS_CONVS=2, NUM_BOX_CONVS=3, NUM_SHARE_CONVS=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen = []
    for _ in range(5):
        losses = model(tiny_batch())
        assert list(losses) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        seen.append(total.item())
    assert seen[-1] < seen[0]


def test_images_without_objects():
    model = fcos().train()
    mixed = [tiny_batch()[0], *without_objects(tiny_batch()[1:])]
    for inputs in (mixed, without_objects(tiny_batch())):
        model.zero_grad()
        losses = model(inputs)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_fcos_loc"] == losses["loss_fcos_ctr"] == 0


def test_losses_are_float32_under_autocast():
    model = fcos().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(tiny_batch())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_what_the_config_yields_in_training():
    keys = {"POST_NMS_TOPK_TRAIN": 3, "INFERENCE_TH_TRAIN": 0.01}
    model = fcos(YIELD_PROPOSAL=True, YIELD_BOX_FEATURES=True, **keys).train()
    plain = build_model(fcos_config()).train()
    plain.load_state_dict(model.state_dict())
    batch = tiny_batch()
    seen = []
    for each in (model, plain):
        each.proposal_generator.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    losses, expected = model(batch), plain(batch)
    assert losses.keys() == expected.keys() and all(torch.equal(losses[k], expected[k]) for k in losses)
    (extras, _), (none, _) = seen
    assert [len(p) for p in extras["proposals"]] == [3, 3]
    assert not extras["proposals"][0].scores.requires_grad
    assert {k: tuple(v.shape) for k, v in extras["box_features"].items()} == {
        "p2": (2, 32, 16, 20), "p3": (2, 32, 8, 10), "p4": (2, 32, 4, 5),
    }  # fmt: skip
    assert not {"proposals", "box_features", "top"} & set(none)
