"""SSD's augmentations, and images of one fixed size."""

import colorsys
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

from distill_d2 import add_distill_config
from distill_d2.data import augmentation, build_mapper
from distill_d2.data.augmentation import (
    BoxAwareMapper,
    CropToCentres,
    Expand,
    ExpandTransform,
    PhotometricDistortion,
    RandomCropByIoU,
)

SEEDS = range(200)


@pytest.fixture(autouse=True)
def _seed():
    seed(0)


def seed(number):
    np.random.seed(number)
    python_random.seed(number)


def noise(height=8, width=10):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Colours


def distorted(image, input_format="BGR"):
    return PhotometricDistortion(input_format).get_transform(image).apply_image(image)


def test_pixels_stay_bytes():
    image, kept = noise(), 0
    for number in range(1000):
        seed(number)
        changed = distorted(image)
        assert changed.dtype == np.uint8 and changed.shape == image.shape
        kept += np.array_equal(changed, image)
    assert np.array_equal(image, noise())
    # None of four changes, and no order of channels but the first of six.
    assert kept / 1000 == pytest.approx(0.5**4 * (0.5 + 0.5 / 6), abs=0.02)


def test_a_transform_changes_all_images_alike_and_nothing_else():
    image = noise()
    seed(2)
    transform = PhotometricDistortion().get_transform(image)
    first = transform.apply_image(image)
    seed(3)
    assert np.array_equal(transform.apply_image(image), first) and not np.array_equal(first, image)
    assert np.array_equal(transform.apply_box(np.array([[1.0, 2, 3, 4]])), [[1, 2, 3, 4]])
    assert np.array_equal(transform.apply_segmentation(image[..., 0]), image[..., 0])


def test_the_same_change_whatever_the_order_of_channels(monkeypatch):
    monkeypatch.setattr(np.random, "permutation", np.arange)
    image = noise()
    for number in range(50):
        seed(number)
        bgr = distorted(image, "BGR")
        seed(number)
        rgb = distorted(image[..., ::-1], "RGB")[..., ::-1]
        assert np.abs(bgr.astype(int) - rgb).max() <= 1


def decided(monkeypatch, coins, numbers):
    """The coins' sides, and the numbers drawn."""
    coins, numbers = iter(coins), iter(numbers)
    monkeypatch.setattr(augmentation, "_coin", lambda: next(coins))
    monkeypatch.setattr(np.random, "uniform", lambda *_: next(numbers))


# Coins: brightness, contrast, contrast first, saturation, hue, order of channels.
def test_brightness_and_contrast(monkeypatch):
    image = noise()
    decided(monkeypatch, [True, True, True, False, False, False], [-20.0, 1.5])
    expected = ((image.astype(float) - 20) * 1.5).round().clip(0, 255)
    assert np.abs(distorted(image) - expected).max() <= 1e-3


def test_contrast_before_or_after_the_others(monkeypatch):
    """After: of pixels that are at most 255."""
    image = np.full((1, 1, 3), 200, dtype=np.uint8)
    image[..., 2] = 100
    found = []
    for first in (True, False):
        decided(monkeypatch, [False, True, first, True, False, False], [0.5, 0.5])
        found.append(distorted(image, "RGB")[0, 0].tolist())
    assert found[0] == found[1] == [100, 100, 75]
    decided(monkeypatch, [True, True, False, True, False, False], [60.0, 0.5, 0.5])
    assert distorted(image, "RGB")[0, 0].tolist() == [128, 128, 104]  # 260 is 255
    decided(monkeypatch, [True, True, True, True, False, False], [60.0, 0.5, 0.5])
    assert distorted(image, "RGB")[0, 0].tolist() == [130, 130, 105]


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
@pytest.mark.parametrize(
    "saturation, hue", [(0.5, 0.0), (1.5, 0.0), (1.0, 18.0), (1.0, -18.0), (1.3, 7.0)]
)
def test_saturation_and_hue(monkeypatch, input_format, saturation, hue):
    decided(monkeypatch, [False, False, True, True, True, False], [saturation, hue])
    image = noise()
    rgb = distorted(image if input_format == "RGB" else image[..., ::-1], input_format)
    rgb = rgb if input_format == "RGB" else rgb[..., ::-1]
    for before, after in zip(image.reshape(-1, 3), rgb.reshape(-1, 3)):
        h, s, v = colorsys.rgb_to_hsv(*(before / 255))
        expected = colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v)
        np.testing.assert_allclose(after / 255, expected, atol=1.1 / 255)


def test_order_of_channels(monkeypatch):
    image = noise()
    decided(monkeypatch, [False, False, True, False, False, True], [])
    monkeypatch.setattr(np.random, "permutation", lambda _: np.array([2, 0, 1]))
    assert np.array_equal(distorted(image), image[..., [2, 0, 1]])


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
    assert transform.apply_coords(np.array([[0.5, 0.5]])).tolist() == [[4.5, 1.5]]


def test_expansions():
    image, kept, ratios = noise(20, 30), 0, []
    for number in SEEDS:
        seed(number)
        transform = Expand(3.0, [9.0, 9, 9]).get_transform(image)
        if isinstance(transform, NoOpTransform):
            kept += 1
            continue
        ratios.append(transform.width / 30)
        assert transform.height == pytest.approx(20 * ratios[-1], abs=2)
        assert 0 <= transform.left <= transform.width - 30
        assert 0 <= transform.top <= transform.height - 20
        canvas = transform.apply_image(image)
        assert (canvas == 9).all(axis=2).sum() >= canvas[..., 0].size - 600
    assert kept / len(SEEDS) == pytest.approx(0.5, abs=0.1)
    assert 1 <= min(ratios) < 1.2 and 2.8 < max(ratios) <= 3.04


# Crops


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def patch_of(crop):
    return crop.x0, crop.y0, crop.x0 + crop.w, crop.y0 + crop.h


BOXES = np.array([[10.0, 20, 150, 110], [120, 60, 190, 115], [5, 5, 15, 15]])


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_limits_of_crops_hold(limit):
    image, crop, lowest = np.zeros((120, 200, 3), np.uint8), RandomCropByIoU(), 1.0
    crop.choices = [limit]
    for number in range(60 if limit < 0.9 else 25):  # those of 0.9 take long to find
        seed(number)
        found = crop.get_transform(image, BOXES)
        assert type(found) is CropToCentres
        x1, y1, x2, y2 = patch = patch_of(found)
        assert 0 <= x1 < x2 <= 200 and 0 <= y1 < y2 <= 120
        # Sides are rounded down to pixels.
        assert x2 - x1 >= 0.3 * 200 - 1 and y2 - y1 >= 0.3 * 120 - 1
        assert 0.5 * (x2 - x1) - 1 <= y2 - y1 <= 2 * (x2 - x1) + 2
        best = max(iou(patch, box) for box in BOXES)
        assert best >= limit
        lowest = min(lowest, best)
        centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in BOXES]
        assert any(x1 < x < x2 and y1 < y < y2 for x, y in centres)
    assert lowest < limit + 0.3  # and no higher one


def test_choices_are_equally_likely():
    crop, image = RandomCropByIoU([0.4]), np.zeros((120, 200, 3), np.uint8)
    assert crop.choices == [None, 0.0, 0.4]
    assert RandomCropByIoU().choices == [None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    found = []
    for number in range(600):
        seed(number)
        found.append(crop.get_transform(image, BOXES))
    whole = [isinstance(transform, NoOpTransform) for transform in found]
    assert np.mean(whole) == pytest.approx(1 / 3, abs=0.06)
    patches = [patch_of(transform) for transform, w in zip(found, whole) if not w]
    low = [max(iou(patch, box) for box in BOXES) < 0.4 for patch in patches]
    assert 0.05 < np.mean(low) < 0.5


def test_sides_of_crops():
    crop, shares = RandomCropByIoU(), []
    crop.choices = [0.0]
    for number in range(300):
        seed(number)
        found = crop.get_transform(np.zeros((200, 200, 3)), np.array([[0.0, 0, 200, 200]]))
        shares.append((found.w / 200, found.h / 200))
    shares = np.array(shares)
    assert (shares.min(axis=0) < 0.36).all() and (shares.max(axis=0) > 0.94).all()


def test_no_objects_no_crop():
    image, crop = noise(), RandomCropByIoU()
    for number in SEEDS:
        seed(number)
        assert isinstance(crop.get_transform(image, np.zeros((0, 4))), NoOpTransform)


def test_a_limit_that_no_crop_has():
    """Another choice is drawn."""
    crop, found = RandomCropByIoU([1.5]), set()
    for number in range(30):
        seed(number)
        found.add(type(crop.get_transform(np.zeros((40, 40, 3)), np.array([[0.0, 0, 30, 30]]))))
    assert found == {NoOpTransform, CropToCentres}


def test_a_tiny_image():
    for number in range(30):
        seed(number)
        RandomCropByIoU().get_transform(np.zeros((1, 2, 3)), np.array([[0.0, 0, 2, 1]]))


def test_crop_by_hand():
    """Of the boxes the last has its centre outside."""
    crop = CropToCentres(10, 20, 30, 40, 100, 100)
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


COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
OBJECTS = [(10, 10, 40, 30), (60, 20, 100, 70), (20, 50, 50, 75)]


@pytest.fixture
def record(tmp_path):
    """A grey image of three objects in one colour each, and a crowd."""
    image = np.full((80, 120, 3), 100, dtype=np.uint8)
    annotations = []
    for index, (box, colour) in enumerate(zip(OBJECTS, COLOURS)):
        x1, y1, x2, y2 = box
        image[y1:y2, x1:x2] = colour
        x1, y1, x2, y2 = map(float, box)  # whole numbers detectron2 would round
        annotations.append(
            {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": index,
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
        )
    crowd = {"bbox": [0, 0, 120, 80], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 9, "iscrowd": 1}
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, image)
    return {
        "file_name": path,
        "height": 80,
        "width": 120,
        "image_id": 1,
        "annotations": [*annotations, {**crowd, "segmentation": [[0, 0, 9, 0, 9, 9]]}],
    }


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("is_train", [False, True])
def test_default_is_detectron2s(record, is_train, masks):
    cfg = config(CROP__ENABLED=True)
    cfg.MODEL.MASK_ON = masks
    ours, theirs = build_mapper(cfg, is_train), DatasetMapper(cfg, is_train)
    assert type(ours) is DatasetMapper and ours.recompute_boxes == theirs.recompute_boxes
    for number in range(5):
        seed(number)
        found = ours(record)
        seed(number)
        expected = theirs(record)
        assert set(found) == set(expected) and torch.equal(found["image"], expected["image"])
        if is_train:
            found, expected = found["instances"], expected["instances"]
            assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)


def test_fixed_size_with_detectron2s_augmentations(record):
    cfg = config(FIXED_SIZE=[50, 90])
    for is_train in (False, True):
        mapper = build_mapper(cfg, is_train)
        assert type(mapper) is DatasetMapper
        found = mapper(record)
        assert found["image"].shape == (3, 50, 90)
        assert (found["height"], found["width"]) == (80, 120)
    boxes = found["instances"].gt_boxes.tensor * torch.tensor([120 / 90, 80 / 50] * 2)
    flipped = torch.tensor([[120 - x2, y1, 120 - x1, y2] for x1, y1, x2, y2 in OBJECTS]).float()
    assert any(torch.allclose(boxes, x, atol=1e-3) for x in (flipped, torch.tensor(OBJECTS).float()))
    kinds = [type(x) for x in build_mapper(config(FIXED_SIZE=[50, 90]), True).augmentations.augs]
    assert kinds == [T.Resize, T.RandomFlip]


def test_fixed_size_keeps_detectron2s_crop(record):
    mapper = build_mapper(config(FIXED_SIZE=[50, 90], CROP__ENABLED=True), True)
    kinds = [type(x) for x in mapper.augmentations.augs]
    assert kinds == [T.RandomCrop, T.Resize, T.RandomFlip]
    assert mapper(record)["image"].shape == (3, 50, 90)
    tested = build_mapper(config(FIXED_SIZE=[50, 90], CROP__ENABLED=True), False)
    assert [type(x) for x in tested.augmentations.augs] == [T.Resize]


@pytest.mark.parametrize("keys", [{}, {"FIXED_SIZE": [50, 90]}, {"AUGMENTATIONS": "ssd"}])
def test_no_flip_if_hflip_train_is_false(keys):
    """AdelaiDet's key."""
    for flips in (True, False):
        cfg = config(HFLIP_TRAIN=flips, **keys)
        kinds = [type(x) for x in _plain(build_mapper(cfg, True))]
        assert (T.RandomFlip in kinds) == flips and len(kinds) > 0
        assert cfg.INPUT.RANDOM_FLIP == "horizontal"  # the config itself stays
        (evaluation,) = _plain(build_mapper(cfg, False))
        assert isinstance(evaluation, (T.Resize, T.ResizeShortestEdge))


def _plain(mapper):
    return mapper.augmentations.augs


def test_ssd_augmentations_of_the_config():
    cfg = config(
        AUGMENTATIONS="ssd",
        FIXED_SIZE=[50, 90],
        FORMAT="RGB",
        SSD__EXPAND_MAX_RATIO=2.0,
        SSD__CROP_MIN_IOUS=[0.2],
    )
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    mapper = build_mapper(cfg, True)
    assert type(mapper) is BoxAwareMapper
    colours, expand, crop, flip, resize = mapper.augmentations.augs
    assert (colours.to_hsv, colours.from_hsv) == (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
    assert (expand.max_ratio, expand.fill, crop.choices) == (2.0, [1.0, 2.0, 3.0], [None, 0.0, 0.2])
    assert type(flip) is T.RandomFlip and resize.shape == (50, 90)
    tested = build_mapper(cfg, False)
    assert type(tested) is DatasetMapper and [type(x) for x in tested.augmentations.augs] == [T.Resize]


def test_ssd_augmentations_and_detectron2s_sizes(record):
    cfg = config(AUGMENTATIONS="ssd")
    for number in range(10):
        seed(number)
        assert min(build_mapper(cfg, True)(record)["image"].shape[1:]) in (48, 64)


@pytest.mark.parametrize("masks", [False, True])
def test_objects_stay_on_their_pixels(record, masks):
    """Through expansion, crop, flip and resizing. The crowd, whose box would always fit, is none."""
    cfg = config(AUGMENTATIONS="ssd", FIXED_SIZE=[300, 300])
    cfg.MODEL.MASK_ON = masks
    mapper = build_mapper(cfg, True)
    mapper.augmentations.augs.pop(0)  # colours stay
    kinds, before = [], repr(record)
    for number in range(60):
        seed(number)
        found = mapper(record)
        image, objects = found["image"].permute(1, 2, 0).numpy(), found["instances"]
        assert image.shape == (300, 300, 3) and objects.image_size == (300, 300)
        assert len(objects) > 0 and objects.gt_classes.max() < 3
        kinds.append(set(objects.gt_classes.tolist()))
        for box, k in zip(objects.gt_boxes.tensor.numpy(), objects.gt_classes):
            coloured = (np.abs(image.astype(int) - COLOURS[k]) < 60).all(axis=2)
            rows, columns = (np.flatnonzero(coloured.any(axis=axis)) for axis in (1, 0))
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box, extent, atol=5)  # an enlarged pixel's blurred border
        if masks:
            polygons = objects.gt_masks.get_bounding_boxes().tensor
            torch.testing.assert_close(polygons, objects.gt_boxes.tensor, rtol=0, atol=1e-2)
    assert {0, 1, 2} in kinds
    assert all(any(k not in kept for kept in kinds) for k in range(3))  # each is cut off at times
    assert repr(record) == before


def test_every_image_has_its_own_boxes(record):
    """Of an image without objects nothing is cut off, whatever came before."""
    cfg = config(AUGMENTATIONS="ssd", FIXED_SIZE=[80, 120], RANDOM_FLIP="none")
    cfg.INPUT.SSD.EXPAND_MAX_RATIO = 1.0
    mapper = build_mapper(cfg, True)
    mapper.augmentations.augs.pop(0)
    empty = {**record, "annotations": []}
    whole = torch.from_numpy(cv2.imread(record["file_name"])).permute(2, 0, 1)
    kept = []
    for number in range(20):
        seed(number)
        kept.append(torch.equal(mapper(record)["image"], whole))
        found = mapper(empty)
        assert torch.equal(found["image"], whole) and len(found["instances"]) == 0
        crowd = {**record, "annotations": record["annotations"][-1:]}
        without = {key: value for key, value in record.items() if key != "annotations"}
        for other in (crowd, without):
            assert torch.equal(mapper(other)["image"], whole)
    assert 0 < sum(kept) < 20


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize(
    "keys, message",
    [
        ({"AUGMENTATIONS": "yolo"}, "INPUT.AUGMENTATIONS is 'yolo'; expected 'default' or 'ssd'"),
        ({"IS_ROTATE": True}, "INPUT.IS_ROTATE is True; images are not rotated here, set it to False"),
        ({"FIXED_SIZE": [300]}, r"INPUT.FIXED_SIZE is \[300\]; expected \[height, width\], or \[\]"),
        ({"FIXED_SIZE": [300, 0]}, r"INPUT.FIXED_SIZE is \[300, 0\]; expected"),
        ({"FIXED_SIZE": [300, 300, 3]}, r"INPUT.FIXED_SIZE is \[300, 300, 3\]; expected"),
    ],
)
def test_wrong_values(keys, message, is_train):
    with pytest.raises(ValueError, match=message):
        build_mapper(config(**keys), is_train)


def test_two_crops():
    cfg = config(AUGMENTATIONS="ssd", CROP__ENABLED=True)
    with pytest.raises(ValueError, match="INPUT.CROP.ENABLED is True, but INPUT.AUGMENTATIONS 'ssd'"):
        build_mapper(cfg, True)
    assert type(build_mapper(cfg, False)) is DatasetMapper


def test_bit_masks_are_refused():
    """What an expansion adds around one would have to be told from what semantic segmentation ignores."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.INPUT.AUGMENTATIONS, cfg.INPUT.MASK_FORMAT, cfg.MODEL.MASK_ON = "ssd", "bitmask", True
    with pytest.raises(ValueError, match="expands polygons but not bit masks; set INPUT.MASK_FORMAT"):
        build_mapper(cfg, True)
