"""What a kill, a damaged or used folder, a full disk and a second run do to a training."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from detectron2.utils.events import EventStorage
from runs import Job, assert_equal, checkpoint, metrics

from distill_d2.engine import argument_parser, output_dir, settings
from distill_d2.engine.metrics import MetricsFile, mend, restore_scalars
from distill_d2.engine.step import TrainStep
from distill_d2.run_files import COMMANDS, EVALUATIONS

HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of eight iterations with checkpoints after 1, 3, 5, 7, evaluations after 3 and 7, and lines in
    metrics.json after 2, 5 and 7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "LOG_PERIOD", 3)
        torch.set_num_threads(1)
        job = Job(tmp_path_factory.mktemp("job"))
        job.config.SOLVER.CHECKPOINT_PERIOD, job.config.SOLVER.MAX_ITER = 2, 8
        job.config.TEST.EVAL_PERIOD = 4
        job.config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        job.run()
        yield job


@pytest.fixture
def used(finished, tmp_path):
    """That job, whose OUTPUT_DIR is a copy of the run's."""
    finished.config.OUTPUT_DIR = str(finished.folder / "output")
    shutil.copytree(finished.output, tmp_path / "output")
    finished.config.OUTPUT_DIR = str(tmp_path / "output")
    return finished


def content(folder):
    """By path; without log, lock and events."""
    skipped = ("log.txt", ".lock")
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in skipped and "tfevents" not in path.name
    }


def logged(folder):
    """The lines of metrics.json without times, as text, because NaN equals nothing."""
    times = ("time", "data_time", "eta_seconds")
    lines = [{k: v for k, v in line.items() if k not in times} for line in metrics(folder)]
    return [json.dumps(line) for line in lines]


def test_a_used_folder_is_not_written_to(used):
    before = content(used.output)
    with pytest.raises(
        ValueError, match="model_0000001.pth, .* of another run.*--resume .*--overwrite .*another"
    ):
        used.run()
    assert content(used.output) == before
    with pytest.raises(ValueError, match="give one of them"):
        used.run("--resume", "--overwrite")
    for key in ("MODEL.WEIGHTS", "MODEL.DISTILLER.TEACHER_WEIGHTS", "MODEL.DISTILLER.PRELOAD_TEACHER"):
        with pytest.raises(ValueError, match="--overwrite would remove '.*model_final.pth'.*copy it"):
            used.run("--overwrite", opts=[key, used.output / "model_final.pth"])
    assert content(used.output) == before


@pytest.mark.parametrize(
    "name, kind", [(".lock", "folder"), ("model_1.pth.partial", "folder"), ("inference", "file")]
)
def test_a_name_of_a_run_in_another_use(tmp_path, name, kind):
    path = tmp_path / name
    path.mkdir() if kind == "folder" else path.touch()
    with pytest.raises(ValueError, match=f"OUTPUT_DIR: '{path}' is a {kind}; .* another folder"):
        output_dir.claim(str(tmp_path), "OUTPUT_DIR", argument_parser().parse_args([]), tuple)


def test_evaluation_leaves_the_run_as_it_is(used):
    """It notes its results and its command."""
    (used.output / "config.yaml").write_text("of: the run")
    before = content(used.output)
    assert used.run("--eval-only", opts=["MODEL.WEIGHTS", used.output / "model_final.pth"])["bbox"]
    after = content(used.output)
    assert [path.name for path in after.keys() - before.keys()] == [EVALUATIONS]
    changed = {
        path.name for path in before if after[path] != before[path] and "inference" not in path.parts
    }
    assert changed == {COMMANDS}


def test_overwrite_removes_the_run_and_nothing_else(used):
    (used.output / "notes.txt").write_text("mine")
    (used.output / "best.pth").write_text("mine")
    used.run("--overwrite", opts=["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 0])
    assert [path.name for path in used.output.glob("model_*")] == ["model_final.pth"]
    assert {line["iteration"] for line in metrics(used.output)} == {0, 1}
    assert (used.output / "notes.txt").read_text() == (used.output / "best.pth").read_text() == "mine"


def test_two_runs_notice_each_other(used, monkeypatch):
    monkeypatch.setattr(output_dir, "_PATIENCE", 0.3)
    lock = str(used.output / ".lock")
    other = subprocess.Popen([sys.executable, "-c", HOLDS, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another run is writing there"):
            used.run("--resume")
    finally:
        other.kill()
        other.wait()
    used.run("--resume")  # the kernel has ended the lock


def in_step_5(output):
    for name in ("model_0000005", "model_final"):
        (output / f"{name}.pth").unlink()
    (output / "model_0000005.pth.partial").write_bytes(b"begun")


def in_evaluation(output):
    in_step_5(output)
    lines = (output / "metrics.json").read_text().splitlines()
    (output / "metrics.json").write_text(f"{lines[0]}\n{lines[1][:20]}")


def after_last_checkpoint(output):
    lines = (output / "metrics.json").read_text().splitlines(keepends=True)
    assert json.loads(lines[-2])["iteration"] == 7
    (output / "metrics.json").write_text("".join(lines[:-2]))


@pytest.mark.parametrize("killed", [in_step_5, in_evaluation, after_last_checkpoint])
def test_metrics_and_evaluations_have_no_gaps_and_no_repeats(used, killed):
    expected = sorted(logged(used.output))
    whole = checkpoint(used.output)
    killed(used.output)
    used.run("--resume")
    assert sorted(logged(used.output)) == expected
    assert not list(used.output.glob("*.partial"))
    assert_equal(checkpoint(used.output)["model"], whole["model"])


def test_a_folder_that_is_deleted_is_made_again(used, monkeypatch):
    run_step = TrainStep.run_step

    def deleting(self):
        if self.iter == 5:
            shutil.rmtree(used.output)
        run_step(self)

    monkeypatch.setattr(TrainStep, "run_step", deleting)
    (used.output / "model_final.pth").unlink()
    (used.output / "model_0000005.pth").unlink()
    used.run("--resume")
    assert (used.output / "model_final.pth").is_file()
    assert [line["iteration"] for line in metrics(used.output)] == [5, 7, 8]


def test_torn_lines_are_dropped(tmp_path):
    lines = [
        '{"iteration": 0, "a": 1}',
        "nonsense",
        "[" * 100_000,
        '{"a": 1}',
        '{"iteration": 1, "b": 2}',
    ]
    (tmp_path / "metrics.json").write_text("\n".join([*lines, '{"iteration": 2, "c": 3}', '{"iterat']))
    assert mend(str(tmp_path), 1) == {"iteration", "b"}
    assert (tmp_path / "metrics.json").read_text() == f"{lines[0]}\n{lines[-1]}\n"


def test_a_time_before_the_kill_has_no_line_of_its_own(tmp_path):
    with EventStorage(4) as storage:
        restore_scalars(storage, {"time": {"smooth": True, "values": [[0.5, 3]]}})
        MetricsFile(str(tmp_path)).write()
        assert storage.history("time").latest() == 0.5
    assert not (tmp_path / "metrics.json").exists()


def test_a_full_disk_leaves_whole_lines(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 0}\n')
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventStorage(1) as storage:
        storage.put_scalar("loss", 1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, old[1]))
        try:
            with pytest.raises(
                OSError, match=r"cannot write '.*metrics.json': .* needs \d+ bytes, \d+ are free"
            ):
                MetricsFile(str(tmp_path)).write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "metrics.json").read_text() == '{"iteration": 0}\n'
