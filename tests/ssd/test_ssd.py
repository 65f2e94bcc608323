"""SSD itself: recorded numbers, targets, training, inference, what it refuses."""

import naive_ssd as naive
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from distill_d2.projects.ssd.multibox import multibox_losses
from ssd_case import NETWORKS, WIDTHS, batch, config, golden, instances, levels, maps, ssd

from distill_d2.views.matching import hard_negatives

# Recorded


@pytest.fixture
def recorded(shared):
    return golden(shared)


def numbers(recorded, name):
    """Of a "..._q64" array, a leaf."""
    return (torch.tensor(recorded[name]).float() / 64).requires_grad_()


def background_last(logits):
    return logits.roll(-1, dims=-1)


def recorded_objects(recorded):
    found = []
    for name in ("gt_0", "gt_1"):
        objects = torch.tensor(recorded[name], dtype=torch.float32)
        found.append(instances((objects[:, :4] * 300).tolist(), objects[:, 4].long().tolist()))
    return found


def wanted_deltas(model, features, targets):
    anchors = model._anchors(features).expand_as(targets.boxes)
    flat = model.box2box_transform.get_deltas(anchors.reshape(-1, 4), targets.boxes.view(-1, 4))
    return flat.view_as(targets.boxes)


@pytest.mark.parametrize("network, key", [("A", "ssd300"), ("B", "kd"), ("C", "kd")])
def test_recorded_targets(recorded, network, key):
    model, features = ssd(network), maps(WIDTHS[network])
    targets = model.targets(features, recorded_objects(recorded))
    labels = torch.where(targets.positive, targets.classes + 1, 0)
    assert torch.equal(labels, torch.tensor(recorded[f"match_{key}_conf_t"]).long())
    image, prior = torch.tensor(recorded[f"match_{key}_pos_index"]).long().unbind(1)
    found = wanted_deltas(model, features, targets)[image, prior]
    expected = torch.tensor(recorded[f"match_{key}_pos_loc_t"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_recorded_losses(recorded):
    model, features = ssd(), maps(WIDTHS["C"])
    targets = model.targets(features, recorded_objects(recorded))
    scores, deltas = numbers(recorded, "conf_student_q64"), numbers(recorded, "loc_student_q64")
    logits = background_last(scores)
    losses = torch.nn.functional.cross_entropy(logits.mT, targets.classes, reduction="none")
    mask = np.unpackbits(recorded["hard_negative_mask"], axis=1)[:, :3000]
    found = hard_negatives(losses, targets.positive, 3.0)
    assert np.array_equal(found, mask) and found.sum(1).tolist() == [60, 72]
    wanted = wanted_deltas(model, features, targets)
    terms = multibox_losses(logits, deltas, targets, wanted, 3.0)
    assert terms["loss_cls"].item() == pytest.approx(1168.2009 / 44, rel=1e-5)
    assert terms["loss_box_reg"].item() == pytest.approx(205.03914 / 44, rel=1e-5)
    sum(terms.values()).backward()
    assert sum(terms.values()).item() == pytest.approx(float(recorded["hard_loss"]), rel=1e-5)
    for name, leaf in (("loc", deltas), ("conf", scores)):
        image, prior = torch.tensor(recorded[f"hard_grad_{name}_index"]).long().unbind(1)
        expected = torch.tensor(recorded[f"hard_grad_{name}_values"])
        torch.testing.assert_close(leaf.grad[image, prior], expected, rtol=1e-4, atol=1e-6)
    assert deltas.grad.norm().item() == pytest.approx(0.26497222, rel=1e-5)
    assert scores.grad.norm().item() == pytest.approx(0.32533439, rel=1e-5)


def test_recorded_detections(recorded):
    cfg = config(WIDTH=0.25)
    cfg.TEST.DETECTIONS_PER_IMAGE = 10**6
    model = build_model(cfg)
    anchors = model._anchors(maps(WIDTHS["C"]))
    deltas = numbers(recorded, "loc_student_q64").detach()[0]
    boxes = model.box2box_transform.apply_deltas(deltas, anchors) / 300
    np.testing.assert_allclose(boxes[:100], recorded["decode_img0_first100"], rtol=0, atol=1e-5)
    scores = (2 * numbers(recorded, "conf_student_q64").detach()[0]).softmax(-1)
    found = model.detect(scores[:, 1:], deltas, anchors, (300, 300))
    counts = torch.bincount(found.pred_classes, minlength=20)
    assert counts.tolist() == recorded["detect_counts"][1:].tolist() and counts.sum() > 200
    for k in range(20):
        ours = found[found.pred_classes == k][:20]
        rows = torch.cat([ours.scores[:, None], ours.pred_boxes.tensor / 300], dim=1)
        expected = recorded["detect_top20"][k + 1, : len(rows)]
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


# Targets


@pytest.mark.parametrize("network", ["A", "C"])
def test_targets_by_loops(network):
    model, features = ssd(network), maps(WIDTHS[network])
    gt = [x["instances"] for x in batch(3, 0, 1, seed=3)]
    targets = model.targets(features, gt)
    anchors = model._anchors(features).double().numpy()
    wanted = wanted_deltas(model, features, targets)
    assert wanted.isfinite().all()  # of background too
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
            np.testing.assert_allclose(wanted[image, row], expected, rtol=1e-4, atol=1e-4)


def test_an_object_that_is_a_prior_box():
    model, features = ssd(), maps(WIDTHS["C"])
    row = 2100  # not at the border
    box = model._anchors(features)[row].tolist()
    targets = model.targets(features, [instances([box], [7])])
    assert targets.classes[0, row] == 7 and targets.positive[0, row]
    wanted = wanted_deltas(model, features, targets)
    torch.testing.assert_close(wanted[0, row], torch.zeros(4), rtol=0, atol=1e-5)
    assert wanted.isfinite().all()


def test_every_object_is_some_prior_box():
    """The smallest too, and one that none of them overlaps much."""
    model, features = ssd(), maps(WIDTHS["C"])
    boxes = [[3, 3, 5, 4], [0, 148, 300, 152], [100, 100, 200, 200], [296, 0, 300, 300]]
    targets = model.targets(features, [instances(boxes, [0, 1, 2, 3])])
    assert set(targets.classes[0].tolist()) == {0, 1, 2, 3, 20}


# Training


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(network):
    torch.manual_seed(1)
    model, inputs = ssd(network).train(), batch(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(4):
        terms = model(inputs)
        assert list(terms) == ["loss_cls", "loss_box_reg"]
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        if not seen:
            without = [name for name, p in model.named_parameters() if p.grad is None]
            assert without == []
            assert all(p.grad.isfinite().all() for p in model.parameters())
        seen.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    assert np.isfinite(seen).all() and seen[-1] < seen[0]


@pytest.mark.parametrize("network", ["A", "C"])
def test_order_of_images_does_not_matter(network):
    model, inputs = ssd(network).train(), batch(2, 0, 4)
    first, again = model(inputs), model([inputs[2], inputs[0], inputs[1]])
    for name in first:
        torch.testing.assert_close(first[name], again[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_objects(network):
    model = ssd(network).train()
    terms = model(batch(0, 0))
    assert [term.item() for term in terms.values()] == [0.0, 0.0]
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_losses_follow_from_the_parts():
    """Of what the head computes; and the keys of the config reach them."""
    model = ssd(NEGATIVES_PER_POSITIVE=1.0, IOU_THRESHOLD=0.35).train()
    inputs, seen = batch(2, 1), []
    model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    terms = model(inputs)
    ((scores, boxes),) = seen
    rows = [
        torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1, length) for x in maps], dim=1)
        for maps, length in ((scores, 21), (boxes, 4))
    ]
    gt = [item["instances"] for item in inputs]
    targets = model.targets(maps(WIDTHS["C"]), gt)
    wanted = wanted_deltas(model, maps(WIDTHS["C"]), targets)
    classes, distances, _ = naive.multibox(
        *(x.tolist() for x in (*rows, targets.classes, wanted)), background=20, ratio=1.0
    )
    assert terms["loss_cls"].item() == pytest.approx(classes, rel=1e-4)
    assert terms["loss_box_reg"].item() == pytest.approx(distances, rel=1e-4)
    strict = ssd().targets(maps(WIDTHS["C"]), gt)
    assert targets.positive.sum() > strict.positive.sum()


# Inference


def predictions(model, seed=0):
    random = np.random.default_rng(seed)
    scores = torch.tensor(random.normal(0, 2, (3000, 21))).float().softmax(-1)[:, :-1]
    return scores, torch.tensor(random.normal(0, 1, (3000, 4))).float()


@pytest.mark.parametrize("most", [5, 10**6])
@pytest.mark.parametrize(
    "keys", [{}, {"SCORE_THRESH_TEST": 0.5, "TOPK_CANDIDATES_TEST": 20, "NMS_THRESH_TEST": 0.2}]
)
def test_detections_by_loops(keys, most):
    cfg = config(WIDTH=0.25, **keys)
    cfg.TEST.DETECTIONS_PER_IMAGE = most
    model = build_model(cfg)
    anchors = model._anchors(maps(WIDTHS["C"]))
    scores, deltas = predictions(model)
    scores = scores[:, :4]  # of few classes, and only of some prior boxes
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


@pytest.mark.parametrize("network", NETWORKS)
def test_inference(network):
    model, inputs = ssd(network, SCORE_THRESH_TEST=0.0).eval(), batch(1, 1)
    inputs[1].update(height=600, width=150)
    with torch.no_grad():
        first, second = (output["instances"] for output in model(inputs))
        (alone,) = model(inputs[1:])
    assert first.image_size == (300, 300) and second.image_size == (600, 150)
    for found, (height, width) in ((first, (300, 300)), (second, (600, 150))):
        assert 0 < len(found) <= 200
        assert (found.scores[:-1] >= found.scores[1:]).all()
        assert found.pred_classes.max() < 20
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
    found = ssd("C").preprocess_image(images).tensor
    assert found.unique().tolist() == [3 / 128] and found.shape == (1, 3, 300, 300)


# What is refused


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(300, 400), (320, 320), (299, 300)])
def test_images_of_another_size(shape, training):
    model, inputs = ssd().train(training), batch(1, 1)
    inputs[1].update(image=torch.zeros(3, *shape), file_name="odd.jpg")
    message = rf"300x300 pixels \(MODEL.SSD.SIZE\), 'odd.jpg' comes with \({shape[0]}, {shape[1]}\); "
    with pytest.raises(ValueError, match=message + r"set INPUT.FIXED_SIZE to \[300, 300\]"):
        model(inputs)


def test_strides_that_the_backbone_has_not():
    with pytest.raises(ValueError, match=r"STRIDES is \[16, 32, 64, 100, 128, 300\], .* \['s128'\];"):
        ssd(STRIDES=[16, 32, 64, 100, 128, 300])


def test_fewer_classes():
    model = ssd(NUM_CLASSES=3).eval()
    logits, deltas = model.head(levels(model))
    assert [x.shape[1] for x in logits] == [6 * 4] * 6 and [x.shape[1] for x in deltas] == [24] * 6
    terms = model.train()(batch(2, 2, classes=3))
    assert all(term.isfinite() for term in terms.values())


def test_images_of_another_fixed_size():
    """The levels keep the names that they have for images of 300."""
    model = ssd("C", SIZE=320).train()
    assert all(term.isfinite() for term in model(batch(2, 2, size=320)).values())
