"""distill-d2 convert torchdistill: torchvision's detectors and GHND's students, the same in detectron2."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from runs import assert_equal
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from distill_d2 import cli
from distill_d2.checkpoint import SafeCheckpointer, read_checkpoint
from distill_d2.config import student_config
from distill_d2.convert import torchdistill as tool
from distill_d2.engine import argument_parser, load_config

CLASSES = {
    "faster": detection.FasterRCNN,
    "mask": detection.MaskRCNN,
    "keypoint": detection.KeypointRCNN,
}
TEACHERS = {kind: f"Teachers/torchvision_{kind}_rcnn_R_50_FPN.yaml" for kind in CLASSES}
NAMES = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
# torchvision's rows of COCO's classes, by its own list of names.
COCO_ROWS = [row for row, name in enumerate(NAMES) if name not in ("__background__", "N/A")]
SIZE = (64, 96)


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


def torchvision_detector(kind, depth=50, classes=91, bottleneck=None, eps=0.0):
    """What torchvision's functions such as fasterrcnn_resnet50_fpn build when they load weights."""
    norm = FrozenBatchNorm2d
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, norm_layer=norm)
    if bottleneck is not None:
        backbone.body["layer1"] = bottleneck
    model = CLASSES[kind](backbone, classes)
    randomize(model, eps)
    return model.eval()


@torch.no_grad()
def randomize(model, eps):
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
    set_eps(model, eps)
    scores = model.roi_heads.box_predictor.cls_score
    scores.weight.mul_(20)  # some scores are above the threshold
    if len(scores.bias) == 91:  # no score for the rows without a class, as in trained models
        scores.bias[[row for row in range(1, 91) if row not in COCO_ROWS]] = -1000.0


def set_eps(model, eps):
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps


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


def run(folder, data, *options):
    """Convert ``data``; the path of the result, and what was printed."""
    source, target, printed = folder / "input.pth", folder / "output.pth", io.StringIO()
    torch.save(data, source)
    with contextlib.redirect_stdout(printed):
        cli.main(["convert", "torchdistill", str(source), str(target), *options])
    assert sorted(os.listdir(folder)) == ["input.pth", "output.pth"]
    return target, printed.getvalue()


def printed_config(output):
    """The config of the printed command."""
    command = shlex.split(output.partition("To evaluate it:\n")[2].splitlines()[0])
    assert command[:2] == ["distill-d2", "evaluate"]
    args = argument_parser().parse_args(command[2:])
    assert args.opts[0] == "MODEL.WEIGHTS"
    cfg = student_config(load_config(args.config_file, args.opts))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


class Pair:
    """A detector of torchvision, and the one that the printed command evaluates."""

    def __init__(self, folder, kind, model, data, *options):
        self.kind, self.original = kind, model
        path, self.output = run(folder, data, *options)
        self.converted = build_model(printed_config(self.output)).eval()
        checkpointer = SafeCheckpointer(self.converted)
        assert checkpointer.load(str(path)) == {"__author__": tool.AUTHOR}
        keys = checkpointer.incompatible
        assert not (keys.missing_keys or keys.unexpected_keys or keys.incorrect_shapes)
        self.weights = read_checkpoint(str(path))["model"]
        for file in folder.iterdir():
            file.unlink()  # hundreds of megabytes


@pytest.fixture(scope="module", params=["mask", "keypoint", "student"])
def pair(request, tmp_path_factory):
    """Under different names: bare, with a prefix, and as torchdistill released it."""
    folder, kind = tmp_path_factory.mktemp("pair"), request.param
    torch.manual_seed(1)
    if kind == "student":
        model = torchvision_detector("faster", bottleneck=NaiveBottleneck())
        data = released(old_names(model.state_dict()))
        return Pair(folder, kind, model, data, "--config-file", TEACHERS["faster"])
    model = torchvision_detector(kind, classes=2 if kind == "keypoint" else 91)
    prefix = "module." if kind == "keypoint" else ""
    data = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    return Pair(folder, kind, model, data)


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


# Equality of outputs.


def assert_equal_maps(result, original):
    result, original = list(result), list(original)
    assert len(result) == len(original)
    for a, b in zip(result, original):
        assert a.shape == b.shape and b.std() > 1e-3
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@torch.no_grad()
def test_every_part_gives_the_same_outputs(pair):
    name, result, original = pair.kind, pair.converted, pair.original
    x = torch.randn(2, 3, *SIZE)
    features, expected = result.backbone(x), original.backbone(x)
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    assert_equal_maps(features.values(), expected.values())
    set_eps(original, 1e-5)  # a wrong eps would be seen
    wrong = original.backbone(x)["0"]
    set_eps(original, 0.0)
    assert (wrong - expected["0"]).abs().max() > 1e-2 * expected["0"].abs().max()
    levels = [torch.randn(1, 256, 16, 24), torch.randn(1, 256, 8, 12)]
    for a, b in zip(result.proposal_generator.rpn_head(levels), original.rpn.head(levels)):
        assert_equal_maps(a, b)  # logits, deltas
    rows = [1] if name == "keypoint" else COCO_ROWS
    pooled, result, original = torch.randn(5, 256, 7, 7), result.roi_heads, original.roi_heads
    scores, deltas = original.box_predictor(original.box_head(pooled))
    deltas = deltas.view(5, -1, 4)[:, rows].flatten(1)
    assert_equal_maps(result.box_predictor(result.box_head(pooled)), [scores[:, [*rows, 0]], deltas])
    pooled = torch.randn(2, 256, 14, 14)
    if name == "mask":
        expected = original.mask_predictor(original.mask_head(pooled))[:, COCO_ROWS]
        assert_equal_maps([result.mask_head.layers(pooled)], [expected])
    if name == "keypoint":
        expected = original.keypoint_predictor(original.keypoint_head(pooled))
        assert_equal_maps([result.keypoint_head.layers(pooled)], [expected])


@torch.no_grad()
def test_detections_are_equal(pair):
    """With one exception: torchvision rounds its anchors to whole pixels, here it gets those of detectron2."""
    name, result, original = pair.kind, pair.converted, pair.original
    anchors = result.proposal_generator.anchor_generator
    cells = [cell.clone() for cell in anchors.cell_anchors]
    for cell, rounded in zip(cells, original.rpn.anchor_generator.cell_anchors):
        assert torch.equal(cell.round(), rounded)
    original.rpn.anchor_generator.cell_anchors = cells
    original.roi_heads.detections_per_img = 4
    result.roi_heads.box_predictor.test_topk_per_image = 4

    image = torch.rand(3, 128, 192)
    found_here = result.inference([{"image": image * 255}], do_postprocess=False)[0]
    found = torchvision_detections(original, image)
    assert len(found["boxes"]) == len(found_here) == 4
    assert torch.allclose(found_here.pred_boxes.tensor, found["boxes"], atol=0.01)
    assert torch.allclose(found_here.scores, found["scores"], atol=1e-4)
    rows = [1] if name == "keypoint" else COCO_ROWS
    assert [rows[i] for i in found_here.pred_classes] == found["labels"].tolist()
    if name == "mask":
        assert torch.allclose(found_here.pred_masks, found["masks"], atol=1e-3)
    if name == "keypoint":
        assert torch.allclose(found_here.pred_keypoints[..., :2], found["keypoints"][..., :2], atol=1)


def torchvision_detections(model, image):
    """Of torchvision, on the image as it is, before masks are pasted into it."""
    x = model.transform.normalize(image)[None]
    images = detection.image_list.ImageList(x, [tuple(image.shape[1:])])
    features = model.backbone(x)
    proposals, _ = model.rpn(images, features)
    (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
    return found


@pytest.mark.parametrize("kind", list(TEACHERS))
def test_teachers_run_with_torchvisions_numbers(kind):
    with torch.device("meta"):
        model = torchvision_detector(kind, classes=2 if kind == "keypoint" else 91)
    cfg = load_config(TEACHERS[kind])
    rpn, heads = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    original, roi_heads = model.rpn, model.roi_heads
    for split in ("training", "testing"):
        key = split[:-3].upper()
        assert original._pre_nms_top_n[split] == rpn[f"PRE_NMS_TOPK_{key}"]
        assert original._post_nms_top_n[split] == rpn[f"POST_NMS_TOPK_{key}"]
    for part, node, count in ((original, rpn, 1), (roi_heads, heads, 2)):
        sampler, matcher = part.fg_bg_sampler, part.proposal_matcher
        assert sampler.batch_size_per_image == node.BATCH_SIZE_PER_IMAGE
        assert sampler.positive_fraction == node.POSITIVE_FRACTION
        assert [matcher.low_threshold, matcher.high_threshold] == count * node.IOU_THRESHOLDS
    assert original.nms_thresh == rpn.NMS_THRESH and roi_heads.nms_thresh == heads.NMS_THRESH_TEST
    assert roi_heads.box_coder.weights == cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
    assert roi_heads.score_thresh == heads.SCORE_THRESH_TEST
    assert roi_heads.detections_per_img == cfg.TEST.DETECTIONS_PER_IMAGE

    poolers = {"box": cfg.MODEL.ROI_BOX_HEAD}
    if kind != "faster":
        poolers[kind] = cfg.MODEL["ROI_MASK_HEAD" if kind == "mask" else "ROI_KEYPOINT_HEAD"]
    for name, node in poolers.items():
        pooler = getattr(roi_heads, f"{name}_roi_pool")
        assert pooler.output_size == 2 * (node.POOLER_RESOLUTION,)
        assert pooler.sampling_ratio == node.POOLER_SAMPLING_RATIO == 2
        assert node.POOLER_TYPE == "ROIAlign"
    sizes = [[size] for (size,) in original.anchor_generator.sizes]
    assert sizes == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    transform, node = model.transform, cfg.INPUT
    assert node.MIN_SIZE_TRAIN == transform.min_size and node.MIN_SIZE_TEST == transform.min_size[-1]
    assert (node.MAX_SIZE_TEST, node.FORMAT) == (transform.max_size, "RGB")
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([255 * mean for mean in transform.image_mean])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([255 * std for std in transform.image_std])


# What the file may look like.


def converted(state_dict):
    return tool.convert(tool.state_dict_of({"model": state_dict}), 0.0, coco=True)


def test_all_names_give_the_same(pair, tmp_path):
    for names in (dict, old_names, icpr_names):
        state_dict = names(pair.original.state_dict())
        assert_equal(converted(state_dict).weights, pair.weights)
    if pair.kind != "student":
        return
    # The whole program with the packaged config; what has no counterpart is dropped, and named.
    data = {**state_dict, "backbone.body.fc.bias": torch.zeros(1000)}
    for name in ("1.weight", "2.running_mean", "10.bias"):
        data[f"backbone.body.layer1.encoder.ext_classifier.{name}"] = torch.zeros(64)
    path, output = run(tmp_path, data)
    assert_equal(read_checkpoint(str(path))["model"], pair.weights)
    lines = output.splitlines()
    name = "Distillation-GHND/torchvision_faster_rcnn_R_50_FPN_ghnd.yaml"
    assert shlex.split(lines[-1])[3:] == [name, "MODEL.WEIGHTS", str(path)]
    reason = "the classifier of ImageNet, which a detector does not use"
    assert f"  dropped 1 ({reason}): backbone.body.fc.bias" in lines
    (line,) = [line for line in lines if "neural filter" in line]
    assert line.startswith("  dropped 3 ") and line.endswith("encoder.ext_classifier.10.bias")


@pytest.mark.parametrize("kind", ["faster", "mask"])
@pytest.mark.parametrize("naming", ["released", "torchvision_ge_0_13"])
def test_every_key_of_the_released_checkpoints(shared, kind, naming):
    keys = json.loads((shared / "golden" / "ghnd_keys.json").read_text())["models"][kind]
    state_dict = {key[naming]: torch.zeros(key["shape"]) for key in keys}
    weights = converted(state_dict).weights
    assert set(weights) == {key["detectron2"] for key in keys}
    rows = {91: (80, 81), 364: (320,)}
    for key in keys:
        found, (first, *rest) = weights[key["detectron2"]].shape, key["shape"] or (None,)
        assert list(found[1:]) == rest
        assert not found or found[0] in rows.get(first, (first,))


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_every_depth(depth, bottleneck):
    with torch.device("meta"):  # names and shapes alone
        stage = NaiveBottleneck(ends=(64, 64 if depth < 50 else 256)) if bottleneck else None
        found = converted(torchvision_detector("faster", depth, bottleneck=stage).state_dict())
        cfg, needed = tool.complete_config(TEACHERS["faster"], ["MODEL.DEVICE", "meta"], found.keys)
        expected = build_model(cfg).state_dict()
    assert cfg.MODEL.RESNETS.DEPTH == depth and ("MODEL.RESNETS.DEPTH" in needed) == (depth != 50)
    assert {n: t.shape for n, t in found.weights.items()} == {n: t.shape for n, t in expected.items()}


@torch.no_grad()
def test_student_of_other_widths_and_depth(tmp_path):
    bottleneck = NaiveBottleneck(5, widths=(8, 12, 10, 6, 14), ends=(64, 64))
    model = torchvision_detector("faster", depth=18, classes=4, bottleneck=bottleneck)
    data, options = icpr_names(model.state_dict()), ("--config-file", TEACHERS["faster"])
    pair = Pair(tmp_path, "student", model, data, *options)
    x = torch.randn(1, 3, *SIZE)
    assert_equal_maps(pair.converted.backbone(x).values(), model.backbone(x).values())
    assert "R18-FPN, GHND's student with 5 bottleneck channels" in pair.output
    shapes = {name: len(tensor) for name, tensor in pair.weights.items() if "predictor" in name}
    assert set(shapes.values()) == {4, 12}  # of three classes
    assert "MODEL.ROI_HEADS.NUM_CLASSES 3" in pair.output and "with DATASETS.TEST" in pair.output
    for text in ("CHANNELS 5", "ENCODER_WIDTHS '[8, 12, 10]'", "DECODER_WIDTHS '[6, 14]'"):
        assert f"MODEL.BOTTLENECK.{text}" in pair.output


# Classes.


def class_weights(rows):
    """cls_score's row r is [r], bbox_pred's four are [10 r, ..., 10 r + 3], the masks' are [-r]."""
    score = torch.arange(rows)
    values = {
        "roi_heads.box_predictor.cls_score": score,
        "roi_heads.box_predictor.bbox_pred": (10 * score[:, None] + torch.arange(4)).flatten(),
        "roi_heads.mask_head.predictor": -score,
    }
    biases = {f"{layer}.bias": value for layer, value in values.items()}
    return {**biases, **{f"{layer}.weight": value[:, None] for layer, value in values.items()}}


@pytest.mark.parametrize(
    "rows, coco, expected",
    [(91, True, COCO_ROWS), (91, False, [*range(1, 91)]), (81, True, [*range(1, 81)]), (2, True, [1])],
)
def test_order_of_classes(rows, coco, expected):
    weights = class_weights(rows)
    tool.last_background(weights, coco=coco)
    boxes = [10 * row + side for row in expected for side in range(4)]
    order = {
        "roi_heads.box_predictor.cls_score": [*expected, 0],
        "roi_heads.box_predictor.bbox_pred": boxes,
        "roi_heads.mask_head.predictor": [-row for row in expected],
    }
    for name, tensor in weights.items():
        assert tensor.flatten().tolist() == order[name.rpartition(".")[0]]


def test_cocos_rows_are_detectron2s_classes():
    assert [NAMES[row] for row in COCO_ROWS] == MetadataCatalog.get("coco_2017_val").thing_classes


@pytest.mark.parametrize("options", [[], ["MODEL.ROI_HEADS.NUM_CLASSES", "90"]])
def test_91_rows_of_own_classes(tmp_path, options):
    model = torchvision_detector("faster", depth=18)
    scores = model.state_dict()["roi_heads.box_predictor.cls_score.bias"]
    path, output = run(tmp_path, model.state_dict(), *options)
    result = read_checkpoint(str(path))["model"]["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(
        result, torch.cat([scores[1:], scores[:1]]) if options else scores[[*COCO_ROWS, 0]]
    )
    for text in ("MODEL.ROI_HEADS.NUM_CLASSES 90", "with DATASETS.TEST"):
        assert (text in output) == bool(options)


# Batch norms.


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_other_eps(eps, tmp_path):
    """In detectron2 a variance v acts as v + 1e-5, in the input as v + eps."""
    model = torchvision_detector("faster", depth=18, classes=3, eps=eps)
    pair = Pair(tmp_path, "faster", model, model.state_dict(), "--frozen-bn-eps", str(eps))
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        assert_equal_maps(pair.converted.backbone(x).values(), model.backbone(x).values())
    original = model.state_dict()["backbone.body.bn1.running_var"]
    result = pair.weights["backbone.bottom_up.stem.conv1.norm.running_var"]
    assert torch.equal(result, original) == (eps == 1e-5)


def test_half_precision_keeps_small_variances():
    weights = {"backbone.bottom_up.stem.conv1.norm.running_var": torch.full((2,), 0.5).half()}
    tool.match_eps(weights, 0.0)
    (variance,) = weights.values()
    assert variance.dtype == torch.float32
    assert variance.tolist() == pytest.approx([0.49999] * 2, abs=1e-7)


# Every key is accounted for.


@pytest.fixture(scope="module")
def small():
    """A Faster R-CNN R18-FPN of 6 classes."""
    return torchvision_detector("faster", depth=18, classes=7).state_dict()


def refused(folder, data, capsys, *options):
    """The message with which the conversion of ``data`` stops; an older result stays."""
    source, target = folder / "input.pth", folder / "output.pth"
    if data is not None:
        torch.save(data, source)
    target.write_text("older")
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "torchdistill", str(source), str(target), *options])
    assert target.read_text() == "older"
    assert set(os.listdir(folder)) <= {"input.pth", "output.pth"}
    assert stop.value.code == 2
    return capsys.readouterr().err


NO_DETECTOR = [
    "backbone.body.layer2.0.conv1.weights",
    "backbone.body.layer5.0.conv1.weight",
    "backbone.body.layer1.encoder.encoder.encoder.0.weight",
    "backbone.fpn.extra_blocks.p6.weight",
    "roi_heads.keypoint_head.3.weight",
    "optimizer",
]
DIFFERENT = {
    "backbone.body.layer4.1.conv2.bias": (512,),
    "rpn.head.cls_logits.weight": (5, 256, 1, 1),
}
DIFFERENCES = [
    f"do not fit the detector of '{TEACHERS['faster']}'",
    "1 missing: backbone.fpn_lateral4.bias\n",
    "1 unexpected: backbone.bottom_up.res5.1.conv2.bias\n",
    "1 of another shape: proposal_generator.rpn_head.objectness_logits.weight "
    "(5, 256, 1, 1) instead of (3, 256, 1, 1)",
]
TWICE = "rpn.head.conv.0.0.bias and rpn.head.conv.bias both become proposal_generator"
ENCODER = "backbone.body.layer1.encoder.0.weight"


@pytest.mark.parametrize(
    "remove, add, texts",
    [
        *(
            ("", {name: 1}, ["1 of INPUT's", "keys do not belong to torchvision's", name])
            for name in NO_DETECTOR
        ),
        ("", {"rpn.head.conv.bias": 1}, [TWICE]),
        ("fpn.inner_blocks.2.0.bias", DIFFERENT, DIFFERENCES),
        ("roi_heads", {}, ["no roi_heads.box_predictor.cls_score.weight: it is not a Faster"]),
        ("layer3.1", {}, ["has (2, 1, 2) blocks of 2 convolutions in layer2 to layer4; expected"]),
        (
            "",
            {ENCODER: 1},
            ["not the one of GHND (2020): it lacks backbone.bottom_up.res2.encoder.2.weight"],
        ),
        (
            "",
            {"roi_heads.box_predictor.bbox_pred.bias": 24},
            ["bbox_pred.bias has 24 rows, but cls_score.weight has 7"],
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, capsys, small, remove, add, texts):
    data = {name: tensor for name, tensor in small.items() if not remove or remove not in name}
    data.update({name: torch.zeros(shape) for name, shape in add.items()})
    message = refused(tmp_path, data, capsys)
    assert all(text in message for text in texts), message


def test_second_version_is_refused(tmp_path, capsys):
    with torch.device("meta"):
        model = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    text = "architecture of torchvision's fasterrcnn_resnet50_fpn_v2"
    assert text in refused(tmp_path, {name: torch.zeros(1) for name in model.state_dict()}, capsys)


# Wrong input.


class Evil:
    """Unpickling it creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_the_file_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"model": {"weight": torch.zeros(1)}, "args": argparse.Namespace(a=Evil())}
    message = refused(tmp_path, data, capsys)  # and writes nothing else into the folder
    assert "input.pth': it uses posix.mkdir; only tensors" in message


@pytest.mark.parametrize(
    "data, text",
    [
        ([torch.zeros(1)], "holds a list, not the entries of a checkpoint"),
        ({"model": [torch.zeros(1)]}, "entry 'model' is not a state_dict"),
        ({}, "not a state_dict"),
        ({"model": {"a": 1, 3: torch.zeros(1)}}, "are not named tensors: a, 3"),
    ],
)
def test_not_a_state_dict(tmp_path, capsys, data, text):
    assert text in refused(tmp_path, data, capsys)


@pytest.mark.parametrize(
    "options, text",
    [
        (["MODEL.RESNETS.DEPTH"], "the KEY VALUE pairs are incomplete"),
        (
            ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]"],
            "(3, 256, 1, 1) instead of (1, 256, 1, 1)",
        ),
        (["MODEL.RESNETS.DEPHT", "18"], "the closest are ['MODEL.RESNETS.DEPTH"),
        (["--frozen-bn-eps", "-1"], "--frozen-bn-eps is -1.0; expected 0 or more"),
        (["--frozen-bn-eps", "small"], "invalid float value: 'small'"),
        (["--config-file", "Teachers/none.yaml"], "config 'Teachers/none.yaml' does not exist"),
        (["MODEL.BACKBONE.NAME", "build_nothing"], "builds no model"),
    ],
)
def test_wrong_options(tmp_path, capsys, small, options, text):
    assert text in refused(tmp_path, small, capsys, *options)


def test_wrong_paths(tmp_path, capsys):
    source, link = tmp_path / "input.pth", tmp_path / "link.pth"
    source.write_text("input")
    link.symlink_to(source)
    (tmp_path / "folder.pth").mkdir()
    for target, text in (
        (link, "INPUT and OUTPUT are the same file"),
        (tmp_path / "none" / "output.pth", f"'{tmp_path / 'none'}', does not exist"),
        (tmp_path / "output.pkl", "expected a name that ends with .pth"),
        (tmp_path / "folder.pth", "is a folder; expected the name of a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["convert", "torchdistill", str(source), str(target)])
        assert text in capsys.readouterr().err
    assert source.read_text() == "input"


def test_full_disk_loses_nothing(tmp_path, capsys, small, monkeypatch):
    torch.save(small, tmp_path / "input.pth")

    def disk_full(_data, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(tool.torch, "save", disk_full)
    assert "No space left on device" in refused(tmp_path, None, capsys)
