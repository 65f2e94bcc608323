"""The mapper of a training is tried on its data before the first step."""

import itertools
import json

import pytest
import torch
from detectron2.structures import Instances

from distill_d2.data import DATASET_MAPPER_REGISTRY, check_datasets, register_custom_datasets
from distill_d2.data.sample import record_kind, varied_sample
from distill_d2.testing.tiny import distiller_config, tiny_config, use_dataset, write_dataset

_NUMBERS = itertools.count()
POINTS = {"MODEL.KEYPOINT_ON": True}
RLE = {"size": [48, 64], "counts": [0, 300, 48 * 64 - 300]}
OUTPUTS = {}


@DATASET_MAPPER_REGISTRY.register()
def mapper_of_test(cfg, is_train):
    """A user's, whose output is OUTPUTS["now"], or that raises it."""

    def mapper(record):
        record.clear()  # it may change what it is given
        if isinstance(OUTPUTS["now"], Exception):
            raise OUTPUTS["now"]
        return OUTPUTS["now"]

    return mapper


def config(folder, family, change, keys):
    entry = {**write_dataset(folder / "data"), "NAME": f"mapper_{next(_NUMBERS)}"}
    entry.update({"FLIPS": []} if change is some_keypoints else {})
    content = json.loads((folder / "data" / "annotations.json").read_text())
    change(content["annotations"], content["categories"])
    (folder / "data" / "annotations.json").write_text(json.dumps(content))
    register_custom_datasets([entry])
    cfg = tiny_config(family)
    use_dataset(cfg, entry)
    cfg.merge_from_list([word for pair in keys.items() for word in pair])
    return cfg


def no_change(items, categories):
    pass


def no_masks(items, categories):
    for item in items:
        item["segmentation"] = []


def one_without_mask(items, categories):
    items[3]["segmentation"] = []


def one_rle(items, categories):
    items[-1]["segmentation"] = RLE


def one_wrong_rle(items, categories):
    items[-1]["segmentation"] = {**RLE, "size": [64, 48]}


def some_keypoints(items, categories):
    for category in categories:
        category.update(keypoints=[f"point{number}" for number in range(17)], skeleton=[])
    for item in items[1:]:
        item.update(keypoints=[9, 9, 2] * 17, num_keypoints=17)


def crowd_without_mask(items, categories):
    items[2].update(iscrowd=1, segmentation=RLE)


USER = {"INPUT.MAPPER": "mapper_of_test"}
IMAGE = torch.zeros(3, 8, 8)
OF_CLASS_3 = Instances((8, 8), gt_boxes=[0], gt_classes=torch.tensor([3]))


@pytest.mark.parametrize(
    "family, change, keys, words",
    [
        ("mask", no_masks, {}, ["has no masks", "12 of 12 objects", "MODEL.MASK_ON"]),
        ("mask", one_without_mask, {}, ["images/1.png", "1 of 12 objects", "no segmentation"]),
        ("mask", one_rle, {}, ["images/5.png", "1 masks in RLE", "INPUT.MASK_FORMAT to 'bitmask'"]),
        ("mask", one_wrong_rle, {"INPUT.MASK_FORMAT": "bitmask"}, ["size [64, 48]", "[48, 64]"]),
        ("faster", some_keypoints, POINTS, ["has no keypoints", "1 of 12 objects", "MODEL.KEYPOINT_ON"]),
        ("retinanet", no_change, {"INPUT.FORMAT": "L"}, ["1 channels", "PIXEL_MEAN has 3", "INPUT.FORMAT"]),
    ],
)  # fmt: skip
def test_what_the_data_lack_is_told_with_the_key_that_helps(tmp_path, family, change, keys, words):
    with pytest.raises(ValueError) as caught:
        check_datasets(config(tmp_path, family, change, keys))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "family, change, keys",
    [
        ("mask", one_rle, {"INPUT.MASK_FORMAT": "bitmask"}),
        ("mask", crowd_without_mask, {}),
        ("retinanet", no_masks, {}),
        ("retinanet", one_rle, {}),
        ("mask", no_masks, {"DATASETS.CHECK": "none"}),
        ("mask", no_masks, {"DATASETS.CHECK_IMAGES": 0}),
    ],
)
def test_usable_data_pass(tmp_path, family, change, keys):
    check_datasets(config(tmp_path, family, change, keys))


@pytest.mark.parametrize("name", ["CondInst", "SOLOv2"])
def test_projects_of_masks_say_so(tmp_path, name):
    cfg = config(
        tmp_path, "retinanet", no_masks, {"MODEL.META_ARCHITECTURE": name, "MODEL.MASK_ON": True}
    )
    cfg.merge_from_list(["MODEL.FCOS.NUM_CLASSES", 3, "MODEL.SOLOV2.NUM_CLASSES", 3])
    with pytest.raises(ValueError, match="has no masks"):
        check_datasets(cfg)
    cfg = distiller_config(cfg, "teacher.yaml")
    cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0.0, False
    check_datasets(cfg)  # no ground truth is needed


@pytest.mark.parametrize(
    "output, words",
    [
        (OSError("mine"), ["OSError: mine", "0.png"]),
        (None, ["returns None for all of 6 images"]),
        ({"image": IMAGE[0]}, ["no 'image'"]),
        ({"image": IMAGE}, ["no 'instances'"]),
        ({"image": IMAGE, "instances": Instances((8, 8), gt_classes=torch.zeros(2))}, ["gt_boxes"]),
        ({"image": IMAGE, "instances": OF_CLASS_3}, ["[3]", "3 classes"]),
    ],
)  # fmt: skip
def test_a_users_mapper(tmp_path, output, words):
    OUTPUTS["now"] = output
    with pytest.raises(ValueError) as caught:
        check_datasets(config(tmp_path, "retinanet", no_change, USER))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_sample_has_all_kinds_of_records():
    def record(name, *items):
        return {"file_name": name, "annotations": list(items)}

    polygon, rle = {"segmentation": [[0, 0, 1, 1, 2, 0]]}, {"segmentation": RLE}
    rare = [
        record("a.jpg", rle), record("b.png", polygon), record("c.jpg"),
        record("d.jpg", {**polygon, "iscrowd": 1}),
        record("e.jpg", polygon, {}), record("f.jpg", {**polygon, "keypoints": [1, 1, 2]}),
    ]  # fmt: skip
    records = [record(f"{number}.jpg", polygon) for number in range(300)]
    records[100:100] = rare
    sample = varied_sample(records, 20)
    assert len(sample) == 20 and all(each in sample for each in [*rare, records[0]])
    assert len(set(map(record_kind, sample))) == 7
    assert varied_sample(records[:5], 20) == records[:5]
