"""Frequencies and sizes of a dataset's classes, and their cache."""

import itertools
import json
import logging
import os
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from test_custom import write_coco, write_voc

from distill_d2.data import box_statistics, register_custom_datasets
from distill_d2.data import statistics as module

_numbers = itertools.count()
_SUFFIX = ".box_statistics.json"


def item(label, box, mode=BoxMode.XYXY_ABS, **more):
    return {"category_id": label, "bbox": box, "bbox_mode": mode, **more}


def image(width, height, *items):
    return {"file_name": "x.jpg", "width": width, "height": height, "annotations": list(items)}


class Dataset:
    """A registered one that counts how often it is loaded."""

    def __init__(self, dicts, classes=("cat", "dog", "bird"), **metadata):
        self.name, self.dicts, self.loads = f"statistics_{next(_numbers)}", dicts, 0
        DatasetCatalog.register(self.name, self._load)
        if classes is not None:
            metadata["thing_classes"] = list(classes)
        MetadataCatalog.get(self.name).set(**metadata)

    def _load(self):
        self.loads += 1
        return self.dicts


def assert_same(ours, theirs):
    """Bit for bit."""
    for key in ("counts", "mean", "std"):
        np.testing.assert_array_equal(getattr(ours, key), getattr(theirs, key), err_msg=key)


DICTS = [
    image(100, 50, item(0, [0, 0, 20, 10]), item(0, [10, 10, 50, 40]), item(2, [0, 0, 100, 50])),
    image(10, 20, item(2, [5, 10, 5, 10], BoxMode.XYWH_ABS)),
]


@pytest.fixture
def json_dataset(tmp_path):
    """One with a json file of annotations (its content does not matter); and the path of its cache."""
    (tmp_path / "train.json").write_text("one")
    return Dataset(DICTS, json_file=str(tmp_path / "train.json")), tmp_path / f"train{_SUFFIX}"


# The numbers


def test_by_hand():
    found = box_statistics([Dataset(DICTS).name])
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
    found = box_statistics([Dataset(dicts, "abcdefg").name])
    counts, mean, std = naive(dicts, 7)
    assert found.counts.tolist() == counts and counts[5:] == [0, 0] and min(counts[:5]) > 5
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.std, std, rtol=1e-8)


@pytest.mark.parametrize(
    "mode, box, size",
    [
        (BoxMode.XYXY_ABS, [10, 20, 50, 60], [0.4, 0.5]),
        (BoxMode.XYWH_ABS, [10, 20, 50, 40], [0.5, 0.5]),
        (int(BoxMode.XYWH_ABS), np.array([10, 20, 50, 40]), [0.5, 0.5]),
        (BoxMode.XYWHA_ABS, [50, 40, 20, 40, 90], [0.4, 0.25]),  # rotated: what encloses it
        (BoxMode.XYXY_ABS, [-10, 60, 40, 100], [0.4, 0.25]),  # clipped
        (BoxMode.XYWH_ABS, [90, -20, 40, 40], [0.1, 0.25]),
    ],
)
def test_modes_and_clipping(mode, box, size):
    found = box_statistics([Dataset([image(100, 80, item(1, box, mode))]).name])
    np.testing.assert_allclose(found.mean[1], size, rtol=1e-12)
    np.testing.assert_allclose(found.std, 0, atol=1e-7)


@pytest.mark.parametrize(
    "left_out",
    [
        image(100, 80, item(0, [0, 0, 90, 70], iscrowd=1)),
        image(100, 80, item(0, [10, 10, 10, 20])),
        image(100, 80, item(0, [10, 10, 20, 10])),
        image(100, 80, item(0, [30, 10, 20, 20])),  # corners the wrong way round
        image(100, 80, item(0, [10, 10, 0, 5], BoxMode.XYWH_ABS)),
        image(100, 80, item(0, [100, 0, 120, 10])),  # outside
        image(100, 80, item(0, [10, -20, 20, 0])),
        image(100, 80, item(0, [float("nan"), 0, 10, 10])),
        image(100, 80),
        {"file_name": "x.jpg", "width": 100, "height": 80},
    ],
)
def test_what_is_left_out(left_out):
    kept = image(100, 80, item(1, [0, 0, 50, 20]))
    found = box_statistics([Dataset([left_out, kept]).name])
    assert found.counts.tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.mean, [[0.5, 0.25]] * 3)
    with pytest.raises(ValueError, match="no instances"):
        box_statistics([Dataset([left_out]).name])


def test_instances_that_are_all_alike():
    """Rounding leaves their variance a little below 0, or above."""
    dicts = [[image(100, 100, *[item(0, [0, 0, w, w])] * n)] for w in range(1, 101) for n in (1, 3, 7)]
    names = [Dataset(part).name for part in dicts]
    std = np.stack([box_statistics([name]).std for name in names])
    assert (std >= 0).all() and std.max() < 1e-7


def test_more_classes_than_the_metadata_or_none_there():
    dicts = [image(10, 10, item(4, [0, 0, 5, 5]))]
    for classes in (["cat"], None):
        assert box_statistics([Dataset(dicts, classes).name]).counts.tolist() == [0, 0, 0, 0, 1]


def test_the_dicts_are_not_changed():
    dicts = [image(10, 10, item(0, np.array([-1.0, 2, 5, 5]), BoxMode.XYWH_ABS))]
    box_statistics([Dataset(dicts).name])
    assert dicts[0]["annotations"][0]["bbox"].tolist() == [-1, 2, 5, 5]


def test_datasets_together_are_one_dataset_of_all_images():
    parts = [random_dicts(seed, classes=3) for seed in (2, 3)]
    names = [Dataset(parts[0], "abc").name, Dataset(parts[1], "abcd").name]
    together, apart = box_statistics([Dataset(sum(parts, []), "abcd").name]), box_statistics(names)
    assert apart.counts.tolist() == together.counts.tolist() and len(apart.counts) == 4
    np.testing.assert_allclose(apart.mean, together.mean, rtol=1e-12)
    np.testing.assert_allclose(apart.std, together.std, rtol=1e-10)
    twice = box_statistics([names[0]] * 2)
    assert twice.counts.tolist() == (2 * box_statistics(names[:1]).counts).tolist()


# Errors


def test_no_instances_names_the_datasets():
    names = [Dataset([]).name, Dataset([image(9, 9)]).name]
    with pytest.raises(ValueError, match=f"{names[0]}.*{names[1]}"):
        box_statistics(names)
    with pytest.raises(ValueError, match="no instances"):
        box_statistics([])


def test_unknown_dataset():
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
    name = Dataset([record]).name
    with pytest.raises(ValueError, match=f"dataset '{name}' cannot be used.*{text}"):
        box_statistics([name])


# The cache


def test_second_time_from_the_cache(json_dataset):
    dataset, cache = json_dataset
    first = box_statistics([dataset.name])
    assert cache.is_file() and dataset.loads == 1
    assert_same(box_statistics([dataset.name]), first)
    assert dataset.loads == 1
    assert sorted(os.listdir(cache.parent)) == [cache.name, "train.json"]


def test_cached_datasets_together(tmp_path):
    datasets = []
    for seed in (4, 5):
        path = tmp_path / f"{seed}.json"
        path.write_text("any")
        datasets.append(Dataset(random_dicts(seed), "abcde", json_file=str(path)))
    names = [dataset.name for dataset in datasets]
    box_statistics(names[:1])
    fresh_and_cached = box_statistics(names)
    assert_same(box_statistics(names), fresh_and_cached)
    assert [dataset.loads for dataset in datasets] == [1, 1]
    counts, mean, std = naive(datasets[0].dicts + datasets[1].dicts, 5)
    assert fresh_and_cached.counts.tolist() == counts
    np.testing.assert_allclose(fresh_and_cached.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(fresh_and_cached.std, std, rtol=1e-8)


def edit_size(path):
    path.write_text("other")
    os.utime(path, ns=(1, 1))


def edit_time(path):
    os.utime(path, ns=(2, 2))


@pytest.mark.parametrize("edit", [edit_size, edit_time])
def test_cache_of_annotations_that_have_changed(json_dataset, edit):
    dataset, cache = json_dataset
    path = cache.parent / "train.json"
    os.utime(path, ns=(1, 1))
    box_statistics([dataset.name])
    edit(path)
    dataset.dicts = [image(10, 10, item(1, [0, 0, 5, 5]))]
    assert box_statistics([dataset.name]).counts.tolist() == [0, 1, 0]
    assert box_statistics([dataset.name]).counts.tolist() == [0, 1, 0]
    assert dataset.loads == 2


def test_cache_of_another_dataset(json_dataset):
    dataset, cache = json_dataset
    box_statistics([dataset.name])
    other = Dataset(DICTS[1:], json_file=str(cache.parent / "train.json"))
    assert box_statistics([other.name]).counts.tolist() == [0, 0, 1]


@pytest.mark.parametrize("classes", [("dog", "cat", "bird"), ("cat", "dog", "bird", "cow")])
def test_cache_of_other_classes(json_dataset, classes):
    dataset, cache = json_dataset
    box_statistics([dataset.name])
    MetadataCatalog.remove(dataset.name)
    json_file = str(cache.parent / "train.json")
    MetadataCatalog.get(dataset.name).set(thing_classes=list(classes), json_file=json_file)
    assert len(box_statistics([dataset.name]).counts) == len(classes)
    assert dataset.loads == 2


def test_classes_that_are_known_only_after_loading(tmp_path, monkeypatch):
    """As in a fresh process: COCO's loader sets thing_classes."""
    write_coco(tmp_path)
    entry = {"NAME": f"statistics_{next(_numbers)}", "FORMAT": "coco"}
    entry.update(JSON=str(tmp_path / "train.json"), IMAGES=str(tmp_path / "images"))
    register_custom_datasets([entry])
    first = box_statistics([entry["NAME"]])
    assert first.counts.tolist() == [0, 1]
    np.testing.assert_allclose(first.mean, [[10 / 60, 10 / 40]] * 2)

    DatasetCatalog.remove(entry["NAME"])
    MetadataCatalog.remove(entry["NAME"])
    register_custom_datasets([entry])
    assert MetadataCatalog.get(entry["NAME"]).get("thing_classes") is None
    monkeypatch.setattr(DatasetCatalog, "get", None)  # not called
    assert_same(box_statistics([entry["NAME"]]), first)


def test_annotations_that_the_loader_generates(tmp_path):
    path = tmp_path / "made.json"
    dataset = Dataset(DICTS, json_file=str(path))
    load = dataset._load
    DatasetCatalog.remove(dataset.name)
    DatasetCatalog.register(dataset.name, lambda: path.write_text("made") and load())
    box_statistics([dataset.name])
    box_statistics([dataset.name])
    assert dataset.loads == 1 and (tmp_path / f"made{_SUFFIX}").is_file()


def test_annotations_that_change_while_they_are_read(json_dataset):
    dataset, cache = json_dataset
    load = dataset._load
    DatasetCatalog.remove(dataset.name)
    DatasetCatalog.register(
        dataset.name, lambda: (cache.parent / "train.json").write_text("changed") and load()
    )
    box_statistics([dataset.name])
    assert not cache.exists()


@pytest.mark.parametrize("metadata", [{}, {"json_file": "https://host/train.json"}, {"dirname": "voc"}])
def test_dataset_that_cannot_be_cached(metadata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = Dataset(DICTS, **metadata)
    assert_same(box_statistics([dataset.name]), box_statistics([dataset.name]))
    assert dataset.loads == 2 and not os.listdir(tmp_path)


def change(cache, key, value):
    cache.write_text(json.dumps({**json.loads(cache.read_text()), key: value}))


DAMAGES = {
    "empty": lambda cache: cache.write_text(""),
    "cut": lambda cache: cache.write_text(cache.read_text()[:-9]),
    "binary": lambda cache: cache.write_bytes(b"\x80\x02\xff"),
    "list": lambda cache: cache.write_text("[]"),
    "deep": lambda cache: cache.write_text("[" * 100_000),
    "no rows": lambda cache: change(cache, "rows", None),
    "number": lambda cache: change(cache, "rows", 3),
    "too few rows": lambda cache: change(cache, "rows", [[1, 1, 1, 1, 1]]),
    "too few columns": lambda cache: change(cache, "rows", [[1, 1]] * 3),
    "ragged": lambda cache: change(cache, "rows", [[1], [1, 1], []]),
    "nan": lambda cache: change(cache, "rows", [[1, float("nan"), 1, 1, 1]] * 3),
    "negative": lambda cache: change(cache, "rows", [[-1, -1, -1, -1, -1]] * 3),
    "fraction": lambda cache: change(cache, "rows", [[1.5, 1, 1, 1, 1]] * 3),
    "larger than the image": lambda cache: change(cache, "rows", [[1, 2, 1, 1, 1]] * 3),
    "no square": lambda cache: change(cache, "rows", [[1, 0.5, 0.5, 0.5, 0.75]] * 3),
    "older version": lambda cache: cache.write_text(
        cache.read_text().replace('"version": 1', '"version": 0')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again(json_dataset, damage):
    dataset, cache = json_dataset
    first, whole = box_statistics([dataset.name]), cache.read_text()
    DAMAGES[damage](cache)
    assert cache.read_bytes() != whole.encode()
    assert_same(box_statistics([dataset.name]), first)
    assert dataset.loads == 2 and cache.read_text() == whole


def test_the_cache_is_what_is_used(json_dataset):
    """So that a damaged one would be noticed above."""
    dataset, cache = json_dataset
    box_statistics([dataset.name])
    change(cache, "rows", [[7, 3.5, 3.5, 2, 2]] * 3)
    assert box_statistics([dataset.name]).counts.tolist() == [7, 7, 7] and dataset.loads == 1


# Writing


def assert_not_kept(dataset, folder, caplog, *texts):
    """It works, says so in one line and leaves nothing."""
    before = sorted(os.listdir(folder))
    with caplog.at_level(logging.INFO, "distill_d2"):
        assert box_statistics([dataset.name]).counts.tolist() == [2, 0, 2]
    (line,) = (record for record in caplog.records if record.name == "distill_d2.data.statistics")
    assert line.levelno == logging.INFO
    assert all(text in line.getMessage() for text in (dataset.name, "Cannot keep", *texts))
    assert sorted(os.listdir(folder)) == before


def test_folder_that_cannot_be_written_to(json_dataset, caplog):
    dataset, cache = json_dataset
    cache.parent.chmod(0o555)
    try:
        if os.access(cache.parent, os.W_OK):
            pytest.skip("permissions do not bind this user")
        assert_not_kept(dataset, cache.parent, caplog, "Permission")
    finally:
        cache.parent.chmod(0o755)


class FullDisk:
    """A file of which only the beginning can be written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[:10])
        raise OSError(28, "No space left")


def read_only(file):
    file.close()
    os.unlink(file.name)
    raise PermissionError(13, "Read-only")


@pytest.mark.parametrize("result, text", [(read_only, "Read-only"), (FullDisk, "No space left")])
def test_disk_that_cannot_be_written_to(json_dataset, caplog, monkeypatch, result, text):
    dataset, cache = json_dataset

    def limited(path, mode="r", **more):
        file = open(path, mode, **more)
        return file if mode == "r" else result(file)

    monkeypatch.setattr(module, "open", limited, raising=False)
    assert_not_kept(dataset, cache.parent, caplog, text)


def test_something_else_in_the_caches_place(json_dataset, caplog):
    dataset, cache = json_dataset
    cache.mkdir()
    assert_not_kept(dataset, cache.parent, caplog)


def test_it_appears_whole_and_writers_do_not_meet(json_dataset, monkeypatch):
    dataset, cache = json_dataset
    replace, sources = os.replace, []

    def spy(source, target):
        with open(source) as file:
            assert len(json.load(file)["rows"]) == 3
        assert target == str(cache) and os.path.dirname(source) == str(cache.parent)
        sources.append(source)
        if len(sources) == 1:  # a second process writes before this one is done
            box_statistics([dataset.name])
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", spy)
    box_statistics([dataset.name])
    assert len(set(sources)) == 2 and dataset.loads == 2
    assert sorted(os.listdir(cache.parent)) == [cache.name, "train.json"]
    box_statistics([dataset.name])
    assert dataset.loads == 2


def test_others_may_read_it(json_dataset):
    dataset, cache = json_dataset
    mask = os.umask(0o022)
    try:
        box_statistics([dataset.name])
    finally:
        os.umask(mask)
    assert cache.stat().st_mode & 0o777 == 0o644


# VOC layout


def register_voc(root, **changes):
    entry = {"NAME": f"statistics/voc {next(_numbers)}", "FORMAT": "voc", "ROOT": str(root)}
    entry = {**entry, "SPLIT": "train", "CLASSES": ["cat", "dog"], **changes}
    register_custom_datasets([entry])
    return entry["NAME"]


def forget(name):
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_voc(tmp_path, monkeypatch):
    write_voc(tmp_path, {"1": [("dog", 1, 1, 30, 10)], "2": [("dog", 1, 1, 60, 40)], "3": []})
    name = register_voc(tmp_path)
    found = box_statistics([name])
    assert found.counts.tolist() == [0, 2]
    np.testing.assert_allclose(found.mean, [[0.75, 0.625]] * 2)  # 0.5 x 0.25 and 1 x 1
    np.testing.assert_allclose(found.std, [[0.25, 0.375]] * 2)
    assert (tmp_path / f"{name.replace('/', '_').replace(' ', '_')}{_SUFFIX}").is_file()
    monkeypatch.setattr(DatasetCatalog, "get", None)
    assert_same(box_statistics([name]), found)


def edit_xml(root):
    """In place, which leaves the time of its folder as it was."""
    folder = root / "Annotations"
    before = folder.stat().st_mtime_ns
    xml = folder / "1.xml"
    xml.write_text(xml.read_text().replace("dog", "cat"))
    os.utime(xml, ns=(3, 3))
    assert folder.stat().st_mtime_ns == before


def edit_split(root):
    (root / "ImageSets" / "Main" / "train.txt").write_text("2\n")


@pytest.mark.parametrize("edit, counts", [(edit_xml, [2, 0]), (edit_split, [1, 0])])
def test_voc_annotations_that_have_changed(tmp_path, edit, counts):
    write_voc(tmp_path, {"1": [("dog", 1, 1, 30, 10)], "2": [("cat", 1, 1, 60, 40)]})
    name = register_voc(tmp_path)
    assert box_statistics([name]).counts.tolist() == [1, 1]
    edit(tmp_path)
    assert box_statistics([name]).counts.tolist() == counts


def test_voc_classes_in_another_order(tmp_path):
    write_voc(tmp_path, {"1": [("dog", 1, 1, 30, 10)], "2": [("dog", 1, 1, 60, 40)]})
    name = register_voc(tmp_path)
    assert box_statistics([name]).counts.tolist() == [0, 2]
    forget(name)
    register_voc(tmp_path, NAME=name, CLASSES=["dog", "cat"])
    assert box_statistics([name]).counts.tolist() == [2, 0]


def test_voc_another_split_of_the_same_name(tmp_path):
    write_voc(tmp_path, {"1": [("dog", 1, 1, 30, 10)]}, split="train")
    write_voc(tmp_path, {"2": [("cat", 1, 1, 30, 10)]}, split="val")
    for split in ("train", "val"):  # as those of an archive: equal in size and time
        os.utime(tmp_path / "ImageSets" / "Main" / f"{split}.txt", ns=(1, 1))
    name = register_voc(tmp_path)
    assert box_statistics([name]).counts.tolist() == [0, 1]
    forget(name)
    register_voc(tmp_path, NAME=name, SPLIT="val")
    assert box_statistics([name]).counts.tolist() == [1, 0]


def test_bccd(shared, tmp_path):
    """The first images of a real dataset, against a loop over their dicts."""
    source, classes = shared / "data" / "bccd", ["RBC", "WBC", "Platelets"]
    ids = (source / "ImageSets" / "Main" / "train.txt").read_text().split()[:12]
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n".join(ids))
    for key in ids:
        shutil.copy(source / "Annotations" / f"{key}.xml", tmp_path / "Annotations")
    name = register_voc(tmp_path, CLASSES=classes)
    found = box_statistics([name])
    counts, mean, std = naive(DatasetCatalog.get(name), 3)
    assert found.counts.tolist() == counts and counts[0] > 50 and min(counts) > 0
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.std, std, rtol=1e-7)
    assert_same(box_statistics([name]), found)
