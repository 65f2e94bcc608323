"""The evaluators that a dataset's metadata asks for."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
)
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from pycocotools import mask as rle
from torch import nn

from distill_d2.data import generate_shapes, register_custom_datasets, register_shapes, shapes
from distill_d2.evaluation import VOCEvaluator, build_evaluator, with_model_evaluators

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
    names = ["AP", "AP50", "AP75", "AP50_11point", "AP50_area"]
    assert list(metrics) == [*names, "AP50-RBC", "AP50-WBC", "AP50-Platelets"]
    assert all(value == pytest.approx(100) for value in metrics.values())
    assert {type(value) for value in metrics.values()} == {float}


def test_nuclei_ground_truth_is_100(shared, tmp_path):
    folder = shared / "data" / "nuclei"
    entry = dict(
        FORMAT="coco", JSON=str(folder / "annotations" / "val.json"), IMAGES=str(folder / "images")
    )
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
    assert ours["AP50"] == ours["AP50_11point" if year == 2007 else "AP50_area"]
    assert ours["AP50_11point"] != pytest.approx(ours["AP50_area"])
    per_class = [ours[f"AP50-{label}"] for label in entry["CLASSES"]]
    assert np.mean(per_class) == pytest.approx(ours["AP50"])


OBJECT = """<object><name>{name}</name>{more}<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """Writes and registers a 100x100 image "a" with objects (name, box, more xml), or several images
    {id: objects}; the dataset's name."""

    def write(objects, classes=("cat",), year=2012):
        images = objects if isinstance(objects, dict) else {"a": objects}
        root = tmp_path / f"voc{next(_numbers)}"
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder).mkdir(parents=True)
        (root / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{key} 1\n\n" for key in images))
        size = "<size><width>100</width><height>100</height></size>"
        for key, items in images.items():
            body = "".join(OBJECT.format(name=n, box=b, more=m) for n, b, m in items)
            (root / "Annotations" / f"{key}.xml").write_text(f"<annotation>{size}{body}</annotation>")
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


def detections(*items):
    """(box as in an xml file, score, class) as a detector would return them."""
    boxes, scores, labels = zip(*items)
    result = Instances((100, 100))
    # Corners in xml files count pixels from 1, and the last one belongs to the box.
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0]))
    result.scores, result.pred_classes = torch.tensor(scores), torch.tensor(labels)
    return result


def evaluate_detections(name, found):
    """Metrics of {image id: detections}."""
    evaluator = VOCEvaluator(name)
    evaluator.reset()
    for key, instances in found.items():
        evaluator.process([{"image_id": key}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("year", [2007, 2012])
def test_both_rules_by_hand(voc, year):
    """Three cats, of which two are found: precision 1 up to recall 1/3, then 2/3 up to recall 2/3.

    That is 1 at recalls 0, 0.1, 0.2, 0.3 and 2/3 at 0.4, 0.5, 0.6, or an area of 1/3 + 2/9. The dog
    is found at once, and there is no bird.
    """
    cats = [("cat", box, "") for box in ((1, 1, 10, 10), (31, 1, 40, 10), (61, 1, 70, 10))]
    name = voc([*cats, ("dog", (1, 51, 10, 60), "")], classes=("cat", "dog", "bird"), year=year)
    found = detections(
        ((1, 1, 10, 10), 0.9, 0),  # the first
        ((80, 80, 90, 90), 0.8, 0),  # nothing
        ((31, 1, 40, 6), 0.7, 0),  # 6 of 10 rows of the second
        ((1, 1, 10, 9), 0.6, 0),  # the first again
        ((61, 1, 70, 5), 0.5, 0),  # 5 of 10 rows of the third: no more than half
        ((1, 51, 10, 60), 0.4, 1),
    )
    metrics = evaluate_detections(name, {"a": found})
    assert metrics["AP50_11point"] == pytest.approx((54.545454545 + 100) / 2)
    assert metrics["AP50_area"] == pytest.approx((55.555555556 + 100) / 2)
    assert metrics["AP50"] == metrics["AP50_11point" if year == 2007 else "AP50_area"]
    assert metrics["AP50-cat"] == pytest.approx({2007: 54.545454545, 2012: 55.555555556}[year])


def pixels(box):
    """Of a box as in an xml file."""
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1)}


def overlap(box, other):
    """Intersection over union."""
    return len(pixels(box) & pixels(other)) / len(pixels(box) | pixels(other))


def naive_precisions(objects, found):
    """AP50 of a class by both rules, of objects {image: [(box, difficult)]} and detections [(score,
    image, box)]."""
    total = sum(not difficult for items in objects.values() for _, difficult in items)
    right, wrong, taken, curve = 0, 0, set(), []
    for _, image, box in sorted(found, reverse=True):
        overlaps = [overlap(box, other) for other, _ in objects[image]]
        best = overlaps.index(max(overlaps))
        hit = overlaps[best] > 0.5
        if hit and objects[image][best][1]:
            continue
        if hit and (image, best) not in taken:
            taken.add((image, best))
            right += 1
        else:
            wrong += 1
        curve.append((Fraction(right, total), right / (right + wrong)))

    def precision_from(recall):
        return max((precision for reached, precision in curve if reached >= recall), default=0)

    points = [precision_from(Fraction(tenth, 10)) for tenth in range(11)]
    steps = [precision_from(Fraction(count, total)) for count in range(1, total + 1)]
    return 100 * np.mean(points), 100 * np.mean(steps)


def random_boxes(random, count):
    first, size = random.randint(1, 80, (count, 2)), random.randint(8, 20, (count, 2))
    return np.concatenate([first, first + size], axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_both_rules_against_a_naive_implementation(voc, seed):
    """On three images, each with eight objects and a difficult one, found once, twice or not."""
    random = np.random.RandomState(seed)
    objects, found = {}, []
    scores = iter((1 + random.permutation(999)) / 1000)  # evaluation keeps three decimals
    for key in "abc":
        boxes = random_boxes(random, 9)
        near = boxes.repeat(2, axis=0) + random.randint(-3, 4, (18, 4))
        detected = np.concatenate([near, random_boxes(random, 5)])
        objects[key] = [(box, index == 0) for index, box in enumerate(boxes.tolist())]
        found += [(next(scores), key, box) for box in detected.tolist()]
    mark = "<difficult>{:d}</difficult>"
    name = voc({key: [("cat", b, mark.format(hard)) for b, hard in objects[key]] for key in objects})
    outputs = {key: [(box, score, 0) for score, image, box in found if image == key] for key in objects}
    metrics = evaluate_detections(name, {key: detections(*items) for key, items in outputs.items()})
    expected = naive_precisions(objects, found)
    assert 10 < min(expected) and max(expected) < 90 and expected[0] != pytest.approx(expected[1])
    assert (metrics["AP50_11point"], metrics["AP50_area"]) == pytest.approx(expected)


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
    for key in ("AP", "AP50_11point", "AP50_area", "AP50-cat"):
        assert metrics[key] == pytest.approx(100)
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


# Evaluators that modules of a model bring along.


class Counted(DatasetEvaluator):
    """How many outputs of how many images came; {"<name>": {"images": n, "outputs": sum}}."""

    def __init__(self, name):
        self.name = name

    def reset(self):
        self.images, self.outputs = 0, 0

    def process(self, inputs, outputs):
        self.images += len(inputs)
        self.outputs += sum(outputs)

    def evaluate(self):
        return {self.name: {"images": self.images, "outputs": self.outputs}}


class Reporting(nn.Module):
    """A part of a model that has something of its own to report."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def evaluator(self):
        return Counted(self.name)


class Doubling(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, inputs):
        return [2 * item for item in inputs]


def test_a_model_without_any_is_evaluated_as_before():
    evaluator = Counted("boxes")
    assert with_model_evaluators(evaluator, Doubling(nn.Linear(1, 1))) is evaluator


@pytest.mark.parametrize("names", [["bytes"], ["bytes", "time"]])
def test_results_of_all_are_merged(names):
    """Those of modules at any depth, after those of the dataset."""
    model = Doubling(nn.Linear(1, 1), nn.Sequential(*(Reporting(name) for name in names)))
    evaluator = with_model_evaluators(Counted("boxes"), model)
    assert isinstance(evaluator, DatasetEvaluators)
    results = inference_on_dataset(model, [[1, 2], [3]], evaluator)
    assert list(results) == ["boxes", *names]
    assert all(values == {"images": 3, "outputs": 12} for values in results.values())


def test_the_model_itself_may_have_one():
    model = Reporting("bytes")
    results = with_model_evaluators(Counted("boxes"), model)
    results.reset()
    results.process([1], [5])
    assert results.evaluate()["bytes"] == {"images": 1, "outputs": 5}


def test_several_processes_report_on_the_main_one(monkeypatch):
    """Others return nothing, as detectron2's evaluators do."""
    evaluator = with_model_evaluators(Counted("boxes"), Reporting("bytes"))
    evaluator.reset()
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    assert not evaluator.evaluate()
