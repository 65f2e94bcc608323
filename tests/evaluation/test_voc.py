"""VOC's average precision against detectron2's own voc_eval, and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from distill_d2.data import register_custom_datasets
from distill_d2.evaluation import VOCEvaluator

_numbers = itertools.count()

OBJECT = """<object><name>{name}</name>{more}<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """Writes and registers a 100x100 image "a" with objects (name, box, more xml), or several images
    {id: objects}; the name of the dataset."""

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
        name = f"evaluate_{root.name}_{next(_numbers)}"
        register_custom_datasets([{"NAME": name, **entry}])
        return name

    return write


def detections(*items):
    """(box as in an xml file, score, class) as a detector would return them."""
    boxes, scores, labels = zip(*items)
    result = Instances((100, 100))
    # Corners in xml files count pixels from 1, and the last one belongs to the box.
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0]))
    result.scores, result.pred_classes = torch.tensor(scores), torch.tensor(labels)
    return result


def evaluate_detections(name, found, evaluator=None):
    """Metrics of {image id: detections}."""
    evaluator = evaluator or VOCEvaluator(name)
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


CLASSES = ("cat", "dog", "bird", "cow")  # of which there are no detections of birds, and no cows


def random_boxes(random, count):
    first, size = random.randint(1, 80, (count, 2)), random.randint(8, 20, (count, 2))
    return np.concatenate([first, first + size], axis=1)


@pytest.fixture(params=range(5))
def scene(request):
    """Random objects {image: [(class, box, xml)]} and detections {image: [(box, score, class index)]}:
    difficult and repeated objects, objects that are found twice or not, equal scores, empty images."""
    random = np.random.RandomState(request.param)
    objects, found = {}, {}
    for key in "abcdef":
        boxes = random_boxes(random, random.randint(4, 10)) if key != "f" else np.zeros((0, 4), int)
        boxes = np.concatenate([boxes, boxes[:2]])
        labels = random.randint(0, 3, len(boxes))
        mark = "<pose></pose><truncated>0</truncated><difficult>{:d}</difficult>"
        hard = random.rand(len(boxes)) < 0.2
        objects[key] = [(CLASSES[k], tuple(b), mark.format(h)) for k, b, h in zip(labels, boxes, hard)]
        near = np.repeat(boxes, 2, axis=0) + random.randint(-30, 40, (2 * len(boxes), 4)) / 10
        near = np.concatenate([near, near[:3], random_boxes(random, 6)])
        others = random.randint(0, 4, len(near) - 2 * len(labels))
        labels = np.concatenate([np.repeat(labels, 2), others])
        scores = random.randint(1, 40, len(near)) / 40
        found[key] = [(b, s, k) for b, s, k in zip(near.tolist(), scores, labels) if k != 2]
    return objects, found


@pytest.mark.parametrize("year", [2007, 2012])
def test_every_metric_is_that_of_voc_eval(voc, scene, tmp_path, year):
    """Bit for bit."""
    objects, found = scene
    name = voc(objects, classes=CLASSES, year=year)
    evaluator = VOCEvaluator(name)
    found = {key: detections(*items) for key, items in found.items()}
    metrics = evaluate_detections(name, found, evaluator)
    (tmp_path / "split.txt").write_text("".join(f"{key}\n" for key in objects))

    def expected(index, threshold, is_2007):
        (tmp_path / "found.txt").write_text("\n".join(evaluator._predictions.get(index, [])))
        files = (tmp_path / "found.txt", evaluator._anno_file_template, tmp_path / "split.txt")
        return 100 * voc_eval(*map(str, files), CLASSES[index], threshold / 100, is_2007)[2]

    thresholds = range(50, 100, 5)
    table = np.array([[expected(index, t, year == 2007) for t in thresholds] for index in range(3)])
    assert metrics["AP50"] == table[:, 0].mean() and 10 < metrics["AP50"] < 90
    assert metrics["AP75"] == table[:, 5].mean()
    assert metrics["AP"] == pytest.approx(table.mean(), rel=1e-12)
    assert [metrics[f"AP50-{label}"] for label in CLASSES[:3]] == table[:, 0].tolist()
    assert metrics["AP50-bird"] == 0 and math.isnan(metrics["AP50-cow"])
    for key, rule in (("AP50_11point", True), ("AP50_area", False)):
        assert metrics[key] == np.mean([expected(index, 50, rule) for index in range(3)])
    assert {type(value) for value in metrics.values()} == {float}


FIRST, SECOND = (1, 1, 20, 20), (50, 50, 90, 90)
DIFFICULT = [("cat", FIRST, ""), ("cat", SECOND, "<difficult>1</difficult>")]


@pytest.mark.parametrize(
    "objects, found",
    [
        # No pose, truncated, difficult; fractions; the split file has a column and blank lines.
        pytest.param([("cat", (1.2, 2.1, 40.3, 50.4), "")], [(1, 2, 40, 50)], id="incomplete xml"),
        pytest.param([("cat", FIRST, ""), ("cat", (5, 5, 5, 5), "")], [FIRST], id="a box without area"),
        pytest.param(DIFFICULT, [FIRST], id="difficult, missed"),
        pytest.param(DIFFICULT, [SECOND, FIRST], id="difficult, found"),
        pytest.param({"a": [("cat", FIRST, "")], "b": []}, [FIRST], id="an image without objects"),
    ],
)
def test_all_objects_that_count_are_found(voc, objects, found):
    name = voc(objects)
    found = detections(*((box, 0.9 - 0.1 * index, 0) for index, box in enumerate(found)))
    assert evaluate_detections(name, {"a": found})["AP"] == pytest.approx(100)


def test_nothing_to_evaluate_with(voc):
    name = voc(DIFFICULT[1:])
    with pytest.raises(ValueError, match=r"dataset '.*' holds no object of \['cat'\]"):
        evaluate_detections(name, {})


def test_detections_of_all_processes_count(voc, monkeypatch):
    name = voc([("cat", FIRST, ""), ("cat", SECOND, "")])
    other = VOCEvaluator(name)
    evaluate_detections(name, {"a": detections((SECOND, 0.9, 0))}, other)
    monkeypatch.setattr(comm, "gather", lambda data, dst=0: [data, dict(other._predictions)])
    assert evaluate_detections(name, {"a": detections((FIRST, 0.9, 0))})["AP"] == pytest.approx(100)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert other.evaluate() == {}


def test_the_order_of_the_evaluation_does_not_matter(voc):
    """Equal scores in several images, in the order of the dataset and another."""
    name = voc({key: [("cat", [11, 11, 30, 30], "")] for key in "abcd"})
    results = []
    for order in ("abcd", "dbca"):
        evaluator = VOCEvaluator(name)
        evaluator.reset()
        for key in order:
            shift = 40 * (key in "bd")  # of these images the object is missed
            box = [11 + shift, 11, 30 + shift, 30]
            evaluator.process([{"image_id": key}], [{"instances": detections((box, 0.5, 0))}])
        results.append(evaluator.evaluate()["bbox"])
    assert results[0] == results[1] and 0 < results[0]["AP50"] < 100
