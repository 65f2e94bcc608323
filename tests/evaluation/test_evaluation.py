"""The evaluators that a dataset's metadata asks for."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from pycocotools import mask as rle

from distill_d2.data import generate_shapes, register_custom_datasets, register_shapes, shapes
from distill_d2.evaluation import VOCEvaluator, build_evaluator

_numbers = itertools.count()


def _instances(record, wanted=lambda item: True, shift=0.0):
    """A record's ground truth as a detector would return it, scores 0.99, 0.98, ..."""
    items = [item for item in record["annotations"] if wanted(item)]
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
    result = Instances((record["height"], record["width"]))
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) + shift)
    result.scores = 0.99 - 0.001 * torch.arange(len(items))
    result.pred_classes = torch.tensor([item["category_id"] for item in items], dtype=torch.int64)
    if items and "segmentation" in items[0]:
        masks = [_mask(item["segmentation"], record) for item in items]
        result.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    return result


def _mask(polygons, record):
    return rle.decode(rle.merge(rle.frPyObjects(polygons, record["height"], record["width"])))


def evaluate(name, output_dir, **changes):
    """Results with the dataset's ground truth, changed, for detections."""
    evaluator = build_evaluator(name, str(output_dir))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": _instances(record, **changes)}])
    return evaluator.evaluate()


def bccd_entry(shared, **changes):
    entry = dict(FORMAT="voc", ROOT=str(shared / "data" / "bccd"), SPLIT="val", YEAR=2007)
    entry["CLASSES"] = ["RBC", "WBC", "Platelets"]
    return {"NAME": f"evaluate_bccd_{next(_numbers)}", **entry, **changes}


def register(entry):
    register_custom_datasets([entry])
    return entry["NAME"]


# Ground truth for detections is AP 100


@pytest.mark.parametrize("year", [2007, 2012])
def test_bccd_ground_truth_is_100(shared, tmp_path, year):
    metrics = evaluate(register(bccd_entry(shared, YEAR=year)), tmp_path)["bbox"]
    names = ["AP", "AP50", "AP75", "AP50-RBC", "AP50-WBC", "AP50-Platelets"]
    assert list(metrics) == names
    assert all(value == pytest.approx(100) for value in metrics.values())
    assert {type(value) for value in metrics.values()} == {float}


def test_nuclei_ground_truth_is_100(shared, tmp_path):
    folder = shared / "data" / "nuclei"
    entry = dict(FORMAT="coco", JSON=str(folder / "annotations" / "val.json"), IMAGES=str(folder / "images"))
    name = register({"NAME": "evaluate_nuclei", **entry})
    results = evaluate(name, tmp_path)
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)
    assert (tmp_path / "inference" / name / "coco_instances_results.json").is_file()


def test_shapes_ground_truth_is_100_and_is_generated_when_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "SPLITS", {"train": (2, 1), "val": (12, 2)})
    register_shapes()
    assert isinstance(build_evaluator("shapes_val", str(tmp_path)), COCOEvaluator)
    results = evaluate("shapes_val", tmp_path)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP-star"] == pytest.approx(100)
    wrong = evaluate("shapes_val", tmp_path, shift=6.0)
    assert wrong["bbox"]["AP"] < 60


# VOC against detectron2's own evaluator, and by hand


@pytest.mark.parametrize("year", [2007, 2012])
def test_bccd_is_what_detectron2_computes(shared, tmp_path, year):
    """With boxes that are off and some that are not found."""
    entry = bccd_entry(shared, YEAR=year)
    name, theirs_name = register(entry), f"{entry['NAME']}_detectron2"
    register_pascal_voc(theirs_name, entry["ROOT"], "val", year, entry["CLASSES"])
    theirs = PascalVOCDetectionEvaluator(theirs_name)
    ours = build_evaluator(name, str(tmp_path))
    for evaluator in (ours, theirs):
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            found = _instances(record, wanted=lambda item: item["bbox"][0] % 3 > 0, shift=4.0)
            evaluator.process([record], [{"instances": found}])
    ours, theirs = ours.evaluate()["bbox"], theirs.evaluate()["bbox"]
    assert 10 < ours["AP"] < 60
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
    per_class = [ours[f"AP50-{label}"] for label in entry["CLASSES"]]
    assert np.mean(per_class) == pytest.approx(ours["AP50"])


OBJECT = """<object><name>{name}</name>{more}<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """Writes and registers one 100x100 image with objects (name, box, more xml); its name."""

    def write(objects, classes=("cat",), year=2012):
        root = tmp_path / f"voc{next(_numbers)}"
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder).mkdir(parents=True)
        (root / "ImageSets" / "Main" / "test.txt").write_text("a 1\n\n")
        body = "".join(OBJECT.format(name=n, box=b, more=m) for n, b, m in objects)
        size = "<size><width>100</width><height>100</height></size>"
        (root / "Annotations" / "a.xml").write_text(f"<annotation>{size}{body}</annotation>")
        entry = dict(FORMAT="voc", ROOT=str(root), SPLIT="test", CLASSES=list(classes), YEAR=year)
        return register({"NAME": f"evaluate_voc_{root.name}", **entry})

    return write


@pytest.mark.parametrize("year, expected", [(2007, 6 / 11), (2012, 0.5)])
def test_one_of_two_found(voc, tmp_path, year, expected):
    """Precision 1 up to recall 0.5: six of eleven points, half of the area."""
    name = voc([("cat", (1, 1, 20, 20), ""), ("cat", (50, 50, 90, 90), "")], year=year)
    metrics = evaluate(name, tmp_path, wanted=lambda item: item["bbox"][0] == 0)["bbox"]
    assert metrics["AP50"] == pytest.approx(100 * expected)
    assert metrics["AP"] == pytest.approx(100 * expected)


def test_annotations_without_what_detectron2_insists_on(voc, tmp_path):
    """No pose, truncated, difficult; fractions; a split file with a column and a blank line."""
    name = voc([("cat", (1.2, 2.1, 40.3, 50.4), "")])
    assert evaluate(name, tmp_path)["bbox"]["AP50"] == pytest.approx(100)


def test_boxes_without_area_do_not_count_as_missed(voc, tmp_path):
    name = voc([("cat", (1, 1, 20, 20), ""), ("cat", (5, 5, 5, 5), "")])
    assert evaluate(name, tmp_path)["bbox"]["AP"] == pytest.approx(100)


def test_difficult_objects_count_neither_way(voc, tmp_path):
    hard = "<difficult>1</difficult>"
    name = voc([("cat", (1, 1, 20, 20), ""), ("cat", (50, 50, 90, 90), hard)])
    assert evaluate(name, tmp_path)["bbox"]["AP"] == pytest.approx(100)
    found_easy = evaluate(name, tmp_path, wanted=lambda item: item["bbox"][0] == 0)["bbox"]
    assert found_easy["AP"] == pytest.approx(100)


@pytest.mark.parametrize("year", [2007, 2012])
def test_class_without_objects_is_left_out_of_the_mean(voc, tmp_path, year):
    name = voc([("cat", (1, 1, 20, 20), "")], classes=("cat", "dog"), year=year)
    metrics = evaluate(name, tmp_path)["bbox"]
    assert metrics["AP"] == pytest.approx(100) and metrics["AP50-cat"] == pytest.approx(100)
    assert math.isnan(metrics["AP50-dog"])


@pytest.mark.parametrize("year", [2007, 2012])
def test_no_detections_at_all(voc, tmp_path, year):
    name = voc([("cat", (1, 1, 20, 20), "")], year=year)
    assert evaluate(name, tmp_path, wanted=lambda item: False)["bbox"]["AP"] == 0


def test_class_whose_name_is_no_file_name(voc, tmp_path):
    name = voc([("cat/dog", (1, 1, 20, 20), "")], classes=["cat/dog"])
    assert evaluate(name, tmp_path)["bbox"]["AP50-cat/dog"] == pytest.approx(100)


def test_nothing_to_evaluate_with(voc, tmp_path):
    name = voc([("cat", (1, 1, 20, 20), "<difficult>1</difficult>")])
    with pytest.raises(ValueError, match=r"test.txt' holds no object of \['cat'\]"):
        evaluate(name, tmp_path)


def test_detections_of_all_processes_count(voc, tmp_path, monkeypatch):
    name = voc([("cat", (1, 1, 20, 20), ""), ("cat", (50, 50, 90, 90), "")])
    other = VOCEvaluator(name)
    other.reset()
    (record,) = DatasetCatalog.get(name)
    second = _instances(record, wanted=lambda item: item["bbox"][0] > 0)
    other.process([record], [{"instances": second}])
    theirs = dict(other._predictions)
    monkeypatch.setattr(comm, "gather", lambda data, dst=0: [data, theirs])
    metrics = evaluate(name, tmp_path, wanted=lambda item: item["bbox"][0] == 0)["bbox"]
    assert metrics["AP"] == pytest.approx(100)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluate(name, tmp_path) == {}


# build_evaluator


@pytest.mark.parametrize(
    "name, expected",
    [("voc_2007_test", VOCEvaluator), ("voc_2012_val", VOCEvaluator)],
)
def test_builtin_voc_datasets(name, expected, tmp_path):
    assert type(build_evaluator(name, str(tmp_path))) is expected


def test_coco_dataset_that_is_not_there_is_named(tmp_path):
    json_file = str(tmp_path / "instances.json")
    register_coco_instances("evaluate_missing", {}, json_file, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="instances.json"):
        build_evaluator("evaluate_missing", str(tmp_path))


def test_unknown_evaluator_type_lists_the_known(tmp_path):
    MetadataCatalog.get("evaluate_unknown").evaluator_type = "my_own"
    with pytest.raises(ValueError, match=r"evaluate_unknown.*'my_own'.*'coco', 'lvis', 'pascal_voc'"):
        build_evaluator("evaluate_unknown", str(tmp_path))


def test_custom_coco_size_of_generated_shapes(tmp_path):
    """Shapes of another size, named in a config as the README says."""
    json_file, images = generate_shapes(str(tmp_path / "large"), "train", 4, seed=3, image_size=160)
    name = register({"NAME": "evaluate_large", "FORMAT": "coco", "JSON": json_file, "IMAGES": images})
    assert evaluate(name, tmp_path)["bbox"]["AP"] == pytest.approx(100)
    assert len(json.loads(Path(json_file).read_text())["images"]) == 4
