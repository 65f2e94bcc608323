"""TEACHER_CACHE in whole runs: the same losses, from a teacher that is not run again."""

import pytest
from detectron2.utils.events import get_event_storage, has_event_storage
from lazy_job import LazyJob
from runs import Job, assert_equal, checkpoint, metrics, rewind

from distill_d2.teacher import Teacher

KEY = "MODEL.DISTILLER.TEACHER_CACHE"
PASS = 3  # iterations, with six images and batches of two


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("cache"), types=["PKD", "GID"], evaluate=False)
    job.node.GID.IN_FEATURES = ["p2", "p3", "p4"]
    job.node.MEASURE_GRADIENTS = False
    job.config.DATALOADER.ASPECT_RATIO_GROUPING = (
        False  # batches of mixed shapes, and no image waits for another
    )
    job.config.SOLVER.MAX_ITER = 3 * PASS
    job.config.SOLVER.BASE_LR = 1e-3
    return job


@pytest.fixture
def run(job, monkeypatch):
    """Runs; returns the losses of each iteration, and the iterations in which the teacher ran."""

    def run(name, place, *arguments, opts=()):
        iterations, plain = [], Teacher.run

        def counted(self, images, padded_size):
            if has_event_storage():
                iterations.append(get_event_storage().iter)
            plain(self, images, padded_size)

        monkeypatch.setattr(Teacher, "run", counted)
        trainer = job.trainer(*arguments, opts=["OUTPUT_DIR", job.folder / name, KEY, place, *opts])
        losses = []
        trainer.plain_model.register_forward_hook(
            lambda _module, _inputs, terms: losses.append({n: t.item() for n, t in terms.items()})
        )
        trainer.train()
        monkeypatch.setattr(Teacher, "run", plain)
        return losses, iterations

    return run


@pytest.fixture
def uncached(job, run):
    if not hasattr(job, "uncached"):
        job.uncached = run("uncached", "")
    return job.uncached


def assert_same_losses(one, other):
    assert len(one) == len(other) == 3 * PASS
    for first, second in zip(one, other):
        assert first == pytest.approx(second, rel=1e-5)


def test_memory_from_the_second_pass_on_the_teacher_is_not_run(job, run, uncached):
    losses, ran = run("memory", "memory")
    assert len(uncached[1]) == 3 * PASS and set(ran) == set(range(PASS))
    assert_same_losses(losses, uncached[0])
    log = (job.folder / "memory" / "log.txt").read_text()
    assert "6 images x 2 (mirrored) x 2.0 paddings" in log
    assert metrics(job.folder / "memory")[-1]["teacher_cache/hits"] == 1.0


def test_folder_is_shared_by_runs_and_by_a_resumed_one(job, run, uncached):
    place = job.folder / "kept"
    period = ("SOLVER.CHECKPOINT_PERIOD", 5)
    losses, ran = run("folder", place, opts=period)
    assert set(ran) == set(range(PASS))
    again, ran = run("second", place, opts=["SEED", 2, "MODEL.DISTILLER.PKD.WEIGHT", 1.0])
    assert not ran
    assert_same_losses(losses, uncached[0])
    whole = checkpoint(job.folder / "folder")
    # A resumed run starts without what is kept: its numbers are those of the whole run (law 13).
    rewind(job.folder / "folder", "model_0000004")
    (job.folder / "folder" / "model_final.pth").unlink()
    _, ran = run("folder", "memory", "--resume", opts=period)
    assert min(ran) == 5
    assert_equal(whole["model"], checkpoint(job.folder / "folder")["model"])


def test_half_is_close_and_too_little_room_is_told(job, run, uncached):
    opts = ["MODEL.DISTILLER.TEACHER_CACHE_HALF", True, f"{KEY}_GB", 2e-4]
    losses, ran = run("half", "memory", opts=opts)
    for first, second in zip(losses, uncached[0]):  # GID would choose other boxes
        assert first["loss_pkd"] == pytest.approx(second["loss_pkd"], rel=1e-3)
    assert losses[-1] != uncached[0][-1]
    assert PASS < len(ran) and max(ran) >= PASS
    assert "has room for" in (job.folder / "half" / "log.txt").read_text()


def test_refused_before_training(job):
    job.fails(
        ValueError,
        "MODEL.DISTILLER.TEACHER_CACHE is 'memory', but RandomCrop",
        opts=[KEY, "memory", "INPUT.CROP.ENABLED", True, "OUTPUT_DIR", job.folder / "refused"],
    )


def test_a_folder_that_cannot_be_written_is_told(job):
    file = job.folder / "file"
    file.write_text("")
    opts = [KEY, file / "below", "OUTPUT_DIR", job.folder / "unwritable"]
    job.fails(OSError, "TEACHER_CACHE: the folder", "cannot be written to", opts=opts)


def test_lazy_config(tmp_path):
    job = LazyJob(tmp_path)
    job.run("distiller.TEACHER_CACHE=memory", "distiller.MEASURE_GRADIENTS=False", "train.max_iter=8")
    hits = [line["teacher_cache/hits"] for line in metrics(job.output) if "total_loss" in line]
    assert hits[0] == 0.0 and hits[-1] == 1.0
