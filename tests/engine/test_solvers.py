"""Losses with a solver of their own, and the training phases of MODEL.DISTILLER."""

import detectron2.solver
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from probe_loss import LAZY_PROBE, ProbeLoss, solver_of
from runs import assert_equal, checkpoint, metrics, rewind, run_forked
from torch import nn

from distill_d2 import DISTILL_LOSS_REGISTRY
from distill_d2.distiller import Distiller
from distill_d2.engine import build_optimizer
from distill_d2.engine.optimizer import trained_with_student
from distill_d2.engine.step import TrainStep
from distill_d2.testing import distiller_config, save_teacher, tiny_config

SOLVER = "MODEL.DISTILLER.SOLVER."
PRETRAIN = "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS"

pytestmark = pytest.mark.usefixtures("log_every_iteration")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """For these tests only: a registered loss has a node in every config, also of other tests' jobs."""
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "ProbeLoss", ProbeLoss)


@pytest.fixture
def probe(_registered, job):
    job.node.TYPES = ["ProbeLoss"]
    return job


# The optimizer of one loss.


def test_joint_clip_and_sgd_by_hand():
    """Gradients 3 and 4 have norm 5, clipped to 1: 0.6 and 0.8; then momentum without a second clip."""
    loss = ProbeLoss()
    clip = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0}
    keys = {"OPTIMIZER": "sgd", "BASE_LR": 0.1, "WEIGHT_DECAY": 0.0, "CLIP_GRADIENTS": CfgNode(clip)}
    solver = solver_of(loss, **keys)
    for parameter in loss.parameters():
        nn.init.zeros_(parameter)
    for expected in (-0.1, -0.1 - 0.19):
        loss.query.grad, loss.value.grad = torch.tensor([3.0]), torch.tensor([4.0])
        solver.optimizer.step()
        torch.testing.assert_close(loss.query, torch.tensor([0.6 * expected]))
        torch.testing.assert_close(loss.value, torch.tensor([0.8 * expected]))


@pytest.mark.parametrize(
    "enabled, clip_type, expected",
    [(False, "full_model", 4.0), (True, "value", 1.0), (True, "norm", 1.0)],
)
def test_other_clipping(enabled, clip_type, expected):
    loss = ProbeLoss()
    clip = {"ENABLED": enabled, "CLIP_TYPE": clip_type, "CLIP_VALUE": 1.0}
    keys = {"OPTIMIZER": "SGD", "BASE_LR": 1.0, "WEIGHT_DECAY": 0.0, "CLIP_GRADIENTS": CfgNode(clip)}
    solver = solver_of(loss, **keys)
    before = loss.value.detach().clone()
    loss.value.grad = torch.tensor([4.0])
    solver.optimizer.step()  # the other parameter has no gradient
    torch.testing.assert_close(before - loss.value, torch.tensor([expected]))


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_clipping_of_the_student_equals_detectron2s(clip_type):
    cfg = tiny_config()
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, clip_type, 0.5
    results = []
    for build in (build_optimizer, detectron2.solver.build_optimizer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        optimizer = build(cfg, model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mul(10).sum().backward()
            optimizer.step()
        results.append(model.state_dict())
    assert_equal(*results)


def test_schedule_is_the_students_in_length_and_steps():
    solver = solver_of(ProbeLoss(), LR_SCHEDULER_NAME="WarmupMultiStepLR", WARMUP_ITERS=0, STEPS=(1,))
    rates = []
    for iteration in range(4):
        rates.append(solver.lr)
        solver.optimizer.step()
        solver.advance(iteration)
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"OPTIMIZER": "LAMB"}, "MODEL.DISTILLER.SOLVER.OPTIMIZER is 'LAMB'; expected one of .*'AdamW'"),
        (
            {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"},  # fails at the last iteration
            "MODEL.DISTILLER.SOLVER.LR_SCHEDULER_NAME is 'Warm.*'; expected one of .*WarmupCosineLR",
        ),
        ({"BASE_RL": 1.0}, "BASE_RL"),
        ({"BASE_LR": 0.0}, "MODEL.DISTILLER.SOLVER: expected BASE_LR above 0"),
        ({"BASE_LR_END": 1.0}, "BASE_LR_END from 0 to BASE_LR; got BASE_LR 0.0001, BASE_LR_END 1.0"),
        ({"WARMUP_METHOD": "slow"}, "SOLVER.WARMUP_METHOD is 'slow'; expected one of"),
        ({"RESCALE_INTERVAL": True, "WARMUP_ITERS": 9}, "RESCALE_INTERVAL needs WARMUP_ITERS, 9, below"),
        (
            {"CLIP_GRADIENTS": CfgNode({"CLIP_TYPE": "some"})},
            r"MODEL.DISTILLER.SOLVER.CLIP_GRADIENTS.CLIP_TYPE is 'some'; expected one of \['full_model'",
        ),
    ],
)
def test_wrong_value_names_its_key(keys, message):
    with pytest.raises((ValueError, KeyError), match=message):
        solver_of(ProbeLoss(), **keys)


# In training.


def test_student_optimizer_leaves_these_parameters_out(probe):
    probe.node.TYPES = ["FeatureMimic", "ProbeLoss"]
    probe.node.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    trainer = probe.trainer()
    found = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    model = trainer.plain_model
    expected = [*model.student.parameters(), *model.losses["FeatureMimic"].parameters()]
    assert {id(p) for p in found} == {id(p) for p in expected} and len(found) == len(expected)
    own = trainer.loss_training.solvers["ProbeLoss"].optimizer.param_groups[0]["params"]
    assert {id(p) for p in own} == {id(p) for p in model.losses["ProbeLoss"].parameters()}


def test_resume_with_another_optimizer(probe):
    probe.run()
    message = "optimizer of ProbeLoss is AdamW of 2 tensors, this run's is SGD of 2 tensors"
    with pytest.raises(ValueError, match=message):
        probe.run("--resume", opts=[SOLVER + "OPTIMIZER", "SGD"])


def test_resume_where_the_loss_has_no_solver_any_more(probe, monkeypatch):
    probe.run()
    monkeypatch.setattr(ProbeLoss, "has_solver", False)
    with pytest.raises(ValueError, match=r"the losses \['ProbeLoss'\], this run has them of \[\]"):
        probe.run("--resume")


def test_resume_with_another_length_of_pretraining(probe):
    probe.run()
    with pytest.raises(ValueError, match=r"PRETRAIN_TEACHER_ITERS is 2, but the checkpoint's run has 0"):
        probe.run("--resume", opts=[PRETRAIN, 2])


def test_scalars_and_log_line(probe):
    probe.run(opts=[SOLVER + "WARMUP_ITERS", 0, SOLVER + "BASE_LR", 0.5])
    lines = [line for line in metrics(probe.output) if "ProbeLoss/lr" in line]
    cosine = [0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)]
    assert [line["ProbeLoss/lr"] for line in lines] == pytest.approx(cosine, abs=1e-6)
    # d/dquery = 2 query value^2, d/dvalue = 2 query^2 value + 1, both ones: 2 and 3, before clipping
    assert lines[0]["ProbeLoss/grad_norm"] == pytest.approx(13**0.5)
    assert all(line["grad_norm"] > 0 for line in lines)
    parts = sum(value for name, value in lines[0].items() if name.startswith("loss_"))
    assert lines[0]["total_loss"] == pytest.approx(parts)
    log = (probe.output / "log.txt").read_text()
    assert log.count("ProbeLoss/grad_norm:") == 4 and "grad_norm: 3.606" in log


def test_no_gradient_norms_without_an_own_solver(job):
    job.run()
    assert not any("grad_norm" in line for line in metrics(job.output))
    assert "grad_norm" not in (job.output / "log.txt").read_text()


def test_loss_stops_its_schedule_and_freezes_its_parameters(probe, monkeypatch):
    monkeypatch.setattr(ProbeLoss, "stop_after", 1)
    probe.run(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
    folder = probe.output
    early, late = (checkpoint(folder, name)["distiller"] for name in ("model_0000001", "model_final"))
    assert torch.equal(early["ProbeLoss.query"], late["ProbeLoss.query"])
    assert not torch.equal(early["ProbeLoss.value"], late["ProbeLoss.value"])
    assert not torch.equal(early["ProbeLoss.query"], torch.ones(1))
    assert checkpoint(folder)["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 2


# Phases.


@pytest.mark.parametrize(
    "key, optimizer, clip",
    [("FIX_BACKBONE_BEFORE", "SGD", "value"), ("FIX_HEAD_BEFORE", "ADAMW", "full_model")],
)
def test_fixed_part_of_the_student(job, key, optimizer, clip):
    job.config.SOLVER.OPTIMIZER = optimizer
    job.config.SOLVER.CLIP_GRADIENTS.ENABLED = True
    job.config.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip
    job.config.SOLVER.BASE_LR = 1e-3
    student = job.trainer().plain_model.student
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trained = {name for name, _ in student.named_parameters()}
    job.run(opts=[f"MODEL.DISTILLER.{key}", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    fixed = {n for n in trained if n.startswith("backbone.") == (key == "FIX_BACKBONE_BEFORE")}
    for name, moved in (("model_0000001", trained - fixed), ("model_0000002", trained)):
        model = checkpoint(job.output, name)["model"]
        assert {n for n in trained if not torch.equal(start[n], model[n])} == moved


def test_pretraining_leaves_the_student_alone(probe):
    start = probe.trainer().plain_model.student
    start = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    probe.run(opts=[PRETRAIN, 3, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1])
    folder = probe.output
    pretrained, after = checkpoint(folder, "model_0000002"), checkpoint(folder, "model_0000003")
    assert_equal(start, pretrained["model"])
    assert not pretrained["trainer"]["_trainer"]["optimizer"]["state"]
    assert pretrained["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 0
    assert pretrained["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 0
    assert not torch.equal(pretrained["distiller"]["ProbeLoss.query"], torch.ones(1))
    assert torch.equal(pretrained["distiller"]["ProbeLoss.value"], torch.ones(1))  # frozen
    assert any(not torch.equal(start[name], after["model"][name]) for name in start)
    last = checkpoint(folder)["trainer"]
    assert last["iteration"] == 6
    assert last["hooks"]["LRScheduler"]["last_epoch"] == 4
    lines = metrics(folder)
    evaluated = [line["iteration"] for line in lines if "bbox/AP" in line]
    assert evaluated and min(evaluated) == 3
    assert [line["iteration"] for line in lines if "loss_probe_pretrain" in line] == [0, 1, 2]


def test_pretrained_run_sees_iterations_from_zero(probe, monkeypatch):
    """START_ITER counts from the end of pretraining, and batches know negative iterations."""
    seen = []
    for name in ("forward", "pretrain"):
        original = getattr(ProbeLoss, name)

        def spy(self, *args, _original=original, _name=name):
            seen.append((_name, args[-1].iteration))
            return _original(self, *args)

        monkeypatch.setattr(ProbeLoss, name, spy)
    measured = ["MODEL.DISTILLER.MEASURE_GRADIENTS", False]
    probe.run(opts=[PRETRAIN, 2, "MODEL.DISTILLER.PROBE.START_ITER", 1, "SOLVER.MAX_ITER", 3, *measured])
    assert seen == [("pretrain", -2), ("pretrain", -1), ("forward", 1), ("forward", 2)]


def logged_lines(job):
    return [(line["iteration"], "bbox/AP" in line) for line in metrics(job.output)]


@pytest.mark.parametrize("last", ["model_0000000", "model_0000003"])
def test_resume_in_and_after_pretraining(probe, last):
    options = [PRETRAIN, 2, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1]
    probe.run(opts=options)
    whole, logged = checkpoint(probe.output), logged_lines(probe)
    rewind(probe.output, last)
    probe.run("--resume", opts=options)
    resumed = checkpoint(probe.output)
    assert logged_lines(probe) == logged
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])


def test_nothing_to_pretrain(job):
    with pytest.raises(ValueError, match=r"PRETRAIN_TEACHER_ITERS is 2, but none of .*'PKD'"):
        job.run(opts=[PRETRAIN, 2])


def test_no_term_to_pretrain_with(probe, monkeypatch):
    monkeypatch.setattr(ProbeLoss, "pretrain", lambda *_: {})
    with pytest.raises(ValueError, match="PRETRAIN_TEACHER_ITERS is 2, but no loss returned a term"):
        probe.run(opts=[PRETRAIN, 2])


@pytest.mark.parametrize("key", ["PRETRAIN_TEACHER_ITERS", "FIX_BACKBONE_BEFORE", "FIX_HEAD_BEFORE"])
def test_negative_phases(probe, key):
    with pytest.raises(ValueError, match=rf"MODEL.DISTILLER.{key} is -1"):
        probe.trainer(opts=[f"MODEL.DISTILLER.{key}", -1])


# Other trainers.


def test_default_trainer_trains_everything_with_one_optimizer(probe):
    cfg = probe.setup()
    trainer = DefaultTrainer(cfg)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    saved = checkpoint(probe.output)["model"]
    learned = [value for name, value in saved.items() if name.startswith("distiller.")]
    assert len(learned) == 2 and not any(torch.equal(value, torch.ones(1)) for value in learned)
    log = (probe.output / "log.txt").read_text()
    assert log.count("one optimizer also trains the parameters of ['ProbeLoss']") == 1


@pytest.mark.parametrize("key", ["PRETRAIN_TEACHER_ITERS", "FIX_BACKBONE_BEFORE", "FIX_HEAD_BEFORE"])
def test_default_trainer_refuses_phases(probe, key):
    cfg = probe.setup(opts=[f"MODEL.DISTILLER.{key}", 2])
    with pytest.raises(RuntimeError, match=rf"{key}': 2.*does not support these keys"):
        DefaultTrainer(cfg).train()


def test_lazy_config(lazy_job):
    lazy_job.replace('TYPES=["PKD"]', 'TYPES=["ProbeLoss"]')
    lazy_job.text += LAZY_PROBE
    lazy_job.run("train.checkpointer.period=1")
    whole = checkpoint(lazy_job.output)
    assert whole["trainer"]["iteration"] == 4
    solver = whole["trainer"]["solvers"]["ProbeLoss"]
    assert solver["scheduler"] == {"base_lrs": [0.5], "last_epoch": 3}
    rates = [line["ProbeLoss/lr"] for line in metrics(lazy_job.output) if "ProbeLoss/lr" in line]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.375, 0.125])  # cosine over train.max_iter
    (group,) = whole["trainer"]["_trainer"]["optimizer"]["param_groups"][:1]
    assert solver["optimizer"]["param_groups"][0]["params"] == [0, 1] and group["lr"] < 0.01
    rewind(lazy_job.output, "model_0000000")
    lazy_job.run("--resume", "train.checkpointer.period=1")
    resumed = checkpoint(lazy_job.output)["trainer"]["solvers"]["ProbeLoss"]
    assert resumed["scheduler"]["last_epoch"] == 3


def test_lazy_optimizer_sees_the_students_names(tmp_path):
    """Rates by name, as of a vision transformer's layers, are those of the student alone."""
    config = distiller_config(tiny_config(), save_teacher(tiny_config(), tmp_path))
    config.MODEL.DISTILLER.TYPES = ["FeatureMimic", "ProbeLoss"]
    config.MODEL.DISTILLER.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    model = Distiller(config)
    names = [name for name, _ in trained_with_student(model).named_parameters()]
    student = [name for name, _ in model.student.named_parameters()]
    assert names[: len(student)] == student
    assert all(name.startswith("distiller.FeatureMimic.") for name in names[len(student) :])
    assert not hasattr(model.student, "distiller")


# Scaled gradients with several optimizers.


class TwoLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.slopes = (2.0, 3.0)

    def forward(self, data):
        return {"loss_a": (self.a * self.slopes[0]).sum(), "loss_b": (self.b * self.slopes[1]).sum()}


def test_one_scaler_for_several_optimizers():
    """Steps and norms are of unscaled gradients; an overflow skips only its optimizer."""
    model, frozen = TwoLosses(), []
    student, own = (torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters())
    step = TrainStep(
        *(model, [None] * 4, student),
        autocast_dtype=None,
        own_optimizers={"Own": own},
        frozen_parameters=lambda: frozen,
    )
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with EventStorage() as storage:
        step.run_step()
        assert (model.a.item(), model.b.item()) == pytest.approx((0.8, 0.7))
        norms = {name: value for name, (value, _) in storage.latest().items() if "grad_norm" in name}
        assert norms == pytest.approx({"grad_norm": 2.0, "Own/grad_norm": 3.0})
        model.slopes = (2.0, 1e38)  # finite, but not times 4
        step.run_step()
        assert (model.a.item(), model.b.item()) == pytest.approx((0.6, 0.7))
        assert step.grad_scaler.get_scale() == 2.0
        assert storage.latest()["Own/grad_norm"][0] == pytest.approx(3.0)  # infinity is not JSON
        model.slopes = (2.0, 3.0)
        frozen.append(model.a)
        step.run_step()
        assert (model.a.item(), model.b.item()) == pytest.approx((0.6, 0.4))
        frozen.append(model.b)
        step.run_step()
        assert (model.a.item(), model.b.item()) == pytest.approx((0.6, 0.4))


# Several processes, with find_unused_parameters=False.


def test_processes_resume_from_two_to_one_and_back(probe):
    """An own solver, an adapter that idles, pretraining, and a fixed backbone."""
    probe.node.TYPES = ["FeatureMimic", "ProbeLoss"]
    probe.node.FEATURE_MIMIC.IN_FEATURES, probe.node.FEATURE_MIMIC.START_ITER = ["res3"], 1
    probe.node.PRETRAIN_TEACHER_ITERS, probe.node.FIX_BACKBONE_BEFORE = 2, 1
    probe.config.SOLVER.CHECKPOINT_PERIOD = 1
    folder = probe.output
    (output,) = run_forked(probe.command("tests/engine/probe_run.py", "--num-procs", 2))
    assert "processes: 2" in output
    first, pretrained = checkpoint(folder, "model_0000000"), checkpoint(folder, "model_0000001")
    assert_equal(first["model"], pretrained["model"])
    mimic = "FeatureMimic.pairs.adapters.res3.weight"
    assert torch.equal(first["distiller"][mimic], pretrained["distiller"][mimic])
    whole = checkpoint(folder)
    for processes, last in ((1, "model_0000000"), (2, "model_0000002")):
        rewind(folder, last)
        run_forked(probe.command("tests/engine/probe_run.py", "--num-procs", processes, "--resume"))
        resumed = checkpoint(folder)
        assert resumed["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 4
        # the loss's gradient does not depend on the images, so the number of processes changes nothing
        for name in ("ProbeLoss.query", "ProbeLoss.value"):
            torch.testing.assert_close(resumed["distiller"][name], whole["distiller"][name])
