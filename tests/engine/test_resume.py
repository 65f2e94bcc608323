"""A resumed run is the uninterrupted run, whatever the configuration; what a changed resume means is told."""

import json
import subprocess
import time

import pytest
import torch
from runs import Job, assert_equal, changed, checkpoint, metrics, rewind, run_commands

from distill_d2.engine import DistillTrainer, argument_parser, setup
from distill_d2.engine.changes import changes, settings_of_run
from distill_d2.testing import distiller_config, tiny_config

PRECISE_BN = ["TEST.EVAL_PERIOD", 1, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]
PERIOD = ["SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()"]


def resumed_and_whole(job, run, name="model_0000001"):
    """The last checkpoints of a run that went on after this checkpoint, and of one that did not stop."""
    run()
    whole = checkpoint(job.output)
    rewind(job.output, name)
    (job.output / "model_final.pth").unlink()
    run("--resume")
    return checkpoint(job.output), whole


@pytest.mark.parametrize(
    "opts",
    [
        ["DATALOADER.NUM_WORKERS", 2, "MODEL.FAST_KERNELS", True],
        ["SEED", -1, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", *PRECISE_BN],
    ],
    ids=["workers and fast kernels", "repeat factors and precise BN"],
)
def test_resumed_run_equals_the_whole(job, opts):
    job.config.INPUT.MIN_SIZE_TRAIN = (48, 56, 64)
    job.config.INPUT.CROP.ENABLED = True
    opts = [*PERIOD, *opts]
    resumed, whole = resumed_and_whole(job, lambda *arguments: job.run(*arguments, opts=opts))
    assert_equal(resumed["model"], whole["model"])


def test_resumed_run_of_a_lazy_config_equals_the_whole(lazy_job):
    lazy_job.replace("seed=1", "seed=-1")
    lazy_job.replace("period=2", "period=1")
    sampler = "from detectron2.data.samplers import RandomSubsetTrainingSampler as Sampler\n"
    lazy_job.text = sampler + lazy_job.text
    given = "total_batch_size=2,"
    lazy_job.replace(given, f"{given} sampler=L(Sampler)(size=6, subset_ratio=0.7),")
    resumed, whole = resumed_and_whole(lazy_job, lazy_job.run)
    assert_equal(resumed["model"], whole["model"])


def state_after_training(words):
    """What a process of several ends with: RetinaNet's moving average, and all buffers."""
    trainer = DistillTrainer(setup(argument_parser().parse_args(words), distill=True))
    trainer.resume_or_load(resume="--resume" in words)
    trainer.train()
    student = trainer.plain_model.student
    number = torch.tensor(float(student.loss_normalizer))
    return {"loss_normalizer": number, **dict(student.named_buffers())}


def test_each_process_resumes_with_its_own_state(pool, tmp_path):
    """The moving average of the number of positives, and batch norm's statistics."""
    job = Job(tmp_path, evaluate=False)
    job.config.merge_from_list([*PERIOD, "SOLVER.MAX_ITER", 3, "INPUT.CROP.ENABLED", True])
    results = []

    def run(*arguments):
        job.arguments()
        words = ["--num-gpus", "0", "--config-file", job.config_file, *arguments]
        results.append(pool.run(state_after_training, words))

    resumed, whole = resumed_and_whole(job, run)
    assert_equal(resumed["model"], whole["model"])
    for process, uninterrupted in zip(*results):
        assert_equal(process, uninterrupted)
    differ = changed(*results[0])
    assert "loss_normalizer" in differ and any(name.endswith("running_var") for name in differ)


@pytest.mark.parametrize(
    "opts, expected",
    [
        (
            ["SOLVER.STEPS", (3,)],
            "SOLVER.STEPS is [3], in the checkpoint [30000]: it holds from iteration 4 on",
        ),
        (["SOLVER.MAX_ITER", 5], "SOLVER.MAX_ITER is 5, in the checkpoint 4: the learning rate follows"),
        (["SOLVER.BASE_LR", 0.5], "SOLVER.BASE_LR is 0.5, in the checkpoint 0.01: without effect"),
        (["SOLVER.IMS_PER_BATCH", 1], "IMS_PER_BATCH is 1, in the checkpoint 2: the order of images"),
        (["SEED", 5], "SEED is 5, in the checkpoint 1: without effect"),
        (
            ["DATALOADER.NUM_WORKERS", 1],
            "NUM_WORKERS is 1, in the checkpoint 0: augmentations draw other",
        ),
        (
            ["MODEL.DISTILLER.TYPES", ["PKD", "FGFI"]],
            "TYPES is [PKD, FGFI], in the checkpoint [PKD]: it",
        ),
        (["OUTPUT_DIR", "elsewhere", "TEST.EVAL_PERIOD", 7], ""),
    ],
    ids=str,
)
def test_each_change_is_told_in_one_line(opts, expected):
    cfg = distiller_config(tiny_config(), "teacher.yaml", ["PKD"])
    saved = settings_of_run(cfg, 1, "6")
    cfg.merge_from_list(opts)
    lines = changes(saved, settings_of_run(cfg, 1, "6"), 4)
    assert len(lines) == bool(expected) and all(expected in line for line in lines)
    assert len(changes(saved, settings_of_run(cfg, 2, "5"), 4)) == len(lines) + 2


def test_other_data_and_lengths_are_told(job):
    def log():
        return (job.output / "log.txt").read_text()

    job.run(opts=["SOLVER.MAX_ITER", 2])
    with pytest.raises(ValueError, match=r"SOLVER.MAX_ITER .* is 1, but .* has trained 2 iterations"):
        job.trainer("--resume", opts=["SOLVER.MAX_ITER", 1])
    trainer = job.trainer("--resume", opts=["SOLVER.MAX_ITER", 2])
    with pytest.raises(ValueError, match="--resume: the checkpoint .* is of another trainer"):
        trainer.load_state_dict({"iteration": 1, "hooks": {}, "optimizer": {}})
    assert "has trained 2 iterations, all of them: nothing is left to train" in log()
    assert "in the checkpoint" not in log()
    file = job.folder / "data" / "annotations.json"
    data = json.loads(file.read_text())
    data["annotations"].pop()
    file.write_text(json.dumps(data))
    job.trainer("--resume")
    assert "the training images are 6 with checksum" in log()


@pytest.mark.slow
@pytest.mark.parametrize("processes, workers", [(1, 2), (3, 0)])
def test_killed_run(job, processes, workers):
    """No process is left, and the resumed run is the whole: weights, and metrics without gaps."""
    job.config.merge_from_list(
        ["SOLVER.IMS_PER_BATCH", 6, "SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 3]
    )
    job.config.merge_from_list(["DATALOADER.NUM_WORKERS", workers])
    command = job.command("train_distill.py", "--num-procs", processes)
    run_commands([*command, "OUTPUT_DIR", str(job.folder / "whole")])
    with open(job.folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    end = time.time() + 120
    while not list(job.output.glob("model_*.pth")):
        assert process.poll() is None and time.time() < end, (job.folder / "log").read_text()[-5000:]
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.time() + 12
    while in_session(process.pid):
        assert time.time() < end, f"{in_session(process.pid)} are left"
        time.sleep(0.1)
    assert not (job.output / "model_final.pth").exists()
    run_commands([*command, "--resume"])
    assert_equal(checkpoint(job.output)["model"], checkpoint(job.folder / "whole")["model"])
    resumed, whole = (
        [line["iteration"] for line in metrics(f)] for f in (job.output, job.folder / "whole")
    )
    # Processes whose launcher is killed stop as by a signal, which writes one more line.
    assert resumed == sorted({*resumed, *whole})


def in_session(number):
    """Processes of a session, without zombies."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=", "-s", str(number)], capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if "Z" not in line.split()[1]]
