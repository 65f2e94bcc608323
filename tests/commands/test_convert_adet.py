"""distill-d2 convert adet on networks of a few channels, under the names of all ages."""

import re

import numpy as np
import pytest
import torch
from detectron2.modeling import FCOS, build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.utils.events import EventStorage

from distill_d2 import cli
from distill_d2.checkpoint import SafeCheckpointer
from distill_d2.engine import load_config
from distill_d2.teacher import load_teacher_weights
from distill_d2.testing.tiny import tiny_batch

CONFIG = "FCOS-Detection/R_50_1x.yaml"
DLA = "FCOS-Detection/FCOS_RT/MS_DLA_34_4x_syncbn.yaml"
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.FCOS.NUM_CLASSES": 3,
}


def options(**keys):
    keys = {**SMALL, **{f"MODEL.{name.replace('__', '.')}": value for name, value in keys.items()}}
    return [str(part) for pair in keys.items() for part in pair]


def model_of(config=CONFIG, **keys):
    return randomized(build_model(load_config(config, options(**keys))))


@torch.no_grad()
def randomized(model):
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "running_var" not in name and "pixel" not in name:
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


def convert(folder, entries, *more, config=CONFIG, **keys):
    """The path of the result."""
    torch.save(entries, folder / "input.pth")
    arguments = [str(folder / "input.pth"), str(folder / "output.pth"), "--config-file", config]
    cli.main(["convert", "adet", *arguments, *more, *options(**keys)])
    return str(folder / "output.pth")


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bare", [False, True])
def test_a_released_one(tmp_path, capsys, bare):
    source, model = model_of(), model_of()
    state = source.state_dict()
    state.update(pixel_mean=torch.zeros(3, 1, 1), pixel_std=torch.ones(3, 1, 1))
    beside = {"iteration": 89999, "optimizer": {"a": [1]}, "best": np.float64(38.7)}
    entries = dict(state) if bare else {"model": dict(state), **beside}
    path = convert(tmp_path, entries)
    assert set(torch.load(path, weights_only=True)["model"]) == set(model.state_dict())
    SafeCheckpointer(model).load(path)
    assert same(model, source.state_dict())
    output = capsys.readouterr().out
    assert "dropped 2: pixel_mean, pixel_std" in output and f"MODEL.WEIGHTS {path}" in output
    # As it is, without a conversion: loaded by a student, and by a teacher, which must be whole.
    released, student, teacher = str(tmp_path / "released.pth"), model_of(), model_of()
    torch.save({"model": state}, released)
    SafeCheckpointer(student).load(released)
    assert load_teacher_weights(teacher, released) == len(source.state_dict())
    assert same(student, state) and same(teacher, state)


@pytest.mark.parametrize("semantic", [False, True])
def test_condinst(tmp_path, semantic):
    """Those of 2020 have no counter of iterations."""
    keys = {"CONDINST__MASK_BRANCH__SEMANTIC_LOSS_ON": semantic}
    source, model = (model_of("CondInst/MS_R_50_1x.yaml", **keys) for _ in range(2))
    state = {name: tensor for name, tensor in source.state_dict().items() if name != "mask_head._iter"}
    path = convert(tmp_path, state, config="CondInst/MS_R_50_1x.yaml", **keys)
    weights = torch.load(path, weights_only=True)["model"]
    assert weights["mask_head._iter"].tolist() == [0] and set(weights) == set(source.state_dict())
    model.load_state_dict(weights)  # strict
    assert torch.equal(model.controller.weight, source.controller.weight)


def before_detectron2(name):
    """As the FCOS that preceded detectron2 named it; written independently of the tool."""
    name = name.replace("backbone.bottom_up.stem.conv1.norm", "backbone.body.stem.bn1")
    name = name.replace("backbone.bottom_up.stem", "backbone.body.stem")
    found = re.match(r"backbone\.bottom_up\.res(\d)\.(\d+)\.(.*)", name)
    if found:
        stage, block, rest = found.groups()
        rest = re.sub(r"conv(\d)\.norm", r"bn\1", rest)
        rest = rest.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        return f"backbone.body.layer{int(stage) - 1}.{block}.{rest}"
    for new, old in (("lateral", "inner"), ("output", "layer")):
        for level in (3, 4, 5):
            name = name.replace(f"backbone.fpn_{new}{level}", f"backbone.fpn.fpn_{old}{level - 1}")
    name = name.replace("backbone.top_block.", "backbone.fpn.top_blocks.")
    return name.replace("proposal_generator.fcos_head.", "rpn.head.").replace("ctrness", "centerness")


def test_of_before_detectron2(tmp_path):
    source, model = model_of(), model_of()
    state = {f"module.{before_detectron2(name)}": t for name, t in source.state_dict().items()}
    assert "module.backbone.body.layer3.5.bn2.running_mean" in state
    assert {"module.backbone.fpn.fpn_inner2.weight", "module.rpn.head.centerness.bias"} < set(state)
    SafeCheckpointer(model).load(convert(tmp_path, {"model": state}))
    assert same(model, source.state_dict())


def test_dlas_weights_of_imagenet(tmp_path):
    keys = {"FPN__IN_FEATURES": ["stage3", "stage4", "stage5"]}
    source, model = (model_of(DLA, **keys) for _ in range(2))
    state = source.backbone.bottom_up.state_dict()
    state = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    state.update({"fc.weight": torch.zeros(1000, 512, 1, 1), "fc.bias": torch.zeros(1000)})
    path = convert(tmp_path, state, "--backbone", config=DLA, **keys)
    SafeCheckpointer(model).load(path)
    body = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(body[name], state[name]) for name in state if not name.startswith("fc."))
    assert not same(model, source.state_dict())


# To detectron2's own FCOS, and from it


def detectron2s():
    cfg = load_config(CONFIG, options())
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.FCOS.IN_FEATURES]
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=3, conv_dims=[64] * 4, norm="GN"),
        head_in_features=cfg.MODEL.FCOS.IN_FEATURES,
        num_classes=3,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        test_score_thresh=0.05**0.5,
    )


@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("to", ["projects", "detectron2"])
def test_detectron2s_own(tmp_path, capsys, to, scale):
    """The same detections. An equal scale of all levels becomes part of the box prediction; from detectron2 scales
    are 1."""
    keys = {"FCOS__USE_SCALE": scale is not None, "FCOS__THRESH_WITH_CTR": True}
    of_projects, of_detectron2 = model_of(**keys).eval(), randomized(detectron2s()).eval()
    head = of_projects.proposal_generator.fcos_head
    for layer in (head.bbox_pred, of_detectron2.head.bbox_pred):
        torch.nn.init.ones_(layer.bias)
    for each in head.scales or ():
        torch.nn.init.constant_(each.scale, scale)
    pair = [of_projects, of_detectron2]
    source, model = pair if to == "detectron2" else pair[::-1]
    path = convert(tmp_path, {"model": source.state_dict()}, "--to", to, **keys)
    model.load_state_dict(torch.load(path, weights_only=True)["model"])  # strict
    use = {"projects": "MODEL.WEIGHTS", "detectron2": "detectron2's own FCOS: train.init_checkpoint"}[to]
    assert f"To use it: {use} {path}" in capsys.readouterr().out
    with torch.no_grad(), EventStorage(0):
        found, expected = (each(tiny_batch(1))[0]["instances"] for each in (model, source))
    assert len(found) == len(expected) > 20
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({}, r"the levels' scales differ, \[.*\]: detectron2's FCOS has none, and only equal"),
        ({"FCOS__NUM_SHARE_CONVS": 1}, "the head has convolutions of both towers"),
        ({"FCOS__USE_DEFORMABLE": True}, "the head has deformable convolutions"),
        ({"FCOS__NORM": "BN"}, "the head has a batch norm per level"),
    ],
)
def test_heads_that_detectron2_does_not_have(tmp_path, keys, message):
    keys = {"FCOS__USE_SCALE": not keys, **keys}
    source = model_of(**keys)
    with pytest.raises(SystemExit, match=f"distill-d2 convert: {message}"):
        convert(tmp_path, source.state_dict(), "--to", "detectron2", **keys)
    assert not (tmp_path / "output.pth").exists()
