"""SOLOv2 itself: training, and what it refuses."""

import naive_fcos
import naive_solov2 as naive
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from distill_d2.projects.solov2 import targets
from solov2_case import GRIDS, PADDED, RANGES, batch, config, solov2

from distill_d2.testing.synchronization import no_synchronization


def step(model, inputs):
    """The losses; everything has a gradient afterwards."""
    losses = model.train()(inputs)
    assert list(losses) == ["loss_ins", "loss_cate"]
    model.zero_grad()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("most", [-1, 1])
def test_losses_by_loops(most):
    """From what the heads compute: padding, levels, cells, duplicates, both weights."""
    keys = {"LOSS.DICE_WEIGHT": 2.0, "LOSS.FOCAL_WEIGHT": 0.7, "LOSS.FOCAL_ALPHA": 0.4}
    keys.update({"LOSS.FOCAL_GAMMA": 1.5, "MAX_INSTANCES_TRAIN": most})
    cfg = config(NUM_GRIDS=[3, 2, 2, 2, 2])
    cfg.merge_from_list([part for k, v in keys.items() for part in (f"MODEL.SOLOV2.{k}", v)])
    torch.manual_seed(0)
    model, inputs, seen = build_model(cfg), batch(9, 0, 4, seed=2), []
    for head in (model.ins_head, model.mask_head):
        head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    losses = step(model, inputs)
    (logits, kernels), features = seen
    dice, rows, labels = [], [], []
    for i, item in enumerate(inputs):
        truth = item["instances"]
        masks = truth.gt_masks.tensor.numpy()
        classes, entries = naive.targets(
            *(truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), masks, PADDED),
            *([3, 2, 2, 2, 2], RANGES, 0.2, 3),
        )
        for level, row, column, k in entries:
            kernel = kernels[level][i, :, row, column].detach()
            mask = np.tensordot(kernel, features[i].detach(), axes=1)
            wanted = naive.downscale(masks[k].astype(float), 4, (16, 24))
            dice.append(naive.dice(1 / (1 + np.exp(-mask)), wanted))
        for level, grid in enumerate(classes):
            rows += logits[level][i].flatten(1).t().tolist()
            labels += grid.ravel().tolist()
    assert len(dice) > 12
    found = losses["loss_ins"] / 2.0
    expected = np.mean(dice) if most == -1 else min(dice, key=lambda each: abs(each - found))
    assert found == pytest.approx(expected, rel=1e-4)
    focal = sum(naive_fcos.focal(*pair, 0.4, 1.5) for pair in zip(rows, labels))
    count = sum(label < 3 for label in labels)
    assert losses["loss_cate"] == pytest.approx(0.7 * focal / (count + 1), rel=1e-4)


@pytest.mark.parametrize("why", ["no objects", "empty masks", "no level"])
def test_no_objects_at_all(why):
    inputs = batch(*((0, 0) if why == "no objects" else (2, 3)))
    for item in inputs:
        if why == "no objects":
            del item["instances"]._fields["gt_masks"]  # as detectron2's mapper returns it
        elif why == "empty masks":
            item["instances"].gt_masks.tensor[:] = False
    model = solov2(FPN_SCALE_RANGES=[[600, 700]] * 5 if why == "no level" else RANGES)
    losses = step(model, inputs)
    assert losses["loss_ins"] == 0.0 and losses["loss_cate"] > 0
    assert not model.mask_head.conv_pred[0].weight.grad.any()
    assert not model.ins_head.kernel_pred.weight.grad.any()


def test_limit_of_masks():
    """One that is not reached changes nothing, and draws nothing."""
    inputs, found = batch(30, 10), []
    for most in (-1, 10**6, 20):
        model, before = solov2(MAX_INSTANCES_TRAIN=most), torch.get_rng_state()
        found.append(step(model, inputs))
        assert torch.equal(torch.get_rng_state(), before) == (most != 20)
    assert found[0] == found[1]
    assert found[2]["loss_ins"] != found[0]["loss_ins"]
    assert found[2]["loss_cate"] == pytest.approx(found[0]["loss_cate"], rel=1e-5)


@pytest.mark.parametrize("most", [-1, 20])
def test_a_step_does_not_synchronize(most, monkeypatch):
    """Once the ground truth is on the device; how much of it there is, is known on the host."""
    model, inputs = solov2(MAX_INSTANCES_TRAIN=most).train(), batch(9, 0, 4)
    images = model.preprocess_image(inputs)
    truths = [item["instances"] for item in inputs]
    objects = {id(truth): model.targets.objects(truth, PADDED, model.device) for truth in truths}
    drawn = targets.draw_slots([image.most_entries for image in objects.values()], most)
    monkeypatch.setattr(model.targets, "objects", lambda truth, *_: objects[id(truth)])
    monkeypatch.setattr(targets, "draw_slots", lambda *_: drawn)
    outputs = model.predict(model.backbone(images.tensor))
    with no_synchronization():
        losses = model.losses(*outputs, truths)
        sum(losses.values()).backward()


def test_losses_are_float32_under_autocast():
    model, inputs = solov2(), batch(4, 2)
    whole = step(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(whole[name], rel=0.1)


def test_norm_and_padding_of_the_images():
    model, inputs = solov2(), batch(1, 1)  # 64 and 56 pixels high
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 64, 96) and images.image_sizes == [(64, 96), (56, 96)]
    mean, std = model.pixel_mean, model.pixel_std
    assert torch.equal(images.tensor[1, :, :56], (inputs[1]["image"] - mean) / std)
    assert not images.tensor[1, :, 56:].any()
    assert not any("pixel" in name for name in model.state_dict())


# What is refused when it is built


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"NUM_KERNELS": 64}, "NUM_KERNELS: found 64, expected NUM_MASKS, 32: a kernel has a weight"),
        ({"NMS_TYPE": "box"}, r"NMS_TYPE: found 'box', expected one of \['matrix', 'mask'\]"),
        ({"NMS_KERNEL": "cubic"}, r"NMS_KERNEL: .* one of \['gaussian', 'linear'\]"),
        ({"NORM": "BN"}, r"NORM: found 'BN', expected one of \['GN', 'none'\]"),
        ({"USE_DCN_IN_INSTANCE": True}, "USE_DCN_IN_INSTANCE: found True, expected False"),
        ({"LOSS.FOCAL_USE_SIGMOID": False}, "LOSS.FOCAL_USE_SIGMOID: found False, expected True"),
        ({"NUM_GRIDS": GRIDS[:4]}, "NUM_GRIDS, .*: found {.*'NUM_GRIDS': 4, .*}, expected lists of one"),
        ({"FPN_INSTANCE_STRIDES": [8]}, "'FPN_INSTANCE_STRIDES': 1"),
        ({"FPN_SCALE_RANGES": RANGES + [[1, 2]]}, "'FPN_SCALE_RANGES': 6"),
        ({"INSTANCE_IN_FEATURES": ["p2"]}, "'INSTANCE_IN_FEATURES': 1"),
        ({"FPN_SCALE_RANGES": [[9, 1]] * 5}, "FPN_SCALE_RANGES: .* pairs"),
        ({"FPN_SCALE_RANGES": [1, 9, 20, 30, 50]}, "FPN_SCALE_RANGES: .* pairs"),
        ({"NUM_GRIDS": [0] * 5}, r"NUM_GRIDS: found \[0, 0, 0, 0, 0\], expected numbers above 0"),
        (
            {"INSTANCE_IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"]},
            r"INSTANCE_IN_FEATURES: .* levels of the backbone, which has \['p2', .* 'p6'\]",
        ),
        ({"MASK_IN_FEATURES": ["p2", "p9"]}, "MASK_IN_FEATURES: .* levels of the backbone"),
        ({"MASK_IN_FEATURES": ["p2", "p4"]}, r"twice the stride of the one before; .* \[4, 16\]"),
        ({"MASK_IN_FEATURES": ["p4", "p5", "p6"]}, "strides that divide 32, .* padded; one is 64"),
        ({"MASK_IN_FEATURES": []}, "MASK_IN_FEATURES: found "),
        ({"INSTANCE_IN_CHANNELS": 16}, "INSTANCE_IN_CHANNELS: found 16, expected 32, those of p2"),
        ({"MASK_IN_CHANNELS": 16}, "MASK_IN_CHANNELS: found 16, expected 32, those of p2"),
        ({"INSTANCE_CHANNELS": 40}, "INSTANCE_CHANNELS: found 40, expected a multiple of 32"),
        ({"MASK_CHANNELS": 40}, "MASK_CHANNELS: found 40, expected a multiple of 32"),
        ({"NUM_KERNELS": 40, "NUM_MASKS": 40}, "NUM_MASKS: found 40, expected a multiple of 32"),
        ({"MAX_INSTANCES_TRAIN": 0}, "MAX_INSTANCES_TRAIN: found 0, expected a number above 0, or -1"),
        ({"PRIOR_PROB": 1.0}, "PRIOR_PROB: found 1.0"),
        ({"MASK_THR": 0.0}, "MASK_THR: found 0.0"),
        ({"NMS_SIGMA": 0}, "NMS_SIGMA: found 0, expected a number above 0"),
        ({"NUM_CLASSES": 0}, "NUM_CLASSES: found 0"),
        ({"NMS_PRE": 0}, "NMS_PRE: found 0"),
    ],
)
def test_wrong_values(keys, match):
    cfg = config()
    cfg.merge_from_list([part for k, v in keys.items() for part in (f"MODEL.SOLOV2.{k}", v)])
    with pytest.raises(ValueError, match=rf"^MODEL\.SOLOV2\..*{match}"):
        build_model(cfg)
