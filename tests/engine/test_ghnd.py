"""GHND as a user trains with it: what is trained, what runs, evaluation with the bytes that are sent, images
without annotations."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from runs import Job, assert_equal, changed, checkpoint, detections, last_losses, metrics

from distill_d2.distiller import building
from distill_d2.engine import load_config
from distill_d2.teacher import Teacher, untrained_teacher
from distill_d2.testing.tiny import save_teacher, short_yaml, tiny_config, use_dataset, use_ghnd

NODE = "MODEL.DISTILLER."
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


def ghnd_job(folder, family="retinanet"):
    """A job whose student is its teacher but for a bottleneck, which does not evaluate."""
    job = Job(folder, family, width=16, evaluate=False)
    use_ghnd(job.config)
    return job


@pytest.fixture
def job(tmp_path):
    return ghnd_job(tmp_path)


def teacher_weights(job):
    return torch.load(job.folder / "teacher" / "teacher.pth", weights_only=True)["model"]


def student_of(trainer):
    """A copy of the student's tensors."""
    state = trainer.plain_model.student.state_dict()
    return {name: value.clone() for name, value in state.items()}


# What is trained.


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_exactly_the_stem_and_the_first_stage_change(tmp_path, family):
    job = ghnd_job(tmp_path, family)
    trainer = job.trainer(opts=["SOLVER.MAX_ITER", 2])
    start = student_of(trainer)
    student = trainer.plain_model.student
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {STEM} | RES2
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 25
    trainer.train()
    saved, teacher = checkpoint(job.output)["model"], teacher_weights(job)
    assert changed(start, saved) | NEVER_MOVED == {STEM} | RES2 | STATISTICS
    copied = {name for name in saved if ".res2." not in name and name != STEM}
    assert copied == {name for name in teacher if ".res2." not in name and name != STEM}
    assert all(torch.equal(saved[name], teacher[name]) for name in copied)
    assert torch.equal(start[STEM], teacher[STEM])


def test_packaged_config(monkeypatch, shared):
    """Of the reference's main experiment: it trains the same tensors, and all others start from the teacher;
    random weights."""
    monkeypatch.setattr(
        building, "teacher_of", lambda *node: Teacher(untrained_teacher(*node)[0], prepare=False)
    )
    cfg = load_config("Distillation-GHND/faster_rcnn_R_50_FPN_ghnd.yaml", ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.DISTILLER.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    model = build_model(cfg)
    trained = {name for name, p in model.student.named_parameters() if p.requires_grad}
    with np.load(shared / "golden" / "ghnd.npz") as golden:
        reference = {detectron2_name(str(name)) for name in golden["full/trainable"]}
    assert len(reference) == 25 and trained == reference == {STEM} | RES2
    model.preload_student()
    student, teacher = model.student.state_dict(), model.teacher.model.state_dict()
    equal = {name for name in teacher if name in student and torch.equal(student[name], teacher[name])}
    assert set(student) - equal == RES2 | STATISTICS


def detectron2_name(name):
    return "backbone.bottom_up." + name.replace("layer1.", "res2.").replace("conv1.", "stem.conv1.")


def test_with_the_students_own_losses(job):
    """Nothing but FREEZE is frozen then, and the heads are trained."""
    job.run(opts=[NODE + "TASK_LOSS_WEIGHT", 1.0, "SOLVER.MAX_ITER", 2])
    distilled = {"loss_ghnd_res2", "loss_ghnd_res3", "loss_ghnd_res4"}
    assert distilled | {"loss_cls", "loss_box_reg"} <= set(last_losses(job.output))
    saved, teacher = checkpoint(job.output)["model"], teacher_weights(job)
    fixed = {n for n in teacher if n in saved and torch.equal(saved[n], teacher[n])}
    assert all(".res3." in n or ".res4." in n or ".stem.conv1.norm." in n for n in fixed)
    assert len(fixed) == 2 * 3 * 6 + 5  # per norm a convolution's weight too


# What runs in a step.


def refuse(module):
    module.register_forward_pre_hook(lambda *_: pytest.fail("a part that no loss reads was computed"))


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
    trainer = job.trainer(opts=[NODE + "GHND.IN_FEATURES", levels, "SOLVER.MAX_ITER", 2])
    model = trainer.plain_model
    for detector in (model.student, model.teacher.model):
        refused = [m for name, m in detector.named_modules() if name.startswith(tuple(unread))]
        assert len(refused) >= len(unread)
        for module in refused:
            refuse(module)
    trainer.train()
    assert checkpoint(job.output)["trainer"]["iteration"] == 1


def test_a_loss_that_is_off_computes_no_teacher(job):
    job.node.MEASURE_GRADIENTS = False  # they are those of iteration 2
    trainer = job.trainer(opts=[NODE + "GHND.START_ITER", 2, "SOLVER.MAX_ITER", 3])
    trainer.max_iter = 2
    refuse(trainer.plain_model.teacher.model.backbone)
    start = student_of(trainer)
    trainer.train()
    assert changed(start, student_of(trainer)) == STATISTICS  # the student's own forward moves them


# Evaluation of the student.


@pytest.fixture
def trained(job):
    """A job that has been run, and evaluates; detections have different scores."""
    job.use_detecting_teacher()
    job.run(opts=["SOLVER.MAX_ITER", 1])
    use_dataset(job.config, job.entry)
    job.config.MODEL.WEIGHTS = f"{job.output}/model_final.pth"
    return job


@pytest.mark.parametrize("distill", [False, True])
def test_bytes_beside_ap(trained, distill):
    """Without a Distiller, and without its teacher; images of 48x64, padded to multiples of 16."""
    nowhere = [NODE + "MODEL_DISTILLER_CONFIG", "there/is/no/teacher.yaml"]
    results = trained.run("--eval-only", distill=distill, opts=nowhere)
    assert set(results) == {"bbox", "bytes_per_image"} and results["bbox"]["AP"] >= 0
    numbers = 2 * (48 / 4 + 4) * (64 / 4 + 4)
    assert results["bytes_per_image"] == {"raw": 4 * numbers, "16bit": 2 * numbers, "8bit": numbers}
    log = (trained.output / "log.txt").read_text()
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
    logged = [line.get("bytes_per_image/8bit") for line in metrics(job.output)]
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
    assert_equal(checkpoint(images.output)["model"], checkpoint(annotated)["model"])


def test_images_beside_annotated_ones(images):
    alone, annotated = images.config.DATASETS.TRAIN[0], images.entry["NAME"]
    for names in ((annotated, alone), (alone, annotated)):
        images.run("--overwrite", opts=["DATASETS.TRAIN", names, "SOLVER.MAX_ITER", 1, *ON_IMAGES])
        assert 0 < last_losses(images.output)["loss_ghnd_res2"] < math.inf


def test_images_cannot_be_evaluated_on(images):
    images.config.DATASETS.TEST = images.config.DATASETS.TRAIN
    images.fails(ValueError, images.config.DATASETS.TEST[0], "evaluator_type", opts=ON_IMAGES)


# LazyConfigs.


def test_lazy_config(lazy_job):
    """FREEZE, PRELOAD_NAMES, TASK_LOSS_WEIGHT 0 and EVAL_TEACHER, as in a yaml file."""
    student = tiny_config(width=16)
    student.VERSION = 2
    use_ghnd(student)
    (lazy_job.folder / "student.yaml").write_text(short_yaml(student))
    keys = """TYPES=["GHND"], TASK_LOSS_WEIGHT=0.0, PRELOAD_NAMES=["."], EVAL_TEACHER=True,
    FREEZE=["bottom_up.res[345]", "stem.conv1.norm"], GHND=dict(IN_FEATURES=["res2", "res3"])"""
    lazy_job.replace('TYPES=["PKD"]', keys)
    results = lazy_job.run("optimizer.lr=1e-6", "train.max_iter=2")
    assert set(results) == {"bbox", "bytes_per_image"}
    assert set(last_losses(lazy_job.output)) == {"loss_ghnd_res2", "loss_ghnd_res3"}
    log = (lazy_job.output / "log.txt").read_text()
    assert log.index("Evaluation of the teacher (") < log.index("Starting training from iteration 0")

    saved, teacher = checkpoint(lazy_job.output)["model"], teacher_weights(lazy_job)
    assert {n for n in teacher if n in saved and not torch.equal(saved[n], teacher[n])} == {STEM}
    assert set(saved) - set(teacher) == RES2 | STATISTICS

    weights = f"train.init_checkpoint={lazy_job.output}/model_final.pth"
    results = lazy_job.run("--eval-only", weights)
    assert set(results) == {"bbox", "bytes_per_image", "teacher"} and set(results["teacher"]) == {"bbox"}
    for arguments, distill in (((), False), (("distiller.EVAL_TEACHER=False",), True)):
        results = lazy_job.run("--eval-only", weights, *arguments, distill=distill)
        assert set(results) == {"bbox", "bytes_per_image"}
    cfg = tiny_config(width=16)
    cfg.MODEL.RETINANET.NUM_CLASSES = 7
    other = f"distiller.MODEL_DISTILLER_CONFIG={save_teacher(cfg, lazy_job.folder / 'other')}"
    with pytest.raises(ValueError, match="the teacher has 7 classes and the student 3"):
        lazy_job.run("--eval-only", weights, other)
