"""Training end to end in this process: checkpoints, resume, metrics, interruption, what is left behind."""

import copy
import json
import os
import pickle
import re
import signal

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import Job, assert_equal, checkpoint, metrics, rewind

from distill_d2 import teacher as teacher_module
from distill_d2.config import student_config
from distill_d2.engine import DistillTrainer, settings
from distill_d2.engine.hooks import ProgressBar
from distill_d2.engine.step import TrainStep
from distill_d2.losses.pkd import PKD
from distill_d2.run_files import COMMANDS, EVALUATIONS
from distill_d2.testing import tiny_batch


def test_eval_only_builds_no_teacher(job, monkeypatch):
    job.run()
    monkeypatch.setattr(teacher_module, "load_teacher", lambda *_, **__: pytest.fail("a teacher"))
    results = job.run("--eval-only", opts=["MODEL.WEIGHTS", job.output / "model_final.pth"])
    assert "AP" in results["bbox"]
    assert job.run("--eval-only", "--resume")["bbox"].keys() == results["bbox"].keys()
    notes = [json.loads(line) for line in (job.output / EVALUATIONS).read_text().splitlines()]
    assert [note["weights"] for note in notes] == [str(job.output / "model_final.pth")] * 2
    assert {f"bbox/{name}" for name in results["bbox"]} == notes[0].keys() - {"time", "weights"}
    assert len((job.output / COMMANDS).read_text().splitlines()) == 2 * 3


def test_overwrite_removes_earlier_results(job):
    job.run(opts=["SOLVER.MAX_ITER", 1])
    job.run("--eval-only", "--resume")
    job.run("--overwrite", opts=["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"])
    assert not (job.output / EVALUATIONS).exists()
    assert len((job.output / COMMANDS).read_text().splitlines()) == 2


def test_resumed_run_equals_uninterrupted(tmp_path):
    """With evaluations between, which must not change the random state."""
    job = Job(tmp_path, "mask", types=["FeatureMimic"])
    job.node.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    job.config.SOLVER.OPTIMIZER, job.config.SOLVER.BASE_LR = "ADAMW", 1e-3
    job.config.SOLVER.CHECKPOINT_PERIOD, job.config.SOLVER.MAX_ITER = 3, 6
    job.config.TEST.EVAL_PERIOD = 2
    job.run()
    whole = checkpoint(job.output)
    rewind(job.output, "model_0000002")
    job.run("--resume")
    resumed = checkpoint(job.output)
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])
    assert resumed["trainer"]["iteration"] == 5
    results = job.run("--resume")  # a finished run trains no more
    assert "AP" in results["bbox"]
    assert_equal(whole["model"], checkpoint(job.output)["model"])


class CountFilesAndThreads(HookBase):
    def __init__(self):
        self.counts = []

    def after_step(self):
        self.counts.append([len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")])


def test_files_and_threads_do_not_add_up(job, monkeypatch):
    """With a line, a checkpoint and an evaluation in every second iteration, of which the first may open some."""
    monkeypatch.setattr(settings, "LOG_PERIOD", 2)
    options = ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2]
    trainer = job.trainer(opts=options)
    count = CountFilesAndThreads()
    trainer.register_hooks([count])
    trainer.train()
    assert len(count.counts) == 8 and count.counts[3] == count.counts[5] == count.counts[7]


def test_what_training_leaves_behind(job):
    """The student can be pickled and copied; the distiller trains on; both without the trainer."""
    trainer = job.trainer(opts=["SOLVER.MAX_ITER", 2])
    trainer.train()
    model = trainer.plain_model
    modules = [*model.student.modules(), *model.teacher.model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    student = pickle.loads(pickle.dumps(model.student))
    assert_equal(student.state_dict(), checkpoint(job.output)["model"])
    DetectionCheckpointer(student).load(str(job.output / "model_final.pth"))  # detectron2's own
    with EventStorage():
        for distiller in (model, copy.deepcopy(model)):
            assert distiller.train()(tiny_batch())["loss_pkd"].isfinite()
    with torch.no_grad():
        assert len(model.eval()(tiny_batch())) == 2
    with pytest.raises(RuntimeError, match="trains only once"):
        trainer.train()


def test_each_loss_is_logged(job):
    job.run(opts=["MODEL.DISTILLER.TYPES", "['PKD','FeatureMimic']", "TEST.EVAL_PERIOD", 2])
    last = [line for line in metrics(job.output) if "loss_cls" in line][-1]
    names = {"loss_cls", "loss_box_reg", "loss_pkd", "loss_feature_mimic", "total_loss", "lr"}
    assert names < set(last)
    parts = sum(value for name, value in last.items() if name.startswith("loss_"))
    assert last["total_loss"] == pytest.approx(parts, rel=0.2)  # medians of a few iterations
    assert list(job.output.glob("events.out.tfevents*"))
    written = (job.output / "distill_config.yaml").read_text()
    assert re.search(r"^    PKD:\n(      .*\n)+?      # Neck levels \(p3\) or", written, re.MULTILINE)


def test_non_finite_loss_names_term_iteration_and_images(job, monkeypatch):
    forward = PKD.forward

    def broken(self, student, teacher, batch):
        terms = forward(self, student, teacher, batch)
        return {k: v * float("nan") for k, v in terms.items()} if batch.iteration == 2 else terms

    monkeypatch.setattr(PKD, "forward", broken)
    message = (
        r"iteration 2 .*'loss_pkd': nan.* images .* were of process 0 .*\.png \(\d+x\d+\), .*\.png \("
    )
    with pytest.raises(FloatingPointError, match=message):
        job.run(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
    assert (job.output / "last_checkpoint").read_text() == "model_0000001.pth"
    assert all(t.isfinite().all() for t in checkpoint(job.output, "model_0000001")["model"].values())
    assert not (job.output / "model_0000002.pth").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resumes_exactly(job, monkeypatch, number):
    job.run(opts=["OUTPUT_DIR", job.folder / "whole"])
    run_step = TrainStep.run_step

    def interrupted(self):
        if self.iter == 1:
            os.kill(os.getpid(), number)
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "run_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            job.run()
    assert stopped.value.code == 128 + number
    assert "The same command with --resume continues from there" in (job.output / "log.txt").read_text()
    saved = (job.output / "last_checkpoint").read_text()
    assert saved in ("model_0000001.pth", "model_0000002.pth")
    job.run("--resume")
    assert_equal(checkpoint(job.folder / "whole")["model"], checkpoint(job.output)["model"])


@pytest.mark.parametrize("period, last", [(2, "model_0000001.pth"), (0, "model_final.pth")])
def test_signal_during_evaluation(job, monkeypatch, period, last):
    evaluated = []

    def interrupted(cls, cfg, model):
        os.kill(os.getpid(), signal.SIGTERM)
        model.eval()
        evaluated.append(model([]))

    monkeypatch.setattr(DistillTrainer, "test", classmethod(interrupted))
    with pytest.raises(SystemExit):
        job.run(opts=["TEST.EVAL_PERIOD", period, "SOLVER.CHECKPOINT_PERIOD", 0])
    assert not evaluated
    assert (job.output / "last_checkpoint").read_text() == last


def test_preload_copies_only_into_a_fresh_run(job):
    job.node.PRELOAD_HEAD = True
    model = job.trainer().plain_model
    teacher, student = model.teacher.model.state_dict(), model.student.state_dict()
    assert torch.equal(student["head.cls_score.weight"], teacher["head.cls_score.weight"])


def test_plain_default_trainer_trains_the_distiller(job):
    """Without our scripts: detectron2's own trainer and a config."""
    cfg = job.setup()
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    build_model(student_config(cfg)).load_state_dict(checkpoint(job.output)["model"], strict=True)
    assert any("loss_pkd" in line for line in metrics(job.output))


def test_extra_cfg_comes_before_the_command_line(job):
    extra = job.folder / "extra.yaml"
    extra.write_text("SOLVER: {BASE_LR: 0.5, MAX_ITER: 9}\n")
    cfg = job.setup(opts=["EXTRA_CFG", f"['{extra}']", "SOLVER.MAX_ITER", 2])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 2)


def test_a_teacher_is_found_beside_the_extra_cfg_that_names_it(job):
    folder = job.folder / "extra"
    folder.mkdir()
    (folder / "my_teacher.yaml").write_text("VERSION: 2\n")
    node = "{DISTILLER: {MODEL_DISTILLER_CONFIG: my_teacher.yaml}}"
    (folder / "extra.yaml").write_text(f"MODEL: {node}\n")
    cfg = job.setup(opts=["EXTRA_CFG", f"['{folder / 'extra.yaml'}']"])
    assert cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG == str(folder / "my_teacher.yaml")


def test_mixed_precision_on_a_processor_that_has_it(job, monkeypatch):
    monkeypatch.setattr(settings, "native_bfloat16", lambda device: True)
    job.run(opts=["SOLVER.AMP.ENABLED", True])
    tensors = checkpoint(job.output)["model"].values()
    assert all(t.dtype is not torch.bfloat16 and torch.isfinite(t).all() for t in tensors)


def test_expected_results_are_verified(job):
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.1]]", "SOLVER.MAX_ITER", 1]
    with pytest.raises(SystemExit):
        job.run(opts=expected)
    with pytest.raises(SystemExit):
        job.run("--eval-only", "--resume", opts=expected)


def test_progress_bar_on_a_terminal(job, monkeypatch, capsys):
    job.run(opts=["OUTPUT_DIR", job.folder / "plain"])
    assert "4/4" not in capsys.readouterr().err
    monkeypatch.setattr(ProgressBar, "is_enabled", staticmethod(lambda: True))
    job.run()
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss=" in shown
