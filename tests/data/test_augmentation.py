"""SSD's augmentations, and images of one fixed size."""

import random as python_random

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fvcore.transforms.transform import NoOpTransform
from torchvision.ops import box_iou
from torchvision.transforms import v2

from distill_d2 import add_distill_config
from distill_d2.data import build_mapper
from distill_d2.data.augmentation import (
    BoxAwareMapper,
    CropToCenters,
    Expand,
    ExpandTransform,
    PhotometricDistortion,
    RandomCropByIoU,
)
from distill_d2.random_state import random_state, set_random_state

SEEDS = range(200)


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    python_random.seed(number)


def noise(height=8, width=10):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Colors


def test_distortion_is_torchvisions_of_rgb_whatever_the_order_of_channels():
    image, kept = noise(), 0
    for number in range(300):
        seed(number)
        bgr = PhotometricDistortion("BGR").get_transform(image).apply_image(image)
        seed(number)
        rgb = PhotometricDistortion("RGB").get_transform(image[..., ::-1]).apply_image(image[..., ::-1])
        seed(number)
        original = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
        expected = v2.RandomPhotometricDistort()(original).permute(1, 2, 0)
        assert np.array_equal(rgb, expected) and np.array_equal(bgr, rgb[..., ::-1])
        assert bgr.dtype == np.uint8 and bgr.shape == image.shape
        kept += np.array_equal(bgr, image)
    assert np.array_equal(image, noise())
    # None of four changes, and no order of channels but the first of six.
    assert kept / 300 == pytest.approx(0.5**4 * (0.5 + 0.5 / 6), abs=0.03)


# Expansion


def test_expansion_by_hand():
    image, transform = noise(2, 3), ExpandTransform(4, 1, 5, 8, [1.0, 2.4, 3.6])
    canvas = transform.apply_image(image)
    assert canvas.shape == (5, 8, 3) and canvas.dtype == np.uint8
    assert np.array_equal(canvas[1:3, 4:7], image)
    canvas[1:3, 4:7] = [1, 2, 4]
    assert np.array_equal(canvas, np.broadcast_to(np.array([1, 2, 4], np.uint8), (5, 8, 3)))
    labels = transform.apply_segmentation(np.full((2, 3), 7, np.uint8))
    assert (labels[1:3, 4:7] == 7).all() and (labels == 255).sum() == 40 - 6
    boxes = transform.apply_box(np.array([[0.0, 0, 3, 2], [1, 1, 2, 2]]))
    assert boxes.tolist() == [[4, 1, 7, 3], [5, 2, 6, 3]]
    (polygon,) = transform.apply_polygons([np.array([[0.0, 0], [3, 0], [3, 2]])])
    assert polygon.tolist() == [[4, 1], [7, 1], [7, 3]]


def test_expansions():
    image, ratios = noise(20, 30), []
    for number in SEEDS:
        seed(number)
        transform = Expand(3.0, [9.0, 9, 9]).get_transform(image)
        if isinstance(transform, NoOpTransform):
            continue
        ratios.append(transform.width / 30)
        assert transform.height == pytest.approx(20 * ratios[-1], abs=2)
        assert 0 <= transform.left <= transform.width - 30
        assert 0 <= transform.top <= transform.height - 20
        canvas = transform.apply_image(image)
        assert (canvas == 9).all(axis=2).sum() >= canvas[..., 0].size - 600
    assert len(ratios) / len(SEEDS) == pytest.approx(0.5, abs=0.1)
    assert 1 <= min(ratios) < 1.2 and 2.8 < max(ratios) <= 3.04


# Crops


def ious(crop, boxes):
    patch = torch.tensor([[crop.x0, crop.y0, crop.x0 + crop.w, crop.y0 + crop.h]])
    return box_iou(patch, torch.tensor(boxes)).flatten()


BOXES = np.array([[10.0, 20, 150, 110], [120, 60, 190, 115], [5, 5, 15, 15]])


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7])
def test_crops_keep_a_limit(limit):
    """Of the whole image, or with an object whose center is inside and whose IoU is at least the limit."""
    image, lowest, whole, shares = np.zeros((120, 200, 3), np.uint8), 1.0, 0, []
    crop = RandomCropByIoU([limit] if limit else [])
    for number in range(150):
        seed(number)
        found = crop.get_transform(image, BOXES)
        if isinstance(found, NoOpTransform):
            whole += 1
            continue
        shares.append((found.w / 200, found.h / 120))
        assert 0 <= found.x0 <= 200 - found.w and 0 <= found.y0 <= 120 - found.h
        assert found.w > 0 and 0.5 * found.w <= found.h <= 2 * found.w
        inside = found.apply_box(BOXES).any(axis=1)  # by test_crop_by_hand
        lowest = min(lowest, ious(found, BOXES[inside]).max())
    assert np.min(shares) >= 0.29 and np.max(shares) > 0.9  # sides are rounded down to pixels
    # The choices are the whole image, any patch, and the limit; all are equally likely.
    assert whole / 150 == pytest.approx(1 / 3 if limit else 1 / 2, abs=0.12)
    crop.crop.options = [limit]
    for number in range(40):
        seed(number)
        found = crop.get_transform(image, BOXES)
        assert type(found) is CropToCenters and ious(found, BOXES).max() >= limit
    assert lowest < 0.3


@pytest.mark.parametrize("size, boxes", [((8, 10), []), ((3, 40), [[0.0, 0, 2, 1]])])
def test_no_crop_without_objects_or_of_a_tiny_image(size, boxes):
    for number in range(50):
        seed(number)
        found = RandomCropByIoU().get_transform(noise(*size), np.array(boxes).reshape(-1, 4))
        assert isinstance(found, NoOpTransform)


def test_crop_by_hand():
    """Of the boxes the last has its center outside."""
    crop = CropToCenters(10, 20, 30, 40, 100, 100)
    boxes = np.array([[12.0, 22, 20, 30], [0, 0, 50, 90], [35, 50, 44, 69], [35, 50, 45, 60]])
    found = crop.apply_box(boxes)
    assert found.tolist() == [[2, 2, 10, 10], [0, 0, 30, 40], [25, 30, 30, 40], [0, 0, 0, 0]]
    # On the border is outside.
    assert not crop.apply_box(np.array([[5.0, 30, 15, 40]])).any()
    assert crop.apply_box(np.zeros((0, 4))).shape == (0, 4)
    image = noise(100, 100)
    assert np.array_equal(crop.apply_image(image), image[20:60, 10:40])


# The mapper


def config(**keys):
    """Keys are paths below INPUT with "__" for a dot."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64)
    cfg.INPUT.MIN_SIZE_TEST = 64
    for key, value in keys.items():
        cfg.merge_from_list([f"INPUT.{key.replace('__', '.')}", value])
    return cfg


COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
OBJECTS = [(10, 10, 40, 30), (60, 20, 100, 70), (20, 50, 50, 75)]


@pytest.fixture
def record(tmp_path):
    """A gray image of three objects in one color each, and a crowd."""
    image, path = np.full((80, 120, 3), 100, dtype=np.uint8), str(tmp_path / "image.png")
    objects = []
    for index, (x1, y1, x2, y2) in enumerate([*OBJECTS, (0, 0, 120, 80)]):
        if index < len(OBJECTS):
            image[y1:y2, x1:x2] = COLORS[index]
        x1, y1, x2, y2 = map(float, (x1, y1, x2, y2))  # whole numbers detectron2 would round
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "bbox_mode": BoxMode.XYWH_ABS, "category_id": index}
        objects.append({**box, "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]})
    objects[-1]["iscrowd"] = 1
    cv2.imwrite(path, image)
    return {"file_name": path, "height": 80, "width": 120, "image_id": 1, "annotations": objects}


def kinds(mapper):
    return [type(augmentation) for augmentation in mapper.augmentations.augs]


@pytest.mark.parametrize("is_train", [False, True])
def test_default_is_detectron2s(is_train):
    cfg = config(CROP__ENABLED=True)
    cfg.MODEL.MASK_ON = True
    mapper, expected = build_mapper(cfg, is_train), DatasetMapper(cfg, is_train)
    assert type(mapper) is DatasetMapper and repr(mapper.augmentations) == repr(expected.augmentations)
    assert mapper.recompute_boxes == expected.recompute_boxes


def test_fixed_size_with_detectron2s_augmentations(record):
    for is_train in (False, True):
        mapper = build_mapper(config(FIXED_SIZE=[50, 90]), is_train)
        assert type(mapper) is DatasetMapper
        found = mapper(record)
        assert found["image"].shape == (3, 50, 90)
        assert (found["height"], found["width"]) == (80, 120)
    boxes = found["instances"].gt_boxes.tensor * torch.tensor([120 / 90, 80 / 50] * 2)
    flipped = torch.tensor([[120 - x2, y1, 120 - x1, y2] for x1, y1, x2, y2 in OBJECTS]).float()
    assert any(torch.allclose(boxes, x, atol=1e-3) for x in (flipped, torch.tensor(OBJECTS).float()))
    cfg = config(FIXED_SIZE=[50, 90], CROP__ENABLED=True)
    assert kinds(build_mapper(cfg, True)) == [T.RandomCrop, T.Resize, T.RandomFlip]
    assert kinds(build_mapper(cfg, False)) == [T.Resize]


@pytest.mark.parametrize("keys", [{}, {"FIXED_SIZE": [50, 90]}, {"AUGMENTATIONS": "ssd"}])
def test_no_flip_if_hflip_train_is_false(keys):
    """AdelaiDet's key."""
    for flips in (True, False):
        cfg = config(HFLIP_TRAIN=flips, **keys)
        found = kinds(build_mapper(cfg, True))
        assert (T.RandomFlip in found) == flips and len(found) > 0
        assert cfg.INPUT.RANDOM_FLIP == "horizontal"  # the config itself stays
        (evaluation,) = kinds(build_mapper(cfg, False))
        assert evaluation in (T.Resize, T.ResizeShortestEdge)


def test_ssd_augmentations_of_the_config():
    keys = {"SSD__EXPAND_MAX_RATIO": 2.0, "SSD__CROP_MIN_IOUS": [0.2]}
    cfg = config(AUGMENTATIONS="ssd", FIXED_SIZE=[50, 90], FORMAT="RGB", **keys)
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    mapper = build_mapper(cfg, True)
    assert type(mapper) is BoxAwareMapper
    colors, expand, crop, flip, resize = mapper.augmentations.augs
    assert colors.step == 1  # of RGB
    assert (expand.zoom_out.side_range, expand.fill) == ((1.0, 2.0), [1.0, 2.0, 3.0])
    assert crop.crop.options == [0.0, 0.2, 1.0]
    assert RandomCropByIoU().crop.options == [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert type(flip) is T.RandomFlip and resize.shape == (50, 90)
    tested = build_mapper(cfg, False)
    assert type(tested) is DatasetMapper and kinds(tested) == [T.Resize]


@pytest.mark.parametrize("masks", [False, True])
def test_objects_stay_on_their_pixels(record, masks):
    """Through expansion, crop, flip and resizing. The crowd, whose box would always fit, is none."""
    cfg = config(AUGMENTATIONS="ssd", FIXED_SIZE=[300, 300])
    cfg.MODEL.MASK_ON = masks
    mapper = build_mapper(cfg, True)
    mapper.augmentations.augs.pop(0)  # colors stay
    classes, before = [], repr(record)
    for number in range(60):
        seed(number)
        found = mapper(record)
        image, objects = found["image"].permute(1, 2, 0).numpy(), found["instances"]
        assert image.shape == (300, 300, 3) and objects.image_size == (300, 300)
        assert len(objects) > 0 and objects.gt_classes.max() < 3
        classes.append(set(objects.gt_classes.tolist()))
        for box, k in zip(objects.gt_boxes.tensor.numpy(), objects.gt_classes):
            colored = (np.abs(image.astype(int) - COLORS[k]) < 60).all(axis=2)
            rows, columns = (np.flatnonzero(colored.any(axis=axis)) for axis in (1, 0))
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box, extent, atol=5)  # an enlarged pixel's blurred border
        if masks:
            polygons = objects.gt_masks.get_bounding_boxes().tensor
            torch.testing.assert_close(polygons, objects.gt_boxes.tensor, rtol=0, atol=1e-2)
    assert {0, 1, 2} in classes
    assert all(any(k not in kept for kept in classes) for k in range(3))  # each is cut off at times
    assert repr(record) == before


def test_every_image_has_its_own_boxes(record):
    """Of an image without objects nothing is cut off, whatever came before."""
    cfg = config(AUGMENTATIONS="ssd", FIXED_SIZE=[80, 120], RANDOM_FLIP="none")
    cfg.INPUT.SSD.EXPAND_MAX_RATIO = 1.0
    mapper = build_mapper(cfg, True)
    mapper.augmentations.augs.pop(0)
    crowd = {**record, "annotations": record["annotations"][-1:]}
    without = {key: value for key, value in record.items() if key != "annotations"}
    whole = torch.from_numpy(cv2.imread(record["file_name"])).permute(2, 0, 1)
    kept = []
    for number in range(20):
        seed(number)
        kept.append(torch.equal(mapper(record)["image"], whole))
        for other in ({**record, "annotations": []}, crowd, without):
            assert torch.equal(mapper(other)["image"], whole)
    assert 0 < sum(kept) < 20


SSD = {"AUGMENTATIONS": "ssd"}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"AUGMENTATIONS": "yolo"}, "INPUT.AUGMENTATIONS is 'yolo'; expected 'default' or 'ssd'"),
        ({"IS_ROTATE": True}, "INPUT.IS_ROTATE is True; images are not rotated here, set it to False"),
        ({"FIXED_SIZE": [300]}, r"INPUT.FIXED_SIZE is \[300\]; expected \[height, width\], or \[\]"),
        ({"FIXED_SIZE": [300, 0]}, r"INPUT.FIXED_SIZE is \[300, 0\]; expected"),
        ({**SSD, "CROP__ENABLED": True}, "CROP.ENABLED is True, but INPUT.AUGMENTATIONS 'ssd'"),
        # What an expansion adds around a bit mask looks as what semantic segmentation ignores.
        ({**SSD, "MASK_FORMAT": "bitmask"}, "expands polygons but not bit masks; set INPUT.MASK_FORMAT"),
        ({**SSD, "FORMAT": "L"}, "INPUT.FORMAT is 'L'; .* needs 'BGR' or 'RGB'"),
        (
            {**SSD, "SSD__EXPAND_MAX_RATIO": 0.5},
            "INPUT.SSD.EXPAND_MAX_RATIO is 0.5; expected at least 1",
        ),
    ],
)
def test_wrong_values(keys, message):
    """Those of 'ssd' do not matter in evaluation."""
    cfg = config(**keys)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=message):
        build_mapper(cfg, True)
    if "ssd" in keys.values():
        assert type(build_mapper(cfg, False)) is DatasetMapper
    else:
        with pytest.raises(ValueError, match=message):
            build_mapper(cfg, False)


def test_random_numbers_continue_from_a_checkpoints_state(record):
    mapper = build_mapper(config(AUGMENTATIONS="ssd"), True)
    state = random_state()
    first = [mapper(record)["image"] for _ in range(3)]
    assert not torch.equal(first[0], first[1])
    set_random_state(state)
    assert all(torch.equal(mapper(record)["image"], image) for image in first)
