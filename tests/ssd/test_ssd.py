"""SSD itself: targets, training, inference, what it refuses."""

import naive_ssd as naive
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from ssd_case import NETWORKS, WIDTHS, batch, config, maps, ssd


def target_deltas(model, features, targets):
    anchors = model._anchors(features).expand_as(targets.boxes)
    flat = model.box2box_transform.get_deltas(anchors.reshape(-1, 4), targets.boxes.view(-1, 4))
    return flat.view_as(targets.boxes)


# Training


@pytest.mark.parametrize("network, size", [("A", 300), ("C", 400)])
def test_targets_by_loops(network, size):
    model, features = ssd(network, SIZE=size), maps(WIDTHS[network])
    gt = [x["instances"] for x in batch(3, 0, 1, size=size, seed=3)]
    targets = model.targets(features, gt)
    anchors = model._anchors(features).double().numpy()
    found = target_deltas(model, features, targets)
    assert found.isfinite().all()  # of background too
    for image, objects in enumerate(gt):
        if not len(objects):
            assert not targets.positive[image].any() and (targets.classes[image] == 20).all()
            continue
        boxes = objects.gt_boxes.tensor.double().numpy()
        overlaps = np.array([[naive.iou(box, anchor) for anchor in anchors] for box in boxes])
        for row, k in enumerate(naive.match(overlaps, 0.5)):
            assert targets.positive[image, row].item() == (k is not None)
            if k is None:
                assert targets.classes[image, row] == 20
                continue
            assert targets.classes[image, row] == objects.gt_classes[k]
            assert torch.equal(targets.boxes[image, row], objects.gt_boxes.tensor[k])
            expected = naive.encode(boxes[k], anchors[row])
            np.testing.assert_allclose(found[image, row], expected, rtol=1e-4, atol=1e-4)


def test_losses_by_loops():
    """From the outputs of the head; the keys of the config reach them."""
    model = ssd(NEGATIVES_PER_POSITIVE=1.0, IOU_THRESHOLD=0.35).train()
    inputs, seen = batch(2, 1), []
    model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    terms = model(inputs)
    ((scores, boxes),) = seen
    rows = [
        torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, length) for x in levels], dim=1)
        for levels, length in ((scores, 21), (boxes, 4))
    ]
    gt, features = [item["instances"] for item in inputs], maps(WIDTHS["C"])
    targets = model.targets(features, gt)
    expected = target_deltas(model, features, targets)
    classes, distances, _ = naive.multibox(
        *(x.tolist() for x in (*rows, targets.classes, expected)), background=20, ratio=1.0
    )
    assert terms["loss_cls"].item() == pytest.approx(classes, rel=1e-4)
    assert terms["loss_box_reg"].item() == pytest.approx(distances, rel=1e-4)
    assert targets.positive.sum() > ssd().targets(features, gt).positive.sum()


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_is_trained(network):
    model = ssd(network).train()
    for objects in ((2, 0), (0, 0)):
        model.zero_grad()
        terms = model(batch(*objects))
        sum(terms.values()).backward()
        assert all((term > 0) == any(objects) for term in terms.values())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_losses_are_computed_in_float32_under_autocast():
    model, inputs, seen = ssd().train(), batch(2, 1), []
    model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(inputs)
    assert seen[0][0][0].dtype == torch.bfloat16
    outputs = [[level.float() for level in levels] for levels in seen[0]]
    gt = [item["instances"] for item in inputs]
    expected = model.forward_training(None, maps(WIDTHS["C"]), outputs, gt)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name])


# Inference


@pytest.mark.parametrize("most", [5, 10**6])
@pytest.mark.parametrize(
    "keys", [{}, {"SCORE_THRESH_TEST": 0.5, "TOPK_CANDIDATES_TEST": 20, "NMS_THRESH_TEST": 0.2}]
)
def test_detections_by_loops(keys, most):
    cfg = config(WIDTH=0.25, **keys)
    cfg.TEST.DETECTIONS_PER_IMAGE = most
    model = build_model(cfg)
    anchors = model._anchors(maps(WIDTHS["C"]))
    random = np.random.default_rng(0)
    scores = torch.tensor(random.normal(0, 2, (3000, 21))).float().softmax(-1)[:, :4]
    deltas = torch.tensor(random.normal(0, 1, (3000, 4))).float()
    boxes = np.array([naive.decode(*pair) for pair in zip(deltas.tolist(), anchors.tolist())])
    node = cfg.MODEL.SSD
    expected = naive.detect(
        *(scores.double().numpy(), boxes, node.SCORE_THRESH_TEST, node.TOPK_CANDIDATES_TEST),
        *(node.NMS_THRESH_TEST, most),
    )
    found = model.detect(scores, deltas, anchors, (300, 300))
    assert found.image_size == (300, 300) and len(found) == len(expected) > 0
    classes, rows = (list(part) for part in zip(*expected))
    assert found.pred_classes.tolist() == classes
    torch.testing.assert_close(found.scores, scores[rows, classes])
    np.testing.assert_allclose(found.pred_boxes.tensor, boxes[rows], rtol=1e-4, atol=1e-2)


def test_detections_have_the_size_that_the_input_asks_for():
    model, inputs = ssd(SCORE_THRESH_TEST=0.0).eval(), batch(1, 1)
    inputs[1].update(height=600, width=150)
    with torch.no_grad():
        first, second = (output["instances"] for output in model(inputs))
        (alone,) = model(inputs[1:])
    for found, (height, width) in ((first, (300, 300)), (second, (600, 150))):
        assert found.image_size == (height, width) and 0 < len(found) <= 200
        assert (found.scores[:-1] >= found.scores[1:]).all() and found.pred_classes.max() < 20
        x1, y1, x2, y2 = found.pred_boxes.tensor.unbind(1)
        assert min(x1.min(), y1.min()) >= 0 and x2.max() <= width and y2.max() <= height
    torch.testing.assert_close(alone["instances"].scores, second.scores, rtol=1e-3, atol=1e-5)


def test_background_is_never_detected():
    model = ssd().eval()
    with torch.no_grad():
        for level in model.head.logits:
            last = level if isinstance(level, torch.nn.Conv2d) else level[-1]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0] * 20 + [50.0]).repeat(6))
        (output,) = model(batch(1))
    assert len(output["instances"]) == 0


def test_images_are_normalized():
    model = ssd("A").eval()
    images = [{"image": torch.full((3, 300, 300), 130.0)}]
    found = model.preprocess_image(images).tensor[0, :, 0, 0]
    assert found.tolist() == [7.0, 13.0, 26.0] and model.input_format == "RGB"
    assert ssd("C").preprocess_image(images).tensor.unique().tolist() == [3 / 128]


# What is refused


@pytest.mark.parametrize("shape", [(300, 400), (320, 320), (299, 300)])
def test_images_of_another_size(shape):
    model, inputs = ssd(), batch(1, 1)
    inputs[1].update(image=torch.zeros(3, *shape), file_name="odd.jpg")
    message = rf"300x300 pixels \(MODEL.SSD.SIZE\), 'odd.jpg' comes with \({shape[0]}, {shape[1]}\); "
    with pytest.raises(ValueError, match=message + r"set INPUT.FIXED_SIZE to \[300, 300\]"):
        model(inputs)


def test_strides_that_the_backbone_does_not_have():
    with pytest.raises(ValueError, match=r"STRIDES is \[16, 32, 64, 100, 128, 300\], .* \['s128'\];"):
        ssd(STRIDES=[16, 32, 64, 100, 128, 300])
