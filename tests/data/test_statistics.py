"""Frequencies and sizes of a dataset's classes."""

import itertools

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from small_datasets import write_voc

from distill_d2.data import box_statistics, register_custom_datasets

_numbers = itertools.count()


def item(label, box, mode=BoxMode.XYXY_ABS, **more):
    return {"category_id": label, "bbox": box, "bbox_mode": mode, **more}


def image(width, height, *items):
    return {"file_name": "x.jpg", "width": width, "height": height, "annotations": list(items)}


def register(dicts, classes=("cat", "dog", "bird")):
    """The name of a new dataset."""
    name = f"statistics_{next(_numbers)}"
    DatasetCatalog.register(name, lambda: dicts)
    if classes is not None:
        MetadataCatalog.get(name).thing_classes = list(classes)
    return name


DICTS = [
    image(100, 50, item(0, [0, 0, 20, 10]), item(0, [10, 10, 50, 40]), item(2, [0, 0, 100, 50])),
    image(10, 20, item(2, [5, 10, 5, 10], BoxMode.XYWH_ABS)),
]


# The numbers


def test_by_hand():
    found = box_statistics([register(DICTS)])
    assert found.counts.dtype == np.int64 and found.mean.dtype == found.std.dtype == np.float64
    assert found.counts.tolist() == [2, 0, 2]
    # cat: 0.2 x 0.2 and 0.4 x 0.6; bird: 1 x 1 and 0.5 x 0.5; no dog: all four.
    np.testing.assert_allclose(found.mean, [[0.3, 0.4], [0.525, 0.575], [0.75, 0.75]], rtol=1e-12)
    all_std = [np.sqrt(0.086875), np.sqrt(0.081875)]
    np.testing.assert_allclose(found.std, [[0.1, 0.2], all_std, [0.25, 0.25]], rtol=1e-12)


def naive(dicts, classes):
    """One box after the other, and numpy's own mean and std."""
    sizes = [[] for _ in range(classes)]
    for record in dicts:
        for entry in record.get("annotations", []):
            x1, y1, x2, y2 = entry["bbox"]
            if entry["bbox_mode"] == BoxMode.XYWH_ABS:
                x2, y2 = x1 + x2, y1 + y2
            w = min(max(x2, 0), record["width"]) - min(max(x1, 0), record["width"])
            h = min(max(y2, 0), record["height"]) - min(max(y1, 0), record["height"])
            if not entry.get("iscrowd") and w > 0 and h > 0:
                sizes[entry["category_id"]].append((w / record["width"], h / record["height"]))
    everything = sum(sizes, [])
    filled = [of_class or everything for of_class in sizes]
    counts = [len(of_class) for of_class in sizes]
    return counts, [np.mean(part, axis=0) for part in filled], [np.std(part, axis=0) for part in filled]


def random_dicts(seed, images=60, classes=5):
    random = np.random.RandomState(seed)
    dicts = []
    for _ in range(images):
        width, height = (int(side) for side in random.randint(20, 200, 2))
        items = []
        for _ in range(random.randint(0, 8)):
            corner, size = random.uniform(-30, 180, 2), random.uniform(-5, 90, 2)
            mode = [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS][random.randint(2)]
            end = corner + size if mode == BoxMode.XYXY_ABS else size
            crowd = int(random.rand() < 0.1)
            items.append(item(int(random.randint(classes)), [*corner, *end], mode, iscrowd=crowd))
        dicts.append(image(width, height, *items))
    dicts[3].pop("annotations")
    return dicts


@pytest.mark.parametrize("seed", [0, 1])
def test_random_boxes_against_a_loop(seed):
    dicts = random_dicts(seed)
    found = box_statistics([register(dicts, "abcdefg")])
    counts, mean, std = naive(dicts, 7)
    assert found.counts.tolist() == counts and counts[5:] == [0, 0] and min(counts[:5]) > 5
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.std, std, rtol=1e-8)


@pytest.mark.parametrize(
    "mode, box, size",
    [
        (int(BoxMode.XYWH_ABS), np.array([10, 20, 50, 40]), [0.5, 0.5]),
        (BoxMode.XYWHA_ABS, [50, 40, 20, 40, 90], [0.4, 0.25]),  # rotated: what encloses it
        (BoxMode.XYXY_ABS, [-10, 60, 40, 100], [0.4, 0.25]),  # clipped
        (BoxMode.XYWH_ABS, [90, -20, 40, 40], [0.1, 0.25]),
    ],
)
def test_modes_and_clipping(mode, box, size):
    found = box_statistics([register([image(100, 80, item(1, box, mode))])])
    np.testing.assert_allclose(found.mean[1], size, rtol=1e-12)
    np.testing.assert_allclose(found.std, 0, atol=1e-7)


@pytest.mark.parametrize(
    "left_out",
    [
        image(100, 80, item(0, [0, 0, 90, 70], iscrowd=1)),
        image(100, 80, item(0, [30, 10, 20, 20])),  # corners the wrong way round
        image(100, 80, item(0, [10, 10, 0, 5], BoxMode.XYWH_ABS)),
        image(100, 80, item(0, [10, -20, 20, 0])),
        image(100, 80, item(0, [float("nan"), 0, 10, 10])),
        {"file_name": "x.jpg", "width": 100, "height": 80},
    ],
)
def test_what_is_left_out(left_out):
    kept = image(100, 80, item(1, [0, 0, 50, 20]))
    found = box_statistics([register([left_out, kept])])
    assert found.counts.tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.mean, [[0.5, 0.25]] * 3)
    with pytest.raises(ValueError, match="no instances"):
        box_statistics([register([left_out])])


def test_instances_that_are_all_alike():
    """Rounding leaves their variance a little below 0, or above."""
    dicts = [[image(100, 100, *[item(0, [0, 0, w, w])] * n)] for w in range(1, 101) for n in (1, 3, 7)]
    names = [register(part) for part in dicts]
    std = np.stack([box_statistics([name]).std for name in names])
    assert (std >= 0).all() and std.max() < 1e-7


def test_more_classes_than_the_metadata_or_none_there():
    dicts = [image(10, 10, item(4, [0, 0, 5, 5]))]
    for classes in (["cat"], None):
        assert box_statistics([register(dicts, classes)]).counts.tolist() == [0, 0, 0, 0, 1]


def test_datasets_together_are_one_dataset_of_all_images():
    parts = [random_dicts(seed, classes=3) for seed in (2, 3)]
    names = [register(parts[0], "abc"), register(parts[1], "abcd")]
    together, apart = box_statistics([register(sum(parts, []), "abcd")]), box_statistics(names)
    assert apart.counts.tolist() == together.counts.tolist() and len(apart.counts) == 4
    np.testing.assert_allclose(apart.mean, together.mean, rtol=1e-12)
    np.testing.assert_allclose(apart.std, together.std, rtol=1e-10)
    twice = box_statistics([names[0]] * 2)
    assert twice.counts.tolist() == (2 * box_statistics(names[:1]).counts).tolist()


# Errors


def test_no_instances_names_the_datasets():
    names = [register([]), register([image(9, 9)])]
    with pytest.raises(ValueError, match=f"{names[0]}.*{names[1]}"):
        box_statistics(names)
    with pytest.raises(KeyError, match="no_such_dataset"):
        box_statistics(["no_such_dataset"])


@pytest.mark.parametrize(
    "record, text",
    [
        ({"annotations": [item(0, [0, 0, 1, 1])]}, "width"),
        (image(9, 9, {"category_id": 0, "bbox": [0, 0, 1, 1]}), "bbox_mode"),
        (image(9, 9, item(0, [0, 0, 1, 1]), item(0, [0, 0, 1])), "shape"),
        (image(9, 9, item(-1, [0, 0, 1, 1])), "negative"),
        (image(9, 9, item(0, [0, 0, 1, 1], BoxMode.XYXY_REL)), "Relative"),
    ],
)
def test_annotations_that_cannot_be_used(record, text):
    name = register([record])
    with pytest.raises(ValueError, match=f"dataset '{name}' cannot be used.*{text}"):
        box_statistics([name])


# Real layouts


def test_a_folder_that_cannot_be_written_to(tmp_path):
    """Nothing is written beside the annotations."""
    write_voc(tmp_path, {"1": [("dog", 1, 1, 30, 10)], "2": [("dog", 1, 1, 60, 40)], "3": []})
    entry = {"NAME": f"statistics_voc_{next(_numbers)}", "FORMAT": "voc", "ROOT": str(tmp_path)}
    register_custom_datasets([{**entry, "SPLIT": "train", "CLASSES": ["cat", "dog"]}])
    before = sorted(tmp_path.rglob("*"))
    found = box_statistics([entry["NAME"]])
    assert found.counts.tolist() == [0, 2] and sorted(tmp_path.rglob("*")) == before
    np.testing.assert_allclose(found.mean, [[0.75, 0.625]] * 2)  # 0.5 x 0.25 and 1 x 1
    np.testing.assert_allclose(found.std, [[0.25, 0.375]] * 2)
