"""Classes are compared by name and order: of datasets, student, teacher and checkpoints."""

import json
import shutil

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from runs import checkpoint

from distill_d2.data import check_datasets, register_custom_datasets
from distill_d2.data.classes import classes_of_config, moved_class
from distill_d2.testing import tiny_config

NAMES = ["class0", "class1", "class2"]
MOVED = ["class1", "class0", "class2"]
NODE = "MODEL.DISTILLER."


@META_ARCH_REGISTRY.register()
class RetinaNetOfTest(RetinaNet):
    """A user's detector, of which nothing is described."""


def dataset(job, names, folder="renamed"):
    """The entry of a copy of the job's dataset with other names of classes."""
    shutil.copytree(job.folder / "data", job.folder / folder)
    path = job.folder / folder / "annotations.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": number + 1, "name": name} for number, name in enumerate(names)]
    content["annotations"] = [
        item for item in content["annotations"] if item["category_id"] <= len(names)
    ]
    path.write_text(json.dumps(content))
    return {**job.entry, "NAME": f"{job.entry['NAME']}_{folder}", "JSON": str(path)}


@pytest.mark.parametrize(
    "names, words",
    [
        (
            MOVED,
            ["'class0' is class 0 of the first and class 1 of the second", "class1, class0, class2"],
        ),
        (NAMES[:2], ["3 (class0", "2 (class0", "the second lacks ['class2']"]),
        (NAMES[1:], ["'class1' is class 1 of the first and class 0 of the second", "lacks ['class0']"]),
        ([*NAMES, "class3"], ["3 (class0", "4 (class0"]),
        (["Class0", "class-1", "cat"], None),
        (["Class 0", "CLASS1", "class2"], None),
    ],
)
@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_datasets(job, caplog, part, names, words):
    """Two for training, or one for training and one for evaluation."""
    entry = dataset(job, names, f"{part}_{'_'.join(names)}")
    register_custom_datasets([job.entry, entry])
    cfg = job.config
    setattr(cfg.DATASETS, part, (job.entry["NAME"], entry["NAME"]))
    if words is None:
        check_datasets(cfg)
        assert ("class2 / cat" in caplog.text) == ("cat" in names)
        return
    with pytest.raises(ValueError) as caught:
        check_datasets(cfg)
    assert all(word in str(caught.value) for word in [job.entry["NAME"], entry["NAME"], *words]), (
        caught.value
    )


@pytest.mark.parametrize("distill, count", [(True, 2), (False, 4)])
def test_a_detector_that_nobody_described(job, distill, count):
    """Its number of classes is known when it is built."""
    job.config.MODEL.RETINANET.NUM_CLASSES = count
    node = job.config.MODEL.DISTILLER
    node.STUDENT_META_ARCH = "RetinaNetOfTest"
    words = [f"a RetinaNetOfTest, has {count} classes", "has 3 (class0", "MODEL.RETINANET.NUM_CLASSES"]
    job.fails(ValueError, *words, distill=distill)


def test_a_detector_of_a_lazy_config(lazy_job):
    yaml = lazy_job.folder / "student.yaml"
    yaml.write_text(yaml.read_text().replace("NUM_CLASSES: 3", "NUM_CLASSES: 2"))
    with pytest.raises(ValueError, match="a RetinaNet, has 2 classes.* has 3"):
        lazy_job.run()


def test_data_of_a_lazy_config(lazy_job):
    """They are checked, too, with its mapper and evaluator."""
    path = lazy_job.folder / "data" / "annotations.json"
    content = json.loads(path.read_text())
    image = lazy_job.folder / "data" / "images" / content["images"][2]["file_name"]
    pixels = image.read_bytes()
    image.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be used"):
        lazy_job.run()
    image.write_bytes(pixels)
    lazy_job.replace("L(T.RandomFlip)()", "L(T.RandomCrop)(crop_type='no such', crop_size=(1, 1))")
    with pytest.raises(ValueError, match="mapper"):
        lazy_job.run()


@pytest.fixture
def moved_teacher(job):
    """A job whose teacher's checkpoint has the classes in another order."""
    job.use_teacher(tiny_config(width=8))
    path = job.folder / "other" / "teacher.pth"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "metadata": {"thing_classes": MOVED}}, path)
    return job


@pytest.mark.parametrize(
    "opts, words",
    [
        ([NODE + "TYPES", ["GID"]], ["Losses compare them by number (GID)", "loss on features"]),
        ([NODE + "PRELOAD_HEAD", True], ["Set MODEL.DISTILLER.PRELOAD_HEAD to False"]),
        ([NODE + "EVAL_TEACHER", True], ["Set MODEL.DISTILLER.EVAL_TEACHER to False"]),
    ],
)
def test_teacher_of_another_order(moved_teacher, opts, words):
    words = ["the teacher (", "3 (class1, class0, class2)", "'class0' is class 0", *words]
    moved_teacher.fails(ValueError, *words, opts=opts)


def test_features_alone_and_no_checks_do_not_ask_for_the_teachers_classes(moved_teacher):
    moved_teacher.trainer()
    moved_teacher.trainer(opts=[NODE + "TYPES", ["GID"], "DATASETS.CHECK", "none"])


def test_classes_of_a_teachers_config(job):
    """From DATASETS.CUSTOM, by the json's categories alone, or from the metadata of registered datasets."""
    cfg = tiny_config()
    assert classes_of_config(cfg) is None
    entry = dataset(job, MOVED)
    cfg.DATASETS.TRAIN, cfg.DATASETS.CUSTOM = (entry["NAME"],), [entry]
    assert classes_of_config(cfg) == MOVED
    cfg.DATASETS.CUSTOM = [{**entry, "JSON": "gone.json"}]
    assert classes_of_config(cfg) is None
    cfg.DATASETS.CUSTOM = [{**entry, "CLASSES": NAMES}]
    assert classes_of_config(cfg) == NAMES
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    assert classes_of_config(cfg)[:2] == ["person", "bicycle"]
    assert not moved_class(classes_of_config(cfg), MetadataCatalog.get("coco_2017_val").thing_classes)


def test_checkpoints_carry_the_classes(job):
    """Evaluation on, and a resume with, another order are told; plain detectron2 ignores the entry."""
    job.run(opts=["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"])
    assert checkpoint(job.output)["metadata"] == {"thing_classes": NAMES}
    entry = dataset(job, MOVED)
    job.config.DATASETS.CUSTOM, name = [job.entry, entry], entry["NAME"]
    only = ["DATASETS.TEST", f"('{name}',)", "MODEL.WEIGHTS", job.output / "model_final.pth"]
    with pytest.raises(
        ValueError, match=f"checkpoint .*model_final.pth and dataset '{name}' have different"
    ):
        job.run("--eval-only", opts=[*only, "OUTPUT_DIR", job.folder / "evaluation"])
    other = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2]
    with pytest.raises(ValueError, match="checkpoint .* have different classes.*without --resume"):
        job.run("--resume", opts=other)
