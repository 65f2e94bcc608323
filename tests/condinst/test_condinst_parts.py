"""CondInst's parts: mask branch, mask head, ground truth, and which instances have a loss."""

import json

import naive_condinst as naive
import naive_fcos
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, ROIMasks
from detectron2.structures.masks import polygons_to_bitmask
from distill_d2.projects.condinst.mask_branch import MaskBranch, aligned_bilinear
from distill_d2.projects.condinst.mask_head import DynamicMaskHead
from distill_d2.projects.condinst.selection import best_of_each_object, random_subset
from distill_d2.projects.condinst.truth import mask_truth, semantic_loss

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file

# Names and shapes of the published models

PUBLISHED = {
    "CondInst_MS_R_50_1x": "MS_R_50_1x",
    "CondInst_MS_R_101_3x": "MS_R_101_3x",
    "CondInst_MS_R_101_3x_sem": "MS_R_101_3x_sem",
    "CondInst_MS_R_50_BiFPN_3x_sem": "MS_R_50_BiFPN_3x_sem",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes(shared, name):
    published = json.loads((shared / "golden" / "adet_state_dict_keys.json").read_text())
    assert set(PUBLISHED) == {other for other in published if other.startswith("CondInst")}
    assert published[name]["config"] == f"CondInst/{PUBLISHED[name]}.yaml"
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(published[name]["config"]))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # shapes without weights
        state = build_model(cfg).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == published[name]["state_dict"]


# Upsampling


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_upsampling_by_loops(factor):
    x = torch.randn(2, 3, 4, 5)
    found = aligned_bilinear(x, factor)
    assert found.shape == (2, 3, 4 * factor, 5 * factor)
    assert aligned_bilinear(x[:0], factor).shape == (0, *found.shape[1:])
    for n in range(2):
        for c in range(3):
            expected = naive.upsample(x[n, c].double().numpy(), factor)
            np.testing.assert_allclose(found[n, c], expected, rtol=1e-4, atol=1e-5)


# The mask branch


def levels(channels=4):
    sizes = zip("abc", ((8, 12), (4, 6), (2, 3)))
    return {name: torch.randn(2, channels, *size) for name, size in sizes}


def branch(**options):
    defaults = {"in_features": ["a", "b", "c"], "in_channels": 4, "channels": 6, "num_convs": 2}
    return MaskBranch(**{**defaults, **options})


def test_branch_by_hand():
    model, x = branch(norm="none", out_channels=3), levels()

    def conv(layer, value):
        return F.conv2d(value, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)

    mixed = F.relu(conv(model.refine[0][0], x["a"]))
    for index, name, factor in ((1, "b", 2), (2, "c", 4)):
        level = F.relu(conv(model.refine[index][0], x[name])).detach().double().numpy()
        up = [[naive.upsample(channel, factor) for channel in image] for image in level]
        mixed = mixed + torch.tensor(np.array(up)).float()
    for block in model.tower[:2]:
        mixed = F.relu(conv(block[0], mixed))
    found, semantic = model(x)
    torch.testing.assert_close(found, conv(model.tower[2], mixed), rtol=1e-4, atol=1e-5)
    assert semantic is None and found.shape == (2, 3, 8, 12)


@pytest.mark.parametrize("norm, kind", [("BN", "BatchNorm2d"), ("SyncBN", "SyncBatchNorm"), ("", None)])
def test_norms_of_the_branch(norm, kind):
    model = branch(norm=norm)
    names = set(model.state_dict())
    assert ("refine.0.0.bias" in names) == (kind is None)
    kinds = {type(layer).__name__ for layer in model.modules()}
    assert {name for name in kinds if "Norm" in name} == ({kind} if kind else set())


def test_semantic_segmentation_is_for_training():
    model, x = branch(semantic_classes=5, prior_prob=0.1), levels()
    found = model(x)[1]
    assert found.shape == (2, 5, 8, 12) and model.eval()(x)[1] is None
    assert model.logits.bias.unique().item() == pytest.approx(-2.1972246)
    expected = model.train().logits(model.seg_head(x["a"]))
    torch.testing.assert_close(found, expected)


# The mask head


SIZES = [64, 128, 256]


def head(**options):
    options = {"in_channels": 5, "in_stride": 8, "out_stride": 4, "sizes_of_interest": SIZES, **options}
    return DynamicMaskHead(**options)


def instances(model, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    params = torch.randn(count, model.num_params, generator=g) * 0.5
    return params, torch.rand(count, 2, generator=g) * 50, torch.randint(3, (count,), generator=g)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative_coordinates": False},
        {"channels": 3, "num_layers": 2},
        {"out_stride": 8},
        {"out_stride": 1},
    ],
)
def test_masks_by_loops(options):
    model = head(**options)
    features = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    params, locations, levels = instances(model, 4)
    counts = [1, 0, 3]
    found = model(features, params, locations, levels, counts)
    factor = 8 // options.get("out_stride", 4)
    assert found.shape == (4, 1, 4 * factor, 6 * factor)
    for k, image in enumerate((0, 2, 2, 2)):
        logits = naive.mask_logits(
            *(features[image].double().numpy(), params[k].double().numpy(), locations[k].tolist()),
            *(SIZES[levels[k]], 8, options.get("channels", 8), options.get("num_layers", 3)),
            relative=options.get("relative_coordinates", True),
        )
        np.testing.assert_allclose(found[k, 0], naive.upsample(logits, factor), rtol=1e-4, atol=1e-4)


def test_numbers_per_instance():
    """Those of the paper, section 3.2."""
    assert head(in_channels=8).num_params == 169
    assert head(in_channels=8, relative_coordinates=False).num_params == 153


# Ground truth

SIZE = (32, 48)
POLYGONS = [
    [[4.0, 4.0, 30.0, 4.0, 30.0, 20.0, 4.0, 20.0]],
    [[10.0, 8.0, 20.0, 8.0, 15.0, 18.0]],
    [[33.0, 20.0, 45.0, 20.0, 45.0, 29.0], [2.0, 24.0, 9.0, 24.0, 9.0, 30.0, 2.0, 30.0]],
]


def objects(masks=None, classes=(0, 1, 2), size=(30, 46)):
    boxes = Boxes(torch.rand(len(classes), 4))
    found = Instances(size, gt_boxes=boxes, gt_classes=torch.tensor(classes).long())
    if masks is not None:
        found.gt_masks = masks
    return found


def bits(size=SIZE):
    masks = [polygons_to_bitmask([np.array(p) for p in polygons], *size) for polygons in POLYGONS]
    return torch.from_numpy(np.stack(masks)).bool()


def polygons():
    return PolygonMasks([[np.array(p) for p in each] for each in POLYGONS])


@pytest.mark.parametrize(
    "kind, stride", [("polygon", 1), ("polygon", 4), ("bitmask", 2), ("bitmask", 8)]
)
def test_truth_by_loops(kind, stride):
    masks = polygons() if kind == "polygon" else BitMasks(bits((30, 46)))
    found = mask_truth(objects(masks), SIZE, stride, 8, 3)
    full = bits().numpy()
    if kind == "bitmask":  # the image's own size, and nothing on the padding
        full = np.zeros_like(full)
        full[:, :30, :46] = bits((30, 46)).numpy()
    assert found.masks.dtype == torch.float32
    np.testing.assert_array_equal(found.masks, full[:, stride // 2 :: stride, stride // 2 :: stride])
    np.testing.assert_allclose(found.centers, [naive.center(mask) for mask in full], rtol=1e-5)
    expected = naive.classes(full, [0, 1, 2], 3, 8)
    np.testing.assert_array_equal(found.classes, expected)
    assert set(expected.flatten()) == {0, 1, 2, 3}


def test_an_empty_mask():
    masks = bits()
    masks[0] = False
    found = mask_truth(objects(BitMasks(masks), size=SIZE), SIZE, 4, 8, 3)
    assert found.centers[0].tolist() == [0, 0] and not (found.classes == 0).any()


@pytest.mark.parametrize("masks", [None, PolygonMasks([]), BitMasks(torch.zeros(0, 30, 46))])
def test_no_objects(masks):
    found = mask_truth(objects(masks, classes=()), SIZE, 4, 8, 3)
    assert found.masks.shape == (0, 8, 12) and found.centers.shape == (0, 2)
    assert found.classes.shape == (4, 6) and (found.classes == 3).all()


def test_no_masks_and_masks_of_another_kind():
    assert mask_truth(objects(), SIZE, 4, 8, 3) is None
    masks = ROIMasks(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match="are ROIMasks; CondInst reads PolygonMasks and BitMasks"):
        mask_truth(objects(masks), SIZE, 4, 8, 3)


def test_semantic_loss_by_loops():
    images = (objects(polygons()), objects(classes=()))
    truths = [mask_truth(image, SIZE, 4, 8, 3) for image in images]
    logits = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([truth.classes for truth in truths]).flatten().tolist()
    pixels = logits.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    total = sum(naive_fcos.focal(*pixel, 0.3, 1.5) for pixel in zip(pixels, labels))
    count = sum(label < 3 for label in labels)
    found = semantic_loss(logits, truths, 0.3, 1.5)
    assert count > 5 and found.item() == pytest.approx(total / count, rel=1e-5)


def test_semantic_loss_of_images_without_masks():
    truth, logits = mask_truth(objects(polygons()), SIZE, 4, 8, 3), torch.randn(3, 3, 4, 6)
    found = semantic_loss(logits, [None, truth, None], 0.25, 2.0)
    assert found == semantic_loss(logits[1:2], [truth], 0.25, 2.0)
    logits.requires_grad_()
    nothing = semantic_loss(logits, [None] * 3, 0.25, 2.0)
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().sum() == 0


# Which instances have a loss


def test_random_subset():
    torch.manual_seed(0)
    every = random_subset(5, 5, torch.device("cpu"))
    assert every.tolist() == [0, 1, 2, 3, 4]
    drawn = [random_subset(20, 7, torch.device("cpu")) for _ in range(200)]
    for rows in drawn:
        assert len(rows) == 7 and (rows[1:] > rows[:-1]).all()
    counts = torch.cat(drawn).bincount(minlength=20)
    assert counts.min() > 40 and counts.max() < 100


@pytest.mark.parametrize("per_image", [1, 4, 9, 100])
@pytest.mark.parametrize("seed", range(3))
def test_best_of_each_object(per_image, seed):
    random = np.random.default_rng(seed)
    images = np.sort(random.integers(0, 3, 40))
    images[images == 1] = 2  # an image without any
    kinds, scores = random.integers(0, 5, 40), random.permutation(40) / 40
    found = best_of_each_object(*map(torch.from_numpy, (images, kinds, scores)), per_image)
    assert found.tolist() == naive.best(images.tolist(), kinds.tolist(), scores.tolist(), per_image)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert len(best_of_each_object(nothing, nothing, torch.zeros(0), per_image)) == 0
