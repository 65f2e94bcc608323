"""MODEL.DISTILLER.EVAL_TEACHER: the teacher is evaluated on the student's images, too."""

import copy

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from runs import Job, assert_equal, checkpoint, detections

from distill_d2.testing import tiny_config, use_dataset

NODE = "MODEL.DISTILLER."
EVAL_TEACHER = [NODE + "EVAL_TEACHER", True]
NOWHERE = [NODE + "MODEL_DISTILLER_CONFIG", "there/is/no/teacher.yaml"]


@pytest.fixture
def trained(job):
    """A job that has been run, and starts from its student."""
    job.use_detecting_teacher()
    job.run(opts=["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"])
    job.output.rename(job.folder / "student")
    job.config.MODEL.WEIGHTS = f"{job.folder}/student/model_final.pth"
    return job


def evaluated_alone(job, cfg):
    """Results and detections of a teacher as its own config evaluates it."""
    alone = copy.copy(job)
    alone.config, alone.config_file = cfg.clone(), str(job.folder / "alone.yaml")
    use_dataset(alone.config, job.entry)
    alone.config.VERSION = 2
    alone.config.MODEL.WEIGHTS = str(job.folder / "other" / "teacher.pth")
    alone.config.OUTPUT_DIR = str(job.folder / "alone")
    return alone.run("--eval-only", distill=False), detections(alone.output)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_teacher_is_evaluated_too(trained, image_format):
    """On the student's images, each detector in its own channel order."""
    results, boxes = evaluated_alone(trained, trained.use_detecting_teacher(image_format))
    student = trained.run("--eval-only", opts=["OUTPUT_DIR", trained.folder / "without"])
    both = trained.run("--eval-only", opts=EVAL_TEACHER)
    assert both.pop("teacher")["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert both.keys() == student.keys()
    assert both["bbox"] == pytest.approx(student["bbox"], nan_ok=True)
    assert len(boxes) > 100 and detections(trained.output / "teacher") == boxes
    assert detections(trained.output) == detections(trained.folder / "without") != boxes


def test_batches_of_one_size_give_the_same_detections(trained):
    """Of student and teacher, in the same order."""
    found = []
    for images in (1, 4):
        opts = ["TEST.IMS_PER_BATCH", images, "OUTPUT_DIR", trained.folder / str(images)]
        trained.run("--eval-only", opts=[*opts, *EVAL_TEACHER])
        folder = trained.folder / str(images)
        found.append(detections(folder) + detections(folder / "teacher"))
    assert len(found[0]) == len(found[1]) > 200
    for one, batched in zip(*found):
        assert (one["image_id"], one["category_id"]) == (batched["image_id"], batched["category_id"])
        assert [one["score"], *one["bbox"]] == pytest.approx(
            [batched["score"], *batched["bbox"]], rel=1e-4, abs=1e-3
        )


def test_teacher_of_another_channel_order_sees_reversed_images(trained):
    trained.use_detecting_teacher("RGB")
    trainer, seen = trained.trainer(opts=EVAL_TEACHER), []
    teacher = trainer.plain_model.teacher
    teacher.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    trainer.evaluate_teacher()
    assert len(seen) == 6
    for item in seen:
        pixels = read_image(item["file_name"], "RGB").transpose(2, 0, 1)
        assert np.array_equal(item["image"], pixels)
    assert not any(module.training for module in teacher.model.modules())  # law 2


@pytest.mark.parametrize("image_format, prepare", [("BGR", True), ("RGB", False)])
def test_evaluating_the_teacher_first_does_not_change_the_training(tmp_path, image_format, prepare):
    """A student whose sampling of proposals draws random numbers, and a teacher with batch norms."""
    job = Job(tmp_path, "faster")
    job.node.TEACHER_PREPARE = prepare
    teacher = tiny_config("faster", width=16)
    teacher.INPUT.FORMAT = image_format
    job.use_teacher(teacher)
    options = ["SOLVER.MAX_ITER", 2]
    job.run(opts=[*options, "OUTPUT_DIR", tmp_path / "without"])
    job.run(opts=[*options, *EVAL_TEACHER])
    assert_equal(checkpoint(tmp_path / "without")["model"], checkpoint(job.output)["model"])
    log = (job.output / "log.txt").read_text()
    parts = ["Evaluation of the teacher (", "copypaste: Task: bbox", "Starting training from iteration"]
    places = [log.index(part) for part in parts]
    assert places == sorted(places) and log.count(parts[0]) == 1
    assert log.count(parts[1]) == 2  # and the student at the end
    assert (job.output / "teacher" / "inference").is_dir()


def test_no_evaluation_of_the_teacher_where_a_run_goes_on(job):
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, *EVAL_TEACHER]
    job.run(opts=["SOLVER.MAX_ITER", 1, *options])
    job.run("--resume", opts=["SOLVER.MAX_ITER", 2, *options])
    log = (job.output / "log.txt").read_text()
    assert log.count("Evaluation of the teacher (") == 1 and "iteration 1" in log


def test_no_evaluation_of_the_teacher_unless_asked(trained):
    trained.run("--eval-only")
    trained.run(opts=["SOLVER.MAX_ITER", 1])
    assert not (trained.output / "teacher").exists()


@pytest.mark.parametrize("arguments", [[], ["--eval-only"]])
def test_teacher_of_other_classes(trained, arguments):
    """A loss on features takes any teacher, but the dataset's boxes are not of its classes."""
    teacher = tiny_config(width=16)
    teacher.MODEL.RETINANET.NUM_CLASSES = 7
    trained.use_teacher(teacher)
    message = r"EVAL_TEACHER is True, but the teacher has 7 classes and the student 3; set it to False"
    with pytest.raises(ValueError, match=message):
        trained.run(*arguments, opts=EVAL_TEACHER)


def test_the_baseline_evaluates_no_teacher(trained):
    results = trained.run("--eval-only", distill=False, opts=[*EVAL_TEACHER, *NOWHERE])
    assert "teacher" not in results
    trained.run(distill=False, opts=[*EVAL_TEACHER, *NOWHERE, "SOLVER.MAX_ITER", 1])
    with pytest.raises(FileNotFoundError, match="there/is/no/teacher.yaml"):
        trained.run("--eval-only", opts=[*EVAL_TEACHER, *NOWHERE])
