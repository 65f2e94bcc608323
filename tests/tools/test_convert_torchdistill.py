"""tools/convert_torchdistill.py: torchvision's detectors, and GHND's students, give the same in detectron2."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from distill_d2 import model_zoo
from distill_d2.checkpoint import read_checkpoint
from distill_d2.config import student_config
from distill_d2.engine import argument_parser
from distill_d2.engine.setup import load_config

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEACHERS = {kind: f"Teachers/torchvision_{kind}_rcnn_R_50_FPN.yaml" for kind in ("faster", "mask", "keypoint")}
NAMES = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
# torchvision's rows of COCO's classes, by its own list of names.
COCO_ROWS = [row for row, name in enumerate(NAMES) if name not in ("__background__", "N/A")]
SIZE = (64, 96)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import convert_torchdistill

    yield convert_torchdistill
    sys.path.remove(str(TOOLS))


# Detectors of torchvision.


class NaiveBottleneck(nn.Module):
    """GHND's first stage, written down layer by layer."""

    def __init__(self, channels=3, widths=(64, 256, 64, 64, 128), ends=(64, 256)):
        super().__init__()
        a, b, c, d, e = widths
        first, last = ends
        self.encoder = nn.Sequential(
            *(nn.Conv2d(first, a, 2, padding=1, bias=False), nn.BatchNorm2d(a)),
            *(nn.Conv2d(a, b, 2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()),
            *(nn.Conv2d(b, c, 2, padding=1, bias=False), nn.BatchNorm2d(c)),
            nn.Conv2d(c, channels, 2, padding=1, bias=False),
        )
        self.decoder = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, d, 2, bias=False), nn.BatchNorm2d(d)),
            *(nn.Conv2d(d, e, 2, bias=False), nn.BatchNorm2d(e), nn.ReLU()),
            *(nn.Conv2d(e, last, 2, bias=False), nn.BatchNorm2d(last)),
            *(nn.Conv2d(last, last, 2, bias=False), nn.BatchNorm2d(last), nn.ReLU()),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


def torchvision_detector(kind, depth=50, classes=91, bottleneck=None, eps=0.0, **options):
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None)
    if bottleneck is not None:
        backbone.body["layer1"] = bottleneck
    build = {"faster": detection.FasterRCNN, "mask": detection.MaskRCNN, "keypoint": detection.KeypointRCNN}
    model = build[kind](backbone, classes, **options)
    randomise(model, eps)
    return model.eval()


@torch.no_grad()
def randomise(model, eps):
    """Statistics, gains and biases that are nowhere 0 or 1; variances so small that an eps shows."""
    for name, module in model.named_modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            residual = name.endswith(("bn3", "downsample.1"))
            module.running_var.uniform_(0.5e-4, 1.5e-4)
            module.running_mean.normal_(0, 0.1)
            module.weight.uniform_(0.002, 0.004) if residual else module.weight.uniform_(0.005, 0.01)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
            module.bias.normal_(0, 0.1)
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
    model.roi_heads.box_predictor.cls_score.weight.mul_(20)  # some scores are above the threshold


def old_names(state_dict):
    """As torchvision 0.7 named them."""
    renamed = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(
            r"mask_head\.(\d)\.0\.", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}.", name
        )
        renamed[name] = tensor
    return renamed


def icpr_names(state_dict):
    """As the repository of the ICPR 2020 paper named them."""
    old = old_names(state_dict)
    return {name.replace("layer1.encoder.", "layer1.encoder.encoder."): t for name, t in old.items()}


# Conversions.


def run(tool, folder, data, *options):
    """Convert ``data``; the weights that were written and what was printed by main."""
    source, target = folder / "input.pth", folder / "output.pth"
    torch.save(data, source)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        tool.main([str(source), str(target), *options])
    return target, "\n".join(lines)


def printed_config(output):
    """The config of the printed command."""
    command = shlex.split(output.partition("To evaluate it:\n")[2].splitlines()[0])
    assert command[:3] == ["python", "train_baseline.py", "--eval-only"]
    args = argument_parser().parse_args(command[2:])
    assert args.opts[0] == "MODEL.WEIGHTS"
    cfg = student_config(load_config(args.config_file, args.opts))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


class Pair:
    """A detector of torchvision, and what the printed command evaluates."""

    def __init__(self, tool, folder, model, data, *options, **keys):
        self.theirs = model
        path, self.output = run(tool, folder, data, *options)
        self.cfg = printed_config(self.output)
        for key, value in keys.items():
            self.cfg.merge_from_list([key, value])
        self.ours = build_model(self.cfg).eval()
        incompatible = []
        checkpointer = DetectionCheckpointer(self.ours)
        checkpointer._log_incompatible_keys = incompatible.append
        checkpointer.load(self.cfg.MODEL.WEIGHTS)
        (keys,) = incompatible
        assert not (keys.missing_keys or keys.unexpected_keys or keys.incorrect_shapes)
        self.weights = read_checkpoint(str(path))["model"]
        for file in folder.iterdir():
            file.unlink()  # hundreds of megabytes


@pytest.fixture(scope="module")
def mask(tool, tmp_path_factory):
    torch.manual_seed(1)
    model = torchvision_detector("mask")
    return Pair(tool, tmp_path_factory.mktemp("mask"), model, model.state_dict())


@pytest.fixture(scope="module")
def keypoint(tool, tmp_path_factory):
    torch.manual_seed(2)
    model = torchvision_detector("keypoint", classes=2)
    prefixed = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return Pair(tool, tmp_path_factory.mktemp("keypoint"), model, prefixed)


@pytest.fixture(scope="module")
def student(tool, tmp_path_factory):
    """As torchdistill released it."""
    torch.manual_seed(3)
    model = torchvision_detector("faster", bottleneck=NaiveBottleneck())
    folder = tmp_path_factory.mktemp("student")
    data = released(old_names(model.state_dict()))
    return Pair(tool, folder, model, data, "--config-file", TEACHERS["faster"])


def released(state_dict):
    """All that torchdistill's checkpoints hold."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15])
    return {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "best_value": np.float64(0.359),  # an element of pycocotools' stats
        "lr_scheduler": scheduler.state_dict(),  # with a Counter of milestones
        "config": {"models": {"student_model": {"name": "custom_fasterrcnn_resnet_fpn"}}},
        "args": argparse.Namespace(config="ghnd.yaml", device="cuda", iou_types=["bbox"]),
    }


# Small ones, for what needs no whole detector.


def small_weights(classes=7, mask=False):
    """A Faster R-CNN R18-FPN of zeros."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    build = detection.MaskRCNN if mask else detection.FasterRCNN
    return build(backbone, classes).state_dict()


@pytest.fixture(scope="module")
def small():
    return small_weights()


# Equality of outputs.


def assert_equal_maps(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and b.std() > 1e-3
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def random_features(pair):
    features = [torch.randn(1, 256, *(side // stride for side in SIZE)) for stride in (4, 8, 16)]
    return features


@pytest.mark.parametrize("name", ["mask", "keypoint", "student"])
@torch.no_grad()
def test_features_are_equal(name, request):
    pair = request.getfixturevalue(name)
    x = torch.randn(2, 3, *SIZE)
    ours, theirs = pair.ours.backbone(x), pair.theirs.backbone(x)
    assert list(ours) == ["p2", "p3", "p4", "p5", "p6"]
    assert_equal_maps(ours.values(), theirs.values())


@pytest.mark.parametrize("name", ["mask", "keypoint", "student"])
@torch.no_grad()
def test_features_show_a_wrong_eps(name, request):
    """The tolerance of these tests is below what an eps of 1e-5 changes."""
    pair = request.getfixturevalue(name)
    x = torch.randn(1, 3, *SIZE)
    before = pair.theirs.backbone(x)["0"]
    for module in pair.theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 1e-5
    after = pair.theirs.backbone(x)["0"]
    for module in pair.theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    assert (after - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("name", ["mask", "keypoint", "student"])
@torch.no_grad()
def test_rpn_is_equal(name, request):
    pair = request.getfixturevalue(name)
    features = [torch.randn(1, 256, 16, 24), torch.randn(1, 256, 8, 12)]
    ours = pair.ours.proposal_generator.rpn_head(features)
    theirs = pair.theirs.rpn.head(features)
    for a, b in zip(ours, theirs):  # logits, deltas
        assert_equal_maps(a, b)


@pytest.mark.parametrize("name", ["mask", "keypoint", "student"])
@torch.no_grad()
def test_boxes_and_classes_are_equal(name, request):
    pair = request.getfixturevalue(name)
    rows = [1] if name == "keypoint" else COCO_ROWS
    pooled = torch.randn(5, 256, 7, 7)
    heads = pair.ours.roi_heads
    scores, deltas = heads.box_predictor(heads.box_head(pooled))
    heads = pair.theirs.roi_heads
    expected_scores, expected_deltas = heads.box_predictor(heads.box_head(pooled))
    expected_deltas = expected_deltas.view(5, -1, 4)[:, rows].flatten(1)
    assert_equal_maps([scores, deltas], [expected_scores[:, [*rows, 0]], expected_deltas])


@torch.no_grad()
def test_masks_are_equal(mask):
    pooled = torch.randn(2, 256, 14, 14)
    ours = mask.ours.roi_heads.mask_head.layers(pooled)
    heads = mask.theirs.roi_heads
    assert_equal_maps([ours], [heads.mask_predictor(heads.mask_head(pooled))[:, COCO_ROWS]])


@torch.no_grad()
def test_keypoints_are_equal(keypoint):
    pooled = torch.randn(2, 256, 14, 14)
    ours = keypoint.ours.roi_heads.keypoint_head.layers(pooled)
    heads = keypoint.theirs.roi_heads
    assert_equal_maps([ours], [heads.keypoint_predictor(heads.keypoint_head(pooled))])


@pytest.mark.parametrize("name", ["mask", "keypoint", "student"])
@torch.no_grad()
def test_detections_are_equal(name, request):
    """With one exception: torchvision rounds its anchors to whole pixels, here it gets ours."""
    pair = request.getfixturevalue(name)
    ours, theirs = pair.ours, pair.theirs
    anchors = ours.proposal_generator.anchor_generator
    cells = [cell.clone() for cell in anchors.cell_anchors]
    for cell, rounded in zip(cells, theirs.rpn.anchor_generator.cell_anchors):
        assert torch.equal(cell.round(), rounded)
    theirs.rpn.anchor_generator.cell_anchors = cells
    theirs.roi_heads.detections_per_img = 4
    for predictor in (ours.roi_heads.box_predictor,):
        predictor.test_topk_per_image = 4

    image = torch.rand(3, 128, 192)
    ours_found = ours.inference([{"image": image * 255}], do_postprocess=False)[0]
    found = theirs_detections(theirs, image)
    assert len(found["boxes"]) == len(ours_found) == 4
    assert torch.allclose(ours_found.pred_boxes.tensor, found["boxes"], atol=0.01)
    assert torch.allclose(ours_found.scores, found["scores"], atol=1e-4)
    rows = [1] if name == "keypoint" else COCO_ROWS
    assert [rows[i] for i in ours_found.pred_classes] == found["labels"].tolist()
    if name == "mask":
        assert torch.allclose(ours_found.pred_masks, found["masks"], atol=1e-3)
    if name == "keypoint":
        assert torch.allclose(ours_found.pred_keypoints[..., :2], found["keypoints"][..., :2], atol=1)


def theirs_detections(model, image):
    """Of torchvision, on the image as it is, before masks are pasted into it."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.transform.image_mean, model.transform.image_std))
    x = ((image - mean) / std)[None]
    images = detection.image_list.ImageList(x, [tuple(image.shape[1:])])
    features = model.backbone(x)
    proposals, _ = model.rpn(images, features)
    (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
    return found
