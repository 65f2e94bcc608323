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
        {"file_name": "x.jpg", "width": 100, "height": 80},  # no annotations
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
    std = np.stack([box_statistics([register(part)]).std for part in dicts])
    assert (std >= 0).all() and std.max() < 1e-7


def test_several_datasets():
    """They are one dataset of all images, with as many classes as the largest has, by metadata or boxes."""
    more = [image(40, 30, item(4, [10, 0, 30, 30]), item(0, [0, 0, 10, 3]))]
    names = [register(DICTS), register(more, ["cat"]), register(DICTS, None)]
    together, apart = box_statistics([register(DICTS + more + DICTS)]), box_statistics(names)
    assert apart.counts.tolist() == together.counts.tolist() == [5, 0, 4, 0, 1]
    np.testing.assert_allclose(apart.mean, together.mean, rtol=1e-12)
    np.testing.assert_allclose(apart.std, together.std, rtol=1e-10)
    assert apart.mean[4].tolist() == [0.5, 1.0]  # of one instance
    assert box_statistics([names[0]] * 2).counts.tolist() == [4, 0, 4]


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


def test_a_folder_of_images_in_voc_layout(tmp_path):
    """Nothing is written beside the annotations: they may be in a folder that cannot be written to."""
    write_voc(tmp_path, {"1": [("dog", 1, 1, 30, 10)], "2": [("dog", 1, 1, 60, 40)], "3": []})
    entry = {"NAME": f"statistics_voc_{next(_numbers)}", "FORMAT": "voc", "ROOT": str(tmp_path)}
    register_custom_datasets([{**entry, "SPLIT": "train", "CLASSES": ["cat", "dog"]}])
    before = sorted(tmp_path.rglob("*"))
    found = box_statistics([entry["NAME"]])
    assert found.counts.tolist() == [0, 2] and sorted(tmp_path.rglob("*")) == before
    np.testing.assert_allclose(found.mean, [[0.75, 0.625]] * 2)  # 0.5 x 0.25 and 1 x 1
