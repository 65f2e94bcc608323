"""The evaluators that a dataset's metadata asks for."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, inference_on_dataset
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from pycocotools import mask as rle
from torch import nn

from distill_d2.data import register_custom_datasets, register_shapes, shapes
from distill_d2.evaluation import build_evaluator, coco, with_model_evaluators


def evaluate(name, output_dir, shift=0.0, **options):
    """Results with the dataset's ground truth, shifted by some pixels, for detections."""
    evaluator = build_evaluator(name, str(output_dir), **options)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": _instances(record, shift)}])
    return evaluator.evaluate()


def _instances(record, shift):
    """A record's ground truth as a detector would return it, scores 0.99, 0.98, ..."""
    items, size = record["annotations"], (record["height"], record["width"])
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) + shift)
    result.scores = 0.99 - 0.001 * torch.arange(len(items))
    result.pred_classes = torch.tensor([item["category_id"] for item in items], dtype=torch.int64)
    if "segmentation" in items[0]:
        masks = [rle.decode(rle.merge(rle.frPyObjects(item["segmentation"], *size))) for item in items]
        result.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    if "keypoints" in items[0]:
        points = torch.tensor([item["keypoints"] for item in items], dtype=torch.float32)
        result.pred_keypoints = points.reshape(len(items), -1, 3) + torch.tensor([shift, shift, 0])
    return result


# Ground truth for detections is AP 100


@pytest.mark.parametrize("year", [2007, 2012])
def test_bccd_ground_truth_is_100(shared, tmp_path, year):
    name, classes = f"evaluate_bccd_{year}", ["RBC", "WBC", "Platelets"]
    entry = dict(FORMAT="voc", ROOT=str(shared / "data" / "bccd"), SPLIT="val", YEAR=year)
    register_custom_datasets([{"NAME": name, "CLASSES": classes, **entry}])
    metrics = evaluate(name, tmp_path)["bbox"]
    names = ["AP", "AP50", "AP75", "AP50_11point", "AP50_area"]
    assert list(metrics) == [*names, *(f"AP50-{label}" for label in classes)]
    assert all(value == pytest.approx(100) for value in metrics.values())
    assert {type(value) for value in metrics.values()} == {float}


def test_nuclei_ground_truth_is_100(shared, tmp_path):
    folder, name = shared / "data" / "nuclei", "evaluate_nuclei"
    entry = dict(JSON=str(folder / "annotations" / "val.json"), IMAGES=str(folder / "images"))
    register_custom_datasets([{"NAME": name, "FORMAT": "coco", **entry}])
    results = evaluate(name, tmp_path)
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)
    assert (tmp_path / "inference" / name / "coco_instances_results.json").is_file()


def test_shapes_ground_truth_is_100_and_is_generated_when_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "SPLITS", {"train": (2, 1), "val": (12, 2)})
    register_shapes()
    assert isinstance(build_evaluator("shapes_val", str(tmp_path)), COCOEvaluator)
    results = evaluate("shapes_val", tmp_path)
    for task, metric in (("bbox", "AP"), ("segm", "AP"), ("bbox", "AP-star")):
        assert results[task][metric] == pytest.approx(100)
    assert evaluate("shapes_val", tmp_path, shift=6.0)["bbox"]["AP"] < 60


# build_evaluator


def crowded(name, objects, **fields):
    """Register one image with this many equal objects side by side."""
    record = {"file_name": "0.png", "image_id": 0, "height": 64, "width": 32 * objects}
    record["annotations"] = [
        {
            "bbox": [32 * i, 0, 30, 60],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "iscrowd": 0,
            **fields,
        }
        for i in range(objects)
    ]
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["thing"], evaluator_type="coco")


def test_more_than_100_detections_of_an_image_count_on_request(tmp_path):
    """COCO counts 100; TEST.DETECTIONS_PER_IMAGE may be more. Of 125 objects 100 are 80 %."""
    crowded("evaluate_crowded", 125)
    assert evaluate("evaluate_crowded", tmp_path)["bbox"]["AP50"] == pytest.approx(80, abs=1)
    assert evaluate("evaluate_crowded", tmp_path, detections_per_image=20)["bbox"]["AP50"] > 79
    assert evaluate("evaluate_crowded", tmp_path, detections_per_image=150)["bbox"]["AP50"] > 99


def disturbed(record, random):
    """Ground truth as detections of few different scores: shifted, twice, of wrong classes, at wrong places."""
    parts = []
    for shift in (0.0, 2.0, 12.0):
        part = _instances(record, shift)
        part = part[torch.from_numpy(random.rand(len(part)) < 0.6)]
        wrong = torch.from_numpy(random.rand(len(part)) < 0.2)
        part.pred_classes = torch.where(wrong, (part.pred_classes + 1) % 3, part.pred_classes)
        part.scores = torch.from_numpy(random.rand(len(part)).round(1))
        parts.append(part)
    return Instances.cat(parts)


@pytest.mark.skipif(coco.FastCOCOeval is None, reason="faster-coco-eval is not installed")
@pytest.mark.parametrize("limit", [100, 120])
def test_faster_coco_eval_gives_the_same_numbers(monkeypatch, tmp_path, limit):
    """All metrics of all classes, for boxes and masks; image ids are strings that int() would change."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": (2, 1), "val": (12, 2)})
    register_shapes()
    records = [{**r, "image_id": f"00{i}"} for i, r in enumerate(DatasetCatalog.get("shapes_val"))]
    for record in records[::3]:
        record["annotations"][0]["iscrowd"] = 1
    name = f"evaluate_both_{limit}"
    DatasetCatalog.register(name, lambda: records)
    classes = [*MetadataCatalog.get("shapes_val").thing_classes, "a class without objects"]
    MetadataCatalog.get(name).set(thing_classes=classes, evaluator_type="coco")
    results, used = [], []

    class Fast(coco.FastCOCOeval):
        def evaluate(self):
            used.append(len(results))
            super().evaluate()

    for fast in (Fast, None):
        monkeypatch.setattr(coco, "FastCOCOeval", fast)
        random = np.random.RandomState(0)
        evaluator = build_evaluator(name, str(tmp_path), detections_per_image=limit)
        evaluator.reset()
        for record in records:
            evaluator.process([record], [{"instances": disturbed(record, random)}])
        for ids in (None, [record["image_id"] for record in records[:7]]):
            results += evaluator.evaluate(ids).values()
    assert (
        len(results) == 8
        and used == [0, 0, 2, 2]
        and 5 < results[0]["AP"] < 95
        and results[0] != results[2]
    )
    for found, official in zip(results[:4], results[4:]):
        assert found == pytest.approx(official, abs=1e-9, nan_ok=True)


def test_no_detection_is_an_ap_of_0(tmp_path):
    crowded("evaluate_nothing", 2)
    evaluator = build_evaluator("evaluate_nothing", str(tmp_path))
    (record,) = DatasetCatalog.get("evaluate_nothing")
    evaluator.reset()
    evaluator.process([record], [{"instances": _instances(record, 0.0)[:0]}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == 0 and np.isnan(results["APs"])  # there are no small objects


def test_keypoint_sigmas_are_used(monkeypatch, tmp_path):
    """The similarity of a keypoint is exp(-d^2 / (2 area (2 sigma)^2)): at sqrt(18) pixels in a box of 30x60
    it is 0.88 for a sigma of 0.1, and below 0.1 for 0.02."""
    crowded("evaluate_keypoints", 2, keypoints=[10, 20, 2, 20, 40, 2], num_keypoints=2)
    for fast in {coco.FastCOCOeval, None}:
        monkeypatch.setattr(coco, "FastCOCOeval", fast)
        for sigma, ap in ((0.1, 100), (0.02, 0)):
            sigmas = [sigma, sigma]
            results = evaluate("evaluate_keypoints", tmp_path, shift=3.0, keypoint_sigmas=sigmas)
            assert results["keypoints"]["AP50"] == pytest.approx(ap)


def test_coco_dataset_that_is_not_there_is_named(tmp_path):
    json_file = str(tmp_path / "instances.json")
    register_coco_instances("evaluate_missing", {}, json_file, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="instances.json"):
        build_evaluator("evaluate_missing", str(tmp_path))


def test_unknown_evaluator_type_lists_the_known(tmp_path):
    MetadataCatalog.get("evaluate_unknown").evaluator_type = "my_own"
    with pytest.raises(ValueError, match=r"evaluate_unknown.*'my_own'.*'coco', 'lvis', 'pascal_voc'"):
        build_evaluator("evaluate_unknown", str(tmp_path))


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
        self.evaluator = lambda: Counted(name)


class Doubling(nn.Sequential):
    def forward(self, inputs):
        return [2 * item for item in inputs]


def test_evaluators_of_modules_are_merged(monkeypatch):
    """Those of modules at any depth, after those of the dataset; on the main process, as detectron2's."""
    names = ["bytes", "time"]
    model = Doubling(nn.Linear(1, 1), nn.Sequential(*(Reporting(name) for name in names)))
    evaluator = with_model_evaluators(Counted("boxes"), model)
    results = inference_on_dataset(model, [[1, 2], [3]], evaluator)
    assert list(results) == ["boxes", *names]
    assert all(values == {"images": 3, "outputs": 12} for values in results.values())
    assert with_model_evaluators(evaluator, nn.Linear(1, 1)) is evaluator
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    assert not evaluator.evaluate()
