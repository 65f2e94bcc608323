"""tools/check_golden.py on recorded arrays of SOLOv2, and on those of another network."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from golden_tool import compared, write
from solov2_case import random_objects

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file


@pytest.fixture
def recorded(shared):
    with np.load(shared / "golden" / "adet_solov2.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def is_input(name):
    return name == "keys" or name.startswith(("image", "gt/")) or name in FUNCTION_INPUTS


FUNCTION_INPUTS = {
    *("fn/nms/masks", "fn/nms/labels", "fn/nms/scores", "fn/point_nms/in", "fn/imrescale/in"),
    *("fn/dice/pred", "fn/dice/target"),
}


def results(arrays):
    """What is computed; boxes of detections are zeros there."""
    return {n for n in arrays if not is_input(n) and not n.endswith("pred_boxes")}


def test_recorded_fixture(tool, shared, recorded, capsys):
    assert tool.main([str(shared / "golden" / "adet_solov2.npz")]) == 0
    output = capsys.readouterr().out
    assert "adet_solov2: pass" in output
    assert set(compared(output, "pass")) == results(recorded) and len(results(recorded)) > 85


def test_every_changed_array_fails(tool, tmp_path, recorded, capsys):
    """By little: of one number, one cell, five pixels of a mask. Sizes of outputs are inputs too."""
    changed = {name: np.array(array) for name, array in recorded.items()}
    names = {n for n in results(recorded) if recorded[n].size and not n.endswith("image_size")}
    for name in names:
        array = changed[name]
        if name.startswith("targets/") and name.endswith("packed"):
            array[0, -1] ^= 1
        elif name.endswith("packed"):
            array[0, 0] ^= 0b11111
        elif name.endswith("area"):
            array[0] += 5
        elif array.dtype == bool:
            array.flat[0] ^= True
        else:
            array.flat[0] += 1 if array.dtype.kind in "iu" else max(3e-4, 3e-4 * abs(array.flat[0]))
    assert tool.main([write(tmp_path, changed)]) == 1
    output = capsys.readouterr().out
    assert set(compared(output, "FAIL")) == names


# Another network, other images.

GRIDS, SIZES, OBJECTS = [9, 7, 6, 4, 2], [(96, 64), (70, 90), (64, 64)], [4, 0, 140]


def other_network():
    """The tensors' shapes of a narrow R101 for 2 classes."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file("SOLOv2/R101_3x.yaml"))
    cfg.MODEL.DEVICE = "meta"
    resnet, node = cfg.MODEL.RESNETS, cfg.MODEL.SOLOV2
    resnet.STEM_OUT_CHANNELS, resnet.WIDTH_PER_GROUP, resnet.RES2_OUT_CHANNELS = 8, 4, 12
    cfg.MODEL.FPN.OUT_CHANNELS = node.INSTANCE_IN_CHANNELS = node.MASK_IN_CHANNELS = 20
    node.NUM_CLASSES, node.INSTANCE_CHANNELS, node.MASK_CHANNELS = 2, 32, 64
    node.NUM_KERNELS = node.NUM_MASKS = 96
    with torch.device("meta"):
        return {name: list(x.shape) for name, x in build_model(cfg).state_dict().items()}


def other_inputs():
    random, arrays = np.random.default_rng(0), {"keys": np.array(json.dumps(other_network()))}
    for index, (size, count) in enumerate(zip(SIZES, OBJECTS)):
        boxes, masks = random_objects(random, count, size)
        truth = f"gt/img{index}"
        arrays[f"image{index}"] = random.integers(0, 256, (3, *size), dtype=np.uint8)
        arrays[f"{truth}/boxes"] = boxes
        arrays[f"{truth}/classes"] = random.integers(0, 2, count)
        arrays[f"{truth}/masks_packed"] = np.packbits(masks.reshape(count, size[0] * size[1]), axis=1)
        arrays[f"{truth}/masks_shape"] = np.array(masks.shape)
    return arrays


def other_results(recorded):
    """Names of the arrays of a file of the same layout, and no numbers yet."""
    arrays = {name: array for name, array in recorded.items() if name.startswith("fn/")}
    for level, grid in enumerate(GRIDS):
        arrays[f"eval/head/cate{level}"] = np.zeros((3, 2, grid, grid))
        arrays[f"eval/head/kernel{level}"] = np.zeros((3, 96, grid, grid))
        for image in range(3):
            for part in ("cate", "order"):
                arrays[f"targets/img{image}/{part}{level}"] = np.zeros(0)
            arrays[f"targets/img{image}/ins{level}_packed"] = np.zeros((0, 0), dtype=np.uint8)
    arrays["eval/mask_feat"] = np.zeros((3, 96, 24, 24))
    for image, size in enumerate([(50, 40), (70, 90), (128, 100)]):
        for variant in ("matrix_gaussian", "mask_nms", "nmspre9_max3"):
            for part in ("scores", "pred_classes", "pred_masks_area"):
                arrays[f"eval/{variant}/img{image}/{part}"] = np.zeros(0)
        arrays[f"eval/matrix_gaussian/img{image}/image_size"] = np.array(size)
        arrays[f"eval/matrix_gaussian/img{image}/pred_masks_shape"] = np.zeros(3)
        packed = f"eval/matrix_gaussian/img{image}/pred_masks_packed"
        arrays[packed] = np.zeros((0, 0), dtype=np.uint8)
    for variant in ("default", "img2_first_gt_only", "empty_img0", "empty_all"):
        arrays[f"train/{variant}/loss_ins"] = arrays[f"train/{variant}/loss_cate"] = np.zeros(())
    arrays["train/default/gradnorm/ins_head.cate_pred.weight"] = np.zeros(())
    return arrays


def other_fixture(tool, recorded):
    """Of what we compute: that sizes, images and variants may be others, not that numbers are right."""
    arrays = {**other_inputs(), **other_results(recorded)}
    (kind,) = tool.kinds_of(arrays)
    for _ in range(2):  # detections follow from the outputs that the fixture has
        for comparison in kind.run(arrays).comparisons:
            integers = comparison.expected.dtype == np.uint8 or comparison.name.endswith("packed")
            arrays[comparison.name] = comparison.actual.astype(np.uint8 if integers else np.float64)
    return arrays


def test_fixture_of_another_network(tool, tmp_path, recorded, capsys):
    arrays = other_fixture(tool, recorded)
    assert arrays["targets/img2/order0"].size > 140 and arrays["targets/img1/order0"].size == 0
    assert len(arrays["eval/nmspre9_max3/img1/scores"]) == 3
    assert arrays["eval/matrix_gaussian/img2/pred_masks_packed"].shape[1] == 128 * 100 // 8
    assert arrays["train/empty_all/loss_ins"] == 0 < arrays["train/empty_img0/loss_ins"]
    assert tool.main([write(tmp_path, arrays)]) == 0
    assert set(compared(capsys.readouterr().out, "pass")) == results(arrays)
    arrays["eval/head/kernel3"][2] += 0.01
    assert tool.main([write(tmp_path, arrays)]) == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("eval/soft_nms/img0/scores", "has detections 'eval/soft_nms', which are of no known settings"),
        ("train/cropped/loss_ins", "has losses 'train/cropped', which are of no known batch"),
    ],
)
def test_unknown_variants(tool, tmp_path, recorded, capsys, name, message):
    assert tool.main([write(tmp_path, {**recorded, name: np.zeros(1)})]) == 2
    assert message in capsys.readouterr().err


def test_network_with_other_tensors(tool, tmp_path, recorded, capsys):
    shapes = json.loads(str(recorded["keys"]))
    shapes["ins_head.centerness.weight"] = [1, 64, 3, 3]
    assert tool.main([write(tmp_path, {**recorded, "keys": np.array(json.dumps(shapes))})]) == 2
    message = "of a network with other tensors than ours: ['ins_head.centerness.weight']"
    assert message in capsys.readouterr().err


def test_batches_of_losses(tool, recorded):
    from golden import Fixture, FixtureError
    from golden.adet_solov2 import _inputs, _training_inputs

    inputs = _inputs(Fixture(recorded, 0, 0))

    def counts(variant):
        return [len(item["instances"]) for item in _training_inputs(inputs, variant)]

    assert counts("default") == [5, 2] and counts("img1_first_gt_only") == [5, 1]
    assert counts("empty_img0") == [0, 2] and counts("empty_all") == [0, 0]
    with pytest.raises(FixtureError):
        counts("other")
