"""GHND end to end, as a user trains with it: what is trained and what runs, evaluation with the bytes
that are sent, images without annotations, the teacher's evaluation, processes, LazyConfigs."""

import copy
import json
import math
from pathlib import Path

import gid_run
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from job import Job
from promises import last_losses, processes_share_their_gradients, resumes_exactly, trains_and_saves
from test_gid import use_teacher
from test_icd import changed, trainer_of
from test_lazy import checkpoint as lazy_checkpoint
from test_lazy import config_file  # noqa: F401  a fixture
from test_lazy import run as run_lazy
from test_processes import command, run
from test_training import assert_equal, checkpoint, metrics
from test_wrong_input import fails

from distill_d2.distiller import building
from distill_d2.engine import load_config
from distill_d2.teacher import Teacher, untrained_teacher
from distill_d2.testing.tiny import save_teacher, tiny_config, use_dataset, use_ghnd

NODE = "MODEL.DISTILLER."
EVAL_TEACHER = [NODE + "EVAL_TEACHER", True]
STEM = "backbone.bottom_up.stem.conv1.weight"
CONVOLUTIONS = [f"encoder.{index}" for index in (0, 2, 5, 7)]
CONVOLUTIONS += [f"decoder.{index}" for index in (2, 4, 7, 9)]
NORMS = [f"encoder.{index}" for index in (1, 3, 6)] + [f"decoder.{index}" for index in (0, 3, 5, 8, 10)]
RES2 = {f"backbone.bottom_up.res2.{name}.weight" for name in CONVOLUTIONS + NORMS}
RES2 |= {f"backbone.bottom_up.res2.{name}.bias" for name in NORMS}
STATISTICS = {
    f"backbone.bottom_up.res2.{name}.{kind}"
    for name in NORMS
    for kind in ("running_mean", "running_var", "num_batches_tracked")
}
# A batch norm that follows without a ReLU takes these away: their gradient is 0 but for rounding.
NEVER_MOVED = {f"backbone.bottom_up.res2.decoder.{index}.bias" for index in (3, 8)}
ON_IMAGES = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]


def terms(family):
    count = {"retinanet": 3, "faster": 4}[family]
    return {f"loss_ghnd_res{stage}" for stage in (2, 3, 4, 5)[:count]}


def ghnd_job(folder, family="retinanet"):
    """A job whose student is its teacher but for a bottleneck, which does not evaluate."""
    job = Job(folder, family, width=16)
    job.config.DATASETS.TEST = ()
    use_ghnd(job.config)
    return job


@pytest.fixture
def job(tmp_path):
    return ghnd_job(tmp_path)


def teachers_weights(job, folder="teacher"):
    return torch.load(job.folder / folder / "teacher.pth", weights_only=True)["model"]


def student_of(trainer):
    """A copy of the student's tensors."""
    state = trainer.plain_model.student.state_dict()
    return {name: value.clone() for name, value in state.items()}


# What is trained.


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_trains_logs_and_saves(tmp_path, monkeypatch, family):
    logged, adapters = trains_and_saves(ghnd_job(tmp_path, family), monkeypatch)
    assert set(logged) == terms(family) and not adapters
    assert all(0 < logged[name] < math.inf for name in terms(family))


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_exactly_the_stem_and_the_first_stage_change(tmp_path, family):
    job = ghnd_job(tmp_path, family)
    trainer = trainer_of(job, opts=["SOLVER.MAX_ITER", 2])
    start = student_of(trainer)
    student = trainer.plain_model.student
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {STEM} | RES2
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 25
    trainer.train()
    saved, theirs = checkpoint(job.config.OUTPUT_DIR)["model"], teachers_weights(job)
    assert changed(start, saved) | NEVER_MOVED == {STEM} | RES2 | STATISTICS
    copied = {name for name in saved if ".res2." not in name and name != STEM}
    assert copied == {name for name in theirs if ".res2." not in name and name != STEM}
    assert all(torch.equal(saved[name], theirs[name]) for name in copied)
    assert torch.equal(start[STEM], theirs[STEM])


def test_trained_names_of_the_packaged_config(monkeypatch, shared):
    """Those that the reference trains, for the config of its main experiment; random weights."""
    monkeypatch.setattr(
        building, "teacher_of", lambda *node: Teacher(untrained_teacher(*node)[0], prepare=False)
    )
    model = build_model(packaged_config())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    with np.load(shared / "golden" / "ghnd.npz") as golden:
        reference = [str(name) for name in golden["full/trainable"]]
    assert len(reference) == 25
    assert names == {"student." + detectron2_name(name) for name in reference}


def packaged_config():
    cfg = load_config("Distillation-GHND/faster_rcnn_R_50_FPN_ghnd.yaml", ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.DISTILLER.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    return cfg


def detectron2_name(name):
    return "backbone.bottom_up." + name.replace("layer1.", "res2.").replace("conv1.", "stem.conv1.")


def test_packaged_config_starts_from_its_teacher(monkeypatch):
    monkeypatch.setattr(
        building, "teacher_of", lambda *node: Teacher(untrained_teacher(*node)[0], prepare=False)
    )
    model = build_model(packaged_config()).train()
    trained = {name for name, p in model.student.named_parameters() if p.requires_grad}
    assert trained == {STEM} | RES2
    model.preload_student()
    ours, theirs = model.student.state_dict(), model.teacher.model.state_dict()
    equal = {name for name in theirs if name in ours and torch.equal(ours[name], theirs[name])}
    assert set(ours) - equal == RES2 | STATISTICS


def test_hnd(job):
    """The predecessor: the first stage alone."""
    trainer, computed = trainer_of(job, opts=[NODE + "GHND.IN_FEATURES", "['res2']"]), set()
    trainer.model.register_forward_hook(lambda *args: computed.update(args[-1]))
    trainer.train()
    assert computed == {"loss_ghnd_res2"}
    saved, theirs = checkpoint(job.config.OUTPUT_DIR)["model"], teachers_weights(job)
    assert {n for n in theirs if n in saved and not torch.equal(saved[n], theirs[n])} == {STEM}


def test_with_the_students_own_losses(job):
    """Nothing but FREEZE is frozen then, and the heads are trained."""
    job.run(opts=[NODE + "TASK_LOSS_WEIGHT", 1.0, "SOLVER.MAX_ITER", 2])
    assert terms("retinanet") | {"loss_cls", "loss_box_reg"} <= set(last_losses(job.config.OUTPUT_DIR))
    saved, theirs = checkpoint(job.config.OUTPUT_DIR)["model"], teachers_weights(job)
    fixed = {n for n in theirs if n in saved and torch.equal(saved[n], theirs[n])}
    assert all(".res3." in n or ".res4." in n or ".stem.conv1.norm." in n for n in fixed)
    assert len(fixed) == 2 * 3 * 6 + 5  # per norm a convolution's weight too


def test_resumed_run_equals_uninterrupted(job):
    resumes_exactly(job)


# What runs in a step.


def refuse(module):
    module.register_forward_pre_hook(lambda *_: pytest.fail("what nobody reads was computed"))


@pytest.mark.parametrize(
    "family, levels, unread",
    [
        ("retinanet", ["res2", "res3", "res4"], ["head", "anchor_generator", "backbone.fpn_"]),
        ("retinanet", ["res2"], ["head", "backbone.fpn_", "backbone.bottom_up.res3"]),
        ("faster", ["res2", "res4", "res5"], ["proposal_generator", "roi_heads", "backbone.fpn_"]),
    ],
)
def test_nothing_else_is_computed(tmp_path, family, levels, unread):
    """Of either detector, in no step of a training."""
    job = ghnd_job(tmp_path, family)
    trainer = trainer_of(job, opts=[NODE + "GHND.IN_FEATURES", levels, "SOLVER.MAX_ITER", 2])
    model = trainer.plain_model
    for detector in (model.student, model.teacher.model):
        refused = [m for name, m in detector.named_modules() if name.startswith(tuple(unread))]
        assert len(refused) >= len(unread)
        for module in refused:
            refuse(module)
    trainer.train()
    assert checkpoint(job.config.OUTPUT_DIR)["trainer"]["iteration"] == 1


def test_a_loss_that_is_off_computes_no_teacher(job):
    trainer = trainer_of(job, opts=[NODE + "GHND.START_ITER", 2, "SOLVER.MAX_ITER", 2])
    refuse(trainer.plain_model.teacher.model.backbone)
    start = student_of(trainer)
    trainer.train()
    saved = checkpoint(job.config.OUTPUT_DIR)["model"]
    assert changed(start, saved) == STATISTICS  # the student's own forward moves them


# Evaluation of the student.


def detections(folder):
    """What was found, as COCO's json has it."""
    (file,) = Path(folder).glob("inference/*/coco_instances_results.json")
    return json.loads(file.read_text())


def use_detecting_teacher(job, image_format="BGR"):
    """A teacher whose scores differ from box to box, which those of a new detector hardly do; it and its
    student return boxes of any score. Its config."""
    cfg = tiny_config(width=16)
    cfg.INPUT.FORMAT = image_format
    for config in (cfg, job.config):
        config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    use_teacher(job, cfg)
    path = job.folder / "other" / "teacher.pth"
    saved = torch.load(path, weights_only=True)
    saved["model"]["head.cls_score.weight"].mul_(10)
    torch.save(saved, path)
    return cfg


@pytest.fixture
def trained(job):
    """A job that has been run, and evaluates."""
    use_detecting_teacher(job)
    job.run(opts=["SOLVER.MAX_ITER", 1])
    use_dataset(job.config, job.entry)
    job.config.MODEL.WEIGHTS = f"{job.config.OUTPUT_DIR}/model_final.pth"
    return job


@pytest.mark.parametrize("distill", [False, True])
def test_bytes_beside_ap(trained, distill):
    """Without a Distiller, and without its teacher; images of 48x64, padded to multiples of 16."""
    nowhere = [NODE + "MODEL_DISTILLER_CONFIG", "there/is/no/teacher.yaml"]
    results = trained.run("--eval-only", distill=distill, opts=nowhere)
    assert set(results) == {"bbox", "bytes_per_image"} and results["bbox"]["AP"] >= 0
    numbers = 2 * (48 / 4 + 4) * (64 / 4 + 4)
    assert results["bytes_per_image"] == {"raw": 4 * numbers, "16bit": 2 * numbers, "8bit": numbers}
    log = (Path(trained.config.OUTPUT_DIR) / "log.txt").read_text()
    assert "copypaste: Task: bytes_per_image" in log and "copypaste: raw,16bit,8bit" in log
    assert "copypaste: 2560.0000,1280.0000,640.0000" in log


def test_rounding_changes_detections_a_little(trained):
    path = trained.config.MODEL.WEIGHTS
    saved = torch.load(path, weights_only=True)
    # As large as the stage that it replaces: a new one's statistics are far from what it computes.
    saved["model"]["backbone.bottom_up.res2.decoder.10.weight"].mul_(1000)
    torch.save(saved, path)
    scores = {}
    for bits in (0, 8, 16):
        folder = trained.folder / f"bits{bits}"
        trained.run("--eval-only", opts=["MODEL.BOTTLENECK.QUANT_BITS", bits, "OUTPUT_DIR", folder])
        scores[bits] = torch.tensor(sorted(item["score"] for item in detections(folder)))
    differences = {bits: (scores[bits] - scores[0]).abs().max().item() for bits in (8, 16)}
    assert 0 < differences[16] < 1e-3 < differences[8] < 0.05


def test_evaluation_during_training(job):
    """Of the Distiller, between steps; the bytes are in metrics.json."""
    use_dataset(job.config, job.entry)
    results = job.run(opts=["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1])
    assert set(results) == {"bbox", "bytes_per_image"}
    logged = [line.get("bytes_per_image/8bit") for line in metrics(job.config.OUTPUT_DIR)]
    assert 640.0 in logged


# Images without annotations.


@pytest.fixture
def images(job):
    """A job that trains on a folder with the images of its dataset; the other dataset's name."""
    name = job.entry["NAME"]
    folder = {"NAME": f"{name}_images", "FORMAT": "images", "IMAGES": job.entry["IMAGES"]}
    job.config.DATASETS.CUSTOM = [job.entry, folder]
    job.config.DATASETS.TRAIN = (folder["NAME"],)
    return job


def test_images_alone_teach_as_annotated_ones_do(images):
    images.run(opts=["SOLVER.MAX_ITER", 2, *ON_IMAGES])
    images.config.DATASETS.TRAIN = (images.entry["NAME"],)
    annotated = images.folder / "annotated"
    images.run(opts=["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", annotated])
    assert_equal(checkpoint(images.config.OUTPUT_DIR)["model"], checkpoint(annotated)["model"])


def test_images_beside_annotated_ones(images):
    alone, annotated = images.config.DATASETS.TRAIN[0], images.entry["NAME"]
    for names in ((annotated, alone), (alone, annotated)):
        images.run(opts=["DATASETS.TRAIN", names, "SOLVER.MAX_ITER", 1, *ON_IMAGES])
        assert 0 < last_losses(images.config.OUTPUT_DIR)["loss_ghnd_res2"] < math.inf


KEYS = ["train_distill.py", "MODEL.DISTILLER.TASK_LOSS_WEIGHT 0", "FILTER_EMPTY_ANNOTATIONS False"]


@pytest.mark.parametrize(
    "distill, options",
    [(True, []), (True, [*ON_IMAGES, NODE + "TASK_LOSS_WEIGHT", 0.5]), (False, ON_IMAGES)],
)
def test_images_where_annotations_are_needed(images, distill, options):
    message = f"'{images.config.DATASETS.TRAIN[0]}' has no annotations: 6 images"
    fails(images, ValueError, message, *KEYS, distill=distill, opts=options)


def test_images_cannot_be_evaluated_on(images):
    images.config.DATASETS.TEST = images.config.DATASETS.TRAIN
    fails(images, ValueError, images.config.DATASETS.TEST[0], "evaluator_type", opts=ON_IMAGES)


# The teacher's evaluation.


def evaluated_alone(job, cfg):
    """Results and detections of a teacher as its own config evaluates it."""
    alone = copy.copy(job)
    alone.config, alone.config_file = cfg.clone(), str(job.folder / "alone.yaml")
    use_dataset(alone.config, job.entry)
    alone.config.VERSION = 2
    alone.config.MODEL.WEIGHTS = str(job.folder / "other" / "teacher.pth")
    alone.config.OUTPUT_DIR = str(job.folder / "alone")
    results = alone.run("--eval-only", distill=False)
    return results, detections(alone.config.OUTPUT_DIR)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_teacher_is_evaluated_too(trained, image_format):
    """On the student's images, each detector in its own channel order."""
    results, found = evaluated_alone(trained, use_detecting_teacher(trained, image_format))
    student = trained.run("--eval-only", opts=["OUTPUT_DIR", trained.folder / "without"])
    both = trained.run("--eval-only", opts=EVAL_TEACHER)
    assert both.pop("teacher")["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert both.keys() == student.keys()
    assert both["bbox"] == pytest.approx(student["bbox"], nan_ok=True)
    output = Path(trained.config.OUTPUT_DIR)
    assert len(found) > 100 and detections(output / "teacher") == found
    assert detections(output) == detections(trained.folder / "without") != found


def test_teacher_of_another_channel_order_sees_reversed_images(trained):
    use_detecting_teacher(trained, "RGB")
    trained.run(opts=["SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()])  # registers the dataset
    trainer, seen = trainer_of(trained, opts=EVAL_TEACHER), []
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
    job.config.MODEL.DISTILLER.TEACHER_PREPARE = prepare
    teacher = tiny_config("faster", width=16)
    teacher.INPUT.FORMAT = image_format
    use_teacher(job, teacher)
    options = ["SOLVER.MAX_ITER", 2]
    job.run(opts=[*options, "OUTPUT_DIR", tmp_path / "without"])
    job.run(opts=[*options, *EVAL_TEACHER])
    saved = [checkpoint(folder)["model"] for folder in (tmp_path / "without", job.config.OUTPUT_DIR)]
    assert_equal(*saved)
    log = (Path(job.config.OUTPUT_DIR) / "log.txt").read_text()
    parts = ["Evaluation of the teacher (", "copypaste: Task: bbox", "Starting training from iteration"]
    places = [log.index(part) for part in parts]
    assert places == sorted(places) and log.count(parts[0]) == 1
    assert log.count(parts[1]) == 2  # and the student at the end
    assert (Path(job.config.OUTPUT_DIR) / "teacher" / "inference").is_dir()


def test_no_evaluation_of_the_teacher_where_a_run_goes_on(job):
    use_dataset(job.config, job.entry)
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, *EVAL_TEACHER]
    job.run(opts=["SOLVER.MAX_ITER", 1, *options])
    job.run("--resume", opts=["SOLVER.MAX_ITER", 2, *options])
    log = (Path(job.config.OUTPUT_DIR) / "log.txt").read_text()
    assert log.count("Evaluation of the teacher (") == 1 and "iteration 1" in log


def test_no_evaluation_of_the_teacher_unless_asked(trained):
    trained.run("--eval-only")
    trained.run(opts=["SOLVER.MAX_ITER", 1])
    assert not (Path(trained.config.OUTPUT_DIR) / "teacher").exists()


@pytest.mark.parametrize("arguments", [[], ["--eval-only"]])
def test_teacher_of_other_classes(trained, arguments):
    """A loss on features takes any teacher, but the dataset's boxes are not of its classes."""
    teacher = tiny_config(width=16)
    teacher.MODEL.RETINANET.NUM_CLASSES = 7
    use_teacher(trained, teacher)
    message = r"EVAL_TEACHER is True, but the teacher has 7 classes and the student 3; set it to False"
    with pytest.raises(ValueError, match=message):
        trained.run(*arguments, opts=[*EVAL_TEACHER, NODE + "PRELOAD_NAMES", "['backbone']"])


def test_the_baseline_evaluates_no_teacher(trained):
    nowhere = [NODE + "MODEL_DISTILLER_CONFIG", "there/is/no/teacher.yaml"]
    results = trained.run("--eval-only", distill=False, opts=[*EVAL_TEACHER, *nowhere])
    assert "teacher" not in results
    trained.run(distill=False, opts=[*EVAL_TEACHER, *nowhere, "SOLVER.MAX_ITER", 1])
    with pytest.raises(FileNotFoundError, match="there/is/no/teacher.yaml"):
        trained.run("--eval-only", opts=[*EVAL_TEACHER, *nowhere])


# Several processes, with find_unused_parameters=False.


def test_two_processes(tmp_path):
    """Law 8: a loss that is off at first; gradients are the mean of two sums."""
    job = ghnd_job(tmp_path, "faster")
    job.config.MODEL.DISTILLER.GHND.START_ITER = 1
    start = trainer_of(job).plain_model.state_dict()
    torch.save(start, f"{job.config.OUTPUT_DIR}/start.pth")
    (lines,) = run(command(job, "tests/engine/gid_run.py", "--num-procs", 2))
    assert "World size: 2" in lines
    logged = last_losses(job.config.OUTPUT_DIR)
    assert all(logged[name] > 0 for name in terms("faster"))
    saved = checkpoint(job.config.OUTPUT_DIR)["model"]
    assert changed(start, saved) | NEVER_MOVED == {STEM} | RES2 | STATISTICS

    ranks = processes_share_their_gradients(job)
    for name, (iteration, _) in gid_run.STEPS.items():
        for rank in ranks:
            losses, gradients = rank[name]
            assert all((losses.get(term, 0.0) > 0) == (iteration > 0) for term in terms("faster"))
            assert len(gradients) == 25


# LazyConfigs.


def test_lazy_config(config_file):
    """FREEZE, PRELOAD_NAMES, TASK_LOSS_WEIGHT 0 and EVAL_TEACHER, as in a yaml file."""
    folder = config_file.parent
    student = tiny_config(width=16)
    student.VERSION = 2
    use_ghnd(student)
    (folder / "student.yaml").write_text(student.dump())
    keys = """TYPES=["GHND"], TASK_LOSS_WEIGHT=0.0, PRELOAD_NAMES=["."], EVAL_TEACHER=True,
    FREEZE=["bottom_up.res[345]", "stem.conv1.norm"], GHND=dict(IN_FEATURES=["res2", "res3"])"""
    config_file.write_text(config_file.read_text().replace('TYPES=["PKD"]', keys))
    results = run_lazy(config_file, "optimizer.lr=1e-6", "train.max_iter=2")
    assert set(results) == {"bbox", "bytes_per_image"}
    logged = last_losses(folder / "output")
    assert set(logged) == {"loss_ghnd_res2", "loss_ghnd_res3"}
    log = (folder / "output" / "log.txt").read_text()
    assert log.index("Evaluation of the teacher (") < log.index("Starting training from iteration 0")

    saved = lazy_checkpoint(config_file)["model"]
    theirs = torch.load(folder / "teacher" / "teacher.pth", weights_only=True)["model"]
    assert {n for n in theirs if n in saved and not torch.equal(saved[n], theirs[n])} == {STEM}
    assert set(saved) - set(theirs) == RES2 | STATISTICS

    weights = f"train.init_checkpoint={folder}/output/model_final.pth"
    results = run_lazy(config_file, "--eval-only", weights)
    assert set(results) == {"bbox", "bytes_per_image", "teacher"} and set(results["teacher"]) == {"bbox"}
    results = run_lazy(config_file, "--eval-only", weights, distill=False)
    assert set(results) == {"bbox", "bytes_per_image"}
    results = run_lazy(config_file, "--eval-only", weights, "distiller.EVAL_TEACHER=False")
    assert set(results) == {"bbox", "bytes_per_image"}
    other = save_teacher_of_other_classes(folder)
    with pytest.raises(ValueError, match="the teacher has 7 classes and the student 3"):
        run_lazy(config_file, "--eval-only", weights, f"distiller.MODEL_DISTILLER_CONFIG={other}")


def save_teacher_of_other_classes(folder):
    cfg = tiny_config(width=16)
    cfg.MODEL.RETINANET.NUM_CLASSES = 7
    return save_teacher(cfg, folder / "other")


def test_wrong_names_in_a_lazy_config(config_file):
    with pytest.raises(ValueError, match="MODEL.DISTILLER.FREEZE: 'res7' is found in no name"):
        run_lazy(config_file, "distiller.FREEZE=[res7]")


# Wrong input.


WRONG = {
    "freeze": (NODE + "FREEZE", "['res7']", ["'res7' is found in no name", "backbone."]),
    "expression": (NODE + "FREEZE", "['res[3']", ["'res[3' is no regular expression"]),
    "preload": (NODE + "PRELOAD_NAMES", "['res7']", ["'res7' is found in no name"]),
    "nothing": (NODE + "FREEZE", "['.']", ["nothing of the student is left to train"]),
    "quantizer": ("MODEL.BOTTLENECK.QUANT_BITS", 4, ["is 4", "8, 16, or 0"]),
    "weights": (NODE + "GHND.STAGE_WEIGHTS", "[1.0]", ["is [1.0]", "for each of IN_FEATURES"]),
}


@pytest.mark.parametrize("key, value, messages", WRONG.values(), ids=list(WRONG))
def test_wrong_values_on_the_command_line(job, key, value, messages):
    fails(job, ValueError, key, *messages, opts=[key, value])
