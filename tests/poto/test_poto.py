"""POTO itself: targets, losses, training, inference, what it refuses."""

import naive_fcos
import naive_poto as naive
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm
from distill_d2.projects.poto import poto as implementation
from distill_d2.projects.poto.poto import product_logits
from poto_case import VARIANTS, computed, config, poto

from distill_d2.config import add_distill_config, load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.testing.synchronization import no_synchronization
from distill_d2.testing.tiny import CLASSES, tiny_batch


def gt(inputs):
    return [item["instances"] for item in inputs]


# The product of two probabilities


def test_product_logits():
    x, y = torch.meshgrid(*[torch.linspace(-8, 8, 33, dtype=torch.float64)] * 2, indexing="ij")
    product = x.sigmoid() * y.sigmoid()
    torch.testing.assert_close(product_logits(x, y).sigmoid(), product, rtol=1e-12, atol=0)
    torch.testing.assert_close(product_logits(x, y), product_logits(y, x))


def test_product_logits_far_from_zero():
    far = torch.tensor([-200.0, -60.0, 0.0, 60.0, 200.0])
    x, y = (part.clone().requires_grad_() for part in torch.meshgrid(far, far, indexing="ij"))
    product = product_logits(x, y)
    product.sum().backward()
    for tensor in (product, x.grad, y.grad):
        assert tensor.isfinite().all()
    product = product.detach()
    assert product[0, 0] == -400 and product[0, 4] == -200 and product[4, 1] == -60
    assert product[4, 3] == 60 and product[2, 2].sigmoid().item() == pytest.approx(0.25)


# Targets


@pytest.mark.parametrize(
    "variant, alpha, radius",
    [("plain", 1.0, 1.5), ("3dmf", 0.0, 1e6), ("aux", 0.8, 0.5), ("both", 0.8, 1.5)],
)
def test_targets_by_loops(variant, alpha, radius):
    keys = {"ALPHA": alpha, "CENTER_SAMPLING_RADIUS": radius, "AUX_TOPK": 3}
    model, inputs = poto(variant, **keys), tiny_batch(3, objects=3)
    rows = computed(model, inputs)
    targets = model.targets(rows, gt(inputs))
    anchors = rows.anchors.tolist()
    images = targets.pairs.images
    assert images.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for image, instances in enumerate(gt(inputs)):
        boxes, classes = instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
        predicted = [naive.decode(*pair) for pair in zip(rows.deltas[image].tolist(), anchors)]
        scores = rows.filtered[image].double().sigmoid().tolist()
        quality = naive.qualities(scores, predicted, boxes, classes, alpha)
        near = np.array([[naive.is_near(box, anchor, radius) for anchor in anchors] for box in boxes])
        # Their sum is the largest that there is; the best are among a few locations of each object.
        found, mine = np.where(near, quality, -1.0), images == image
        objects_of, locations = targets.pairs.objects[mine] - 3 * image, targets.pairs.rows[mine]
        best = naive.best_sum(found[:, np.unique(np.argsort(-found, axis=1)[:, :3])])
        assert found[objects_of, locations].sum() == pytest.approx(best, abs=1e-5)
        assert torch.equal(targets.boxes[mine], instances.gt_boxes.tensor[objects_of])
        assert torch.equal(targets.classes[mine], instances.gt_classes[objects_of])
        if targets.auxiliary is None:
            assert variant not in ("aux", "both")
            continue
        scores = rows.logits[image].double().sigmoid().tolist()
        quality = naive.qualities(scores, predicted, boxes, classes, alpha)
        allowed = np.array([[naive.is_inside(box, anchor) for anchor in anchors] for box in boxes])
        owners = naive.auxiliary(quality, allowed, rows.sizes, 3)
        expected = [CLASSES if owner is None else classes[owner] for owner in owners]
        assert targets.auxiliary[image].tolist() == expected and len(set(expected)) > 1


# Losses


def focal(logits, classes):
    rows = zip(logits.double().flatten(0, 1).tolist(), classes.flatten().tolist())
    return sum(naive_fcos.focal(*row, 0.3, 1.5) for row in rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_by_loops(variant):
    keys = {"FOCAL_ALPHA": 0.3, "FOCAL_GAMMA": 1.5, "REG_WEIGHT": 3.0, "AUX_TOPK": 4}
    model, inputs = poto(variant, **keys), tiny_batch(2, objects=3)
    model.train()
    for norm in model.modules():  # as in training, but for this
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    found = model(inputs)
    rows = computed(model, inputs)
    targets = model.targets(rows, gt(inputs))
    classes = torch.full(rows.logits.shape[:2], CLASSES)
    classes[targets.pairs.images, targets.pairs.rows] = targets.classes
    assert (variant in ("plain", "aux")) == torch.equal(rows.logits, rows.filtered)
    assert (rows.filtered <= rows.logits).all()
    expected = {"loss_cls": focal(rows.filtered, classes) / 6, "loss_box_reg": 0.0}
    for image, row, box in zip(*targets.pairs[:2], targets.boxes.tolist()):
        predicted = naive.decode(rows.deltas[image, row].tolist(), rows.anchors[row].tolist())
        expected["loss_box_reg"] += 3.0 * (1 - naive.giou(predicted, box)) / 6
    if variant in ("aux", "both"):
        count = int((targets.auxiliary != CLASSES).sum())
        expected["loss_cls_aux"] = focal(rows.logits, targets.auxiliary) / count
        assert count not in (1, 6)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("variant", ["plain", "both"])
def test_numbers_of_objects_are_means_over_processes(variant, monkeypatch):
    """The other process has 7 times as many."""
    model, inputs = poto(variant).train(), tiny_batch(2)
    alone = model(inputs)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.mul_(8))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    together = model(inputs)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value / 4)


def test_a_mean_below_one_counts_as_one(monkeypatch):
    model, inputs = poto().train(), tiny_batch(1, objects=1)
    alone = model(inputs)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert model(inputs)["loss_cls"] == alone["loss_cls"]


@pytest.mark.parametrize("variant", ["plain", "both"])
def test_losses_are_float32_under_autocast(variant):
    """Exactly those of the head's outputs in float32."""
    model, inputs = poto(variant).train(), tiny_batch(2)
    seen = []
    model.head.register_forward_hook(lambda _module, levels, output: seen.append((levels[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs)
    ((levels, outputs),) = seen
    assert outputs[0][0].dtype == torch.bfloat16
    outputs = [[level.float() for level in part] for part in outputs]
    rows = model.rows([level.float() for level in levels], outputs)
    expected = model.losses(rows, model.targets(rows, gt(inputs)))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0)


def test_a_step_waits_for_the_device_once(monkeypatch):
    """In the one-to-one assignment (whose own test counts), nowhere else."""
    model, inputs = poto("both").train(), tiny_batch(2)
    rows = computed(model, inputs)
    pairs = model.targets(rows, gt(inputs)).pairs
    monkeypatch.setattr(implementation, "one_to_one", lambda _qualities: pairs)
    rows = rows._replace(filtered=rows.filtered.requires_grad_(), deltas=rows.deltas.requires_grad_())
    model.losses(rows, model.targets(rows, gt(inputs)))  # compiles what is scripted
    with no_synchronization():
        sum(model.losses(rows, model.targets(rows, gt(inputs))).values()).backward()


# Inference


@pytest.mark.parametrize("variant", ["plain", "3dmf"])
@pytest.mark.parametrize("keys", [{}, {"SCORE_THRESH_TEST": 0.2, "TOPK_CANDIDATES_TEST": 7}])
def test_detections_by_loops(variant, keys):
    cfg = config(variant, PRIOR_PROB=0.2, **keys)
    cfg.TEST.DETECTIONS_PER_IMAGE = 12
    torch.manual_seed(1)
    model, inputs = build_model(cfg).eval(), tiny_batch(2)
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.2)
    rows = computed(model, inputs)
    starts = np.cumsum([0, *rows.sizes])
    features = model.backbone(model.preprocess_image(inputs).tensor)
    features = [features[name] for name in model.head_in_features]
    images = model.preprocess_image(inputs)
    with torch.no_grad():
        outputs = model.forward_inference(images, features, model.head(features))
    for image, found in enumerate(outputs):
        scores = rows.filtered[image].double().sigmoid()
        levels = [level.tolist() for level in scores.split(rows.sizes)]
        node = cfg.MODEL.POTO
        expected = naive.detect(levels, node.SCORE_THRESH_TEST, node.TOPK_CANDIDATES_TEST, 12)
        assert len(expected) > 3 and found.image_size == images.image_sizes[image]
        assert found.pred_classes.tolist() == [k for *_, k in expected]
        np.testing.assert_allclose(found.scores, [p for p, *_ in expected], rtol=1e-5)
        for box, (_, level, row, _) in zip(found.pred_boxes.tensor, expected):
            row += starts[level]
            decoded = naive.decode(rows.deltas[image, row].tolist(), rows.anchors[row].tolist())
            np.testing.assert_allclose(box, decoded, rtol=1e-4, atol=1e-3)


# Configs, and what is refused


def packaged(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(name))
    return cfg


def test_packaged_distillation():
    """Of the packaged detectors, on the levels that both have."""
    cfg = packaged("Distillation-ICD/POTO_R_50_R101_icd_FPN_2x.yaml")
    node = cfg.MODEL.DISTILLER
    student = packaged("COCO-Detection/POTO_R_50_FPN_2x.yaml")
    teacher = packaged(node.MODEL_DISTILLER_CONFIG)
    assert cfg.MODEL.POTO == student.MODEL.POTO == teacher.MODEL.POTO
    assert node.INS.INPUT_FEATS == cfg.MODEL.POTO.IN_FEATURES and cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == (student.SOLVER.STEPS, 180000)
    assert (teacher.MODEL.RESNETS.DEPTH, student.MODEL.RESNETS.DEPTH) == (101, 50)


@pytest.mark.parametrize("depth, parameters", [("50", 32_244_250), ("101", 51_184_154)])
def test_packaged_configs(depth, parameters):
    """As many parameters as an FCOS, whose centerness has those of the filter, and the max filter's."""
    cfg = packaged(f"COCO-Detection/POTO_R_{depth}_FPN_2x.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.aux_topk == 9 and model.head.max3d is not None and model.max_detections_per_image == 100
    assert list(model.anchor_generator.strides) == [8, 16, 32, 64, 128]
    filters = sum(p.numel() for p in model.head.max3d.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters + filters


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"IN_FEATURES": ["p3", "p9"]},
            r"IN_FEATURES is \['p3', 'p9'\], but .* no levels \['p9'\]; it has",
        ),
        ({"ALPHA": 1.5}, "ALPHA is 1.5; expected a number from 0 to 1"),
        ({"AUX_TOPK": 0}, "AUX_TOPK is 0; expected at least 1"),
        ({"FILTER_KERNEL_SIZE": 2}, "FILTER_KERNEL_SIZE is 2; expected an odd number above 0"),
        ({"FILTER_KERNEL_SIZE": -1}, "FILTER_KERNEL_SIZE is -1; expected an odd"),
        ({"FILTER_TAU": 1}, "FILTER_TAU is 1; expected an even number, 0 or more"),
        ({"FILTER_TAU": -2}, "FILTER_TAU is -2; expected an even"),
    ],
)
def test_wrong_values(keys, message):
    with pytest.raises(ValueError, match="MODEL.POTO." + message):
        poto("both", **keys)
    if "FILTER" in message:
        poto("plain", **keys)  # nothing reads them
