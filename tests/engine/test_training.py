"""Training end to end in this process: laws 1 and 9, resume, metrics, interruption."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from job import Job

from distill_d2 import teacher as teacher_module
from distill_d2.config import student_config
from distill_d2.engine import DistillTrainer


def checkpoint(folder, name="model_final"):
    return torch.load(Path(folder) / f"{name}.pth", weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_weight_zero_equals_baseline_bit_for_bit(job, optimizer):
    """Law 1, with an adapter in the distilled run's optimizer."""
    job.config.SOLVER.OPTIMIZER = optimizer
    job.config.SOLVER.CLIP_GRADIENTS.ENABLED = True
    job.config.MODEL.DISTILLER.TYPES = ["FeatureMimic", "PKD", "GID"]
    job.config.MODEL.DISTILLER.FEATURE_MIMIC.IN_FEATURES = ["p2", "res3"]
    for name in ("FEATURE_MIMIC", "PKD", "GID"):
        job.config.MODEL.DISTILLER[name].WEIGHT = 0.0
    baseline, distilled = job.folder / "baseline", job.folder / "distilled"
    job.run(distill=False, opts=["OUTPUT_DIR", baseline])
    job.run(distill=True, opts=["OUTPUT_DIR", distilled])
    assert_equal(checkpoint(baseline)["model"], checkpoint(distilled)["model"])


def test_distilled_checkpoint_is_a_plain_student(job):
    job.config.MODEL.DISTILLER.TYPES = ["FeatureMimic"]
    job.config.MODEL.DISTILLER.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    job.run()
    saved = checkpoint(job.config.OUTPUT_DIR)
    plain = build_model(student_config(job.config))
    plain.load_state_dict(saved["model"], strict=True)
    DetectionCheckpointer(plain).load(os.path.join(job.config.OUTPUT_DIR, "model_final.pth"))
    adapter = "FeatureMimic.pairs.adapters.res3.weight"
    assert adapter in saved["distiller"] and adapter not in saved["model"]


def test_eval_only_builds_no_teacher(job, monkeypatch):
    job.run()
    monkeypatch.setattr(teacher_module, "load_teacher", lambda *_, **__: pytest.fail("a teacher"))
    results = job.run("--eval-only", opts=["MODEL.WEIGHTS", f"{job.config.OUTPUT_DIR}/model_final.pth"])
    assert "AP" in results["bbox"]
    assert job.run("--eval-only", "--resume")["bbox"].keys() == results["bbox"].keys()


@pytest.mark.parametrize("family", ["retinanet", "mask"])
def test_resumed_run_equals_uninterrupted(tmp_path, family):
    job = Job(tmp_path, family)
    job.config.MODEL.DISTILLER.TYPES = ["FeatureMimic"]
    job.config.MODEL.DISTILLER.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    job.config.SOLVER.OPTIMIZER = "ADAMW"
    job.config.SOLVER.BASE_LR = 1e-3
    job.config.SOLVER.CHECKPOINT_PERIOD = 3
    job.config.SOLVER.MAX_ITER = 6
    job.config.TEST.EVAL_PERIOD = 2  # evaluation must not change the random state
    job.run()
    whole = checkpoint(job.config.OUTPUT_DIR)
    (Path(job.config.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    (Path(job.config.OUTPUT_DIR) / "model_final.pth").unlink()
    job.run("--resume")
    resumed = checkpoint(job.config.OUTPUT_DIR)
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])
    assert resumed["trainer"]["iteration"] == 5


def test_resume_of_a_finished_run_trains_no_more(job):
    job.run()
    before = checkpoint(job.config.OUTPUT_DIR)["model"]
    assert "AP" in job.run("--resume")["bbox"]
    assert_equal(before, checkpoint(job.config.OUTPUT_DIR)["model"])


def test_each_loss_is_logged(job):
    job.run(opts=["MODEL.DISTILLER.TYPES", "['PKD','FeatureMimic']", "TEST.EVAL_PERIOD", 2])
    last = [line for line in metrics(job.config.OUTPUT_DIR) if "loss_cls" in line][-1]
    names = {"loss_cls", "loss_box_reg", "loss_pkd", "loss_feature_mimic", "total_loss", "lr"}
    assert names < set(last)
    parts = sum(value for name, value in last.items() if name.startswith("loss_"))
    assert last["total_loss"] == pytest.approx(parts, rel=0.2)  # medians of a few iterations
    assert list(Path(job.config.OUTPUT_DIR).glob("events.out.tfevents*"))


def test_non_finite_loss_names_term_and_iteration(job, monkeypatch):
    from distill_d2.losses.pkd import PKD

    forward = PKD.forward

    def broken(self, student, teacher, batch):
        terms = forward(self, student, teacher, batch)
        return {k: v * float("nan") for k, v in terms.items()} if batch.iteration == 2 else terms

    monkeypatch.setattr(PKD, "forward", broken)
    message = r"iteration 2 .*'loss_pkd': nan.* images of process 0 were .*\.png \(\d+x\d+\), .*\.png \("
    with pytest.raises(FloatingPointError, match=message):
        job.run(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
    folder = Path(job.config.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    assert all(torch.isfinite(t).all() for t in checkpoint(folder, "model_0000001")["model"].values())
    assert not (folder / "model_0000002.pth").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resumes_exactly(job, monkeypatch, number):
    from distill_d2.engine.step import TrainStep

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
    log = (Path(job.config.OUTPUT_DIR) / "log.txt").read_text()
    assert "The same command with --resume goes on from there" in log
    saved = (Path(job.config.OUTPUT_DIR) / "last_checkpoint").read_text()
    assert saved in ("model_0000001.pth", "model_0000002.pth")
    job.run("--resume")
    assert_equal(checkpoint(job.folder / "whole")["model"], checkpoint(job.config.OUTPUT_DIR)["model"])


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
    assert (Path(job.config.OUTPUT_DIR) / "last_checkpoint").read_text() == last


def test_preload_copies_only_into_a_fresh_run(job):
    job.config.MODEL.DISTILLER.PRELOAD_HEAD = True
    trainer = DistillTrainer(_setup(job))
    trainer.resume_or_load(resume=False)
    teacher = trainer.plain_model.teacher.model.state_dict()
    student = trainer.plain_model.student.state_dict()
    assert torch.equal(student["head.cls_score.weight"], teacher["head.cls_score.weight"])


def test_plain_default_trainer_trains_the_distiller(job):
    """Without our scripts: detectron2's own trainer and a config."""
    cfg = _setup(job)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    saved = checkpoint(cfg.OUTPUT_DIR)["model"]
    build_model(student_config(cfg)).load_state_dict(saved, strict=True)
    assert any("loss_pkd" in line for line in metrics(cfg.OUTPUT_DIR))


def test_extra_cfg_comes_before_the_command_line(job):
    extra = job.folder / "extra.yaml"
    extra.write_text("SOLVER: {BASE_LR: 0.5, MAX_ITER: 9}\n")
    cfg = _setup(job, opts=["EXTRA_CFG", f"['{extra}']", "SOLVER.MAX_ITER", 2])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 2)


def test_a_teacher_is_found_beside_the_extra_cfg_that_names_it(job):
    folder = job.folder / "extra"
    folder.mkdir()
    (folder / "my_teacher.yaml").write_text("VERSION: 2\n")
    node = "{DISTILLER: {MODEL_DISTILLER_CONFIG: my_teacher.yaml}}"
    (folder / "extra.yaml").write_text(f"MODEL: {node}\n")
    cfg = _setup(job, opts=["EXTRA_CFG", f"['{folder / 'extra.yaml'}']"])
    assert cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG == str(folder / "my_teacher.yaml")


def _setup(job, opts=()):
    from distill_d2.engine import setup

    return setup(job.arguments(opts=opts), distill=True)


def test_mixed_precision_on_a_processor_that_has_it(job, monkeypatch):
    monkeypatch.setattr("distill_d2.engine.settings.native_bfloat16", lambda device: True)
    job.run(opts=["SOLVER.AMP.ENABLED", True])
    tensors = checkpoint(job.config.OUTPUT_DIR)["model"].values()
    assert all(t.dtype is not torch.bfloat16 and torch.isfinite(t).all() for t in tensors)


def test_progress_bar_on_a_terminal(job, monkeypatch, capsys):
    from distill_d2.engine.hooks import ProgressBar

    job.run(opts=["OUTPUT_DIR", job.folder / "plain"])
    assert "4/4" not in capsys.readouterr().err
    monkeypatch.setattr(ProgressBar, "wanted", staticmethod(lambda: True))
    job.run()
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss=" in shown
