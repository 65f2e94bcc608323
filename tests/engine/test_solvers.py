"""Losses with a solver of their own, and the training phases of MODEL.DISTILLER."""

from pathlib import Path

import detectron2.solver
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from probe_loss import LAZY_PROBE, ProbeLoss
from test_lazy import config_file  # noqa: F401  a fixture
from test_lazy import run as run_lazy
from test_processes import command, run
from test_training import assert_equal, checkpoint, metrics
from torch import nn

from distill_d2 import DISTILL_LOSS_REGISTRY
from distill_d2.distiller import Distiller
from distill_d2.engine import DistillTrainer, build_optimizer, setup
from distill_d2.engine.solvers import LossSolver
from distill_d2.engine.step import TrainStep
from distill_d2.testing.tiny import distiller_config, save_teacher, tiny_batch, tiny_config

SOLVER = "MODEL.DISTILLER.SOLVER."
PRETRAIN = "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS"


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """For these tests only: a registered loss has a node in every config, also of other tests' jobs."""
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "ProbeLoss", ProbeLoss)


@pytest.fixture(autouse=True)
def _own_period(monkeypatch):
    """Write every iteration, not every 20."""
    monkeypatch.setattr("distill_d2.engine.settings.LOG_PERIOD", 1)


@pytest.fixture
def probe(_registered, job):
    job.config.MODEL.DISTILLER.TYPES = ["ProbeLoss"]
    return job


def loss_of(folder, name="model_final"):
    return checkpoint(folder, name)["distiller"]


def trainer_of(job, opts=()):
    return DistillTrainer(setup(job.arguments(opts=opts), distill=True))


def rewind(folder, name):
    (Path(folder) / "last_checkpoint").write_text(f"{name}.pth")


# The optimizer of one loss.


def solver_of(loss, max_iter=4, steps=(2,), **keys):
    loss.solver = CfgNode(keys)
    return LossSolver(loss, max_iter, steps)


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


def test_first_adamw_step_is_the_learning_rate():
    loss = ProbeLoss()
    solver = solver_of(loss, WEIGHT_DECAY=0.0)
    before = loss.value.detach().clone()
    loss.value.grad = torch.tensor([7.0])
    solver.optimizer.step()
    torch.testing.assert_close(before - loss.value, torch.tensor([1e-4]), rtol=1e-2, atol=0)
    assert isinstance(solver.optimizer, torch.optim.AdamW)


def test_one_weight_decay_for_norms_and_biases():
    loss = ProbeLoss()
    loss.norm = nn.LayerNorm(2)
    (group,) = solver_of(loss, WEIGHT_DECAY_NORM=0.5, WEIGHT_DECAY_BIAS=0.5).optimizer.param_groups
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == 4


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
    with pytest.raises(ValueError, match=message):
        solver_of(ProbeLoss(), **keys)


def test_unknown_key():
    with pytest.raises(KeyError, match="BASE_RL"):
        solver_of(ProbeLoss(), BASE_RL=1.0)


@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
def test_joint_clip_of_the_student(optimizer):
    cfg = tiny_config()
    cfg.SOLVER.OPTIMIZER = optimizer
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    for module, gradient in zip(model.values(), (3.0, 4.0)):
        module.weight.grad = torch.tensor([[gradient]])
    built = build_optimizer(cfg, model)
    built.step()
    clipped = [module.weight.grad.item() for module in model.values()]
    assert clipped == pytest.approx([0.6, 0.8], rel=1e-5)
    assert type(built).__name__ == {"SGD": "SGD", "ADAMW": "AdamW"}[optimizer]


# In training.


def test_student_equals_the_baseline_and_the_loss_learns(probe):
    """ProbeLoss sends no gradient to the student."""
    job = probe
    job.run(distill=False, opts=["OUTPUT_DIR", job.folder / "baseline"])
    job.run()
    baseline = checkpoint(job.folder / "baseline")["model"]
    assert_equal(baseline, checkpoint(job.config.OUTPUT_DIR)["model"])
    learnt = loss_of(job.config.OUTPUT_DIR)
    assert all(not torch.equal(value, torch.ones(1)) for value in learnt.values())


def test_student_optimizer_leaves_these_parameters_out(probe):
    probe.config.MODEL.DISTILLER.TYPES = ["FeatureMimic", "ProbeLoss"]
    probe.config.MODEL.DISTILLER.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    trainer = trainer_of(probe)
    theirs = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    model = trainer.plain_model
    expected = [*model.student.parameters(), *model.losses["FeatureMimic"].parameters()]
    assert {id(p) for p in theirs} == {id(p) for p in expected} and len(theirs) == len(expected)
    own = trainer.loss_training.solvers["ProbeLoss"].optimizer.param_groups[0]["params"]
    assert {id(p) for p in own} == {id(p) for p in model.losses["ProbeLoss"].parameters()}


def test_resumed_run_equals_uninterrupted(probe):
    job = probe
    job.config.SOLVER.CHECKPOINT_PERIOD = 2
    job.run()
    whole = checkpoint(job.config.OUTPUT_DIR)
    rewind(job.config.OUTPUT_DIR, "model_0000001")
    job.run("--resume")
    resumed = checkpoint(job.config.OUTPUT_DIR)
    assert_equal(whole["distiller"], resumed["distiller"])
    ours, theirs = (saved["trainer"]["solvers"]["ProbeLoss"] for saved in (resumed, whole))
    assert ours["scheduler"] == theirs["scheduler"]
    for index, state in theirs["optimizer"]["state"].items():
        assert_equal(ours["optimizer"]["state"][index], state)
    assert whole["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 4


def test_resume_without_the_states(probe):
    job = probe
    job.run()
    path = Path(job.config.OUTPUT_DIR) / "model_final.pth"
    saved = torch.load(path, weights_only=True)
    del saved["trainer"]["solvers"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"optimizers of the losses \[\], this run .*\['ProbeLoss'\]"):
        job.run("--resume")


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
    lines = [line for line in metrics(probe.config.OUTPUT_DIR) if "ProbeLoss/lr" in line]
    cosine = [0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)]
    assert [line["ProbeLoss/lr"] for line in lines] == pytest.approx(cosine, abs=1e-6)
    # d/dquery = 2 query value^2, d/dvalue = 2 query^2 value + 1, both ones: 2 and 3, before clipping
    assert lines[0]["ProbeLoss/grad_norm"] == pytest.approx(13**0.5)
    assert all(line["grad_norm"] > 0 for line in lines)
    parts = sum(value for name, value in lines[0].items() if name.startswith("loss_"))
    assert lines[0]["total_loss"] == pytest.approx(parts)
    log = (Path(probe.config.OUTPUT_DIR) / "log.txt").read_text()
    assert log.count("ProbeLoss/grad_norm:") == 4 and "grad_norm: 3.606" in log


def test_no_gradient_norms_without_an_own_solver(job):
    job.run()
    assert not any("grad_norm" in line for line in metrics(job.config.OUTPUT_DIR))
    assert "grad_norm" not in (Path(job.config.OUTPUT_DIR) / "log.txt").read_text()


def test_loss_stops_its_schedule_and_freezes_its_parameters(probe, monkeypatch):
    monkeypatch.setattr(ProbeLoss, "stop_after", 1)
    probe.run(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
    folder = probe.config.OUTPUT_DIR
    early, late = loss_of(folder, "model_0000001"), loss_of(folder)
    assert torch.equal(early["ProbeLoss.query"], late["ProbeLoss.query"])
    assert not torch.equal(early["ProbeLoss.value"], late["ProbeLoss.value"])
    assert not torch.equal(early["ProbeLoss.query"], torch.ones(1))
    assert checkpoint(folder)["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 2


# Phases.


@pytest.mark.parametrize("key", ["FIX_BACKBONE_BEFORE", "FIX_HEAD_BEFORE"])
@pytest.mark.parametrize("optimizer, clip", [("SGD", "value"), ("ADAMW", "full_model")])
def test_fixed_part_of_the_student(job, key, optimizer, clip):
    job.config.SOLVER.OPTIMIZER = optimizer
    job.config.SOLVER.CLIP_GRADIENTS.ENABLED = True
    job.config.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip
    job.config.SOLVER.BASE_LR = 1e-3
    start = trainer_of(job).plain_model.student
    start = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    job.run(opts=[f"MODEL.DISTILLER.{key}", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    trained = {name for name, _ in trainer_of(job).plain_model.student.named_parameters()}
    fixed = {n for n in trained if n.startswith("backbone.") == (key == "FIX_BACKBONE_BEFORE")}
    for name, moved in (("model_0000001", trained - fixed), ("model_0000002", trained)):
        model = checkpoint(job.config.OUTPUT_DIR, name)["model"]
        assert {n for n in trained if not torch.equal(start[n], model[n])} == moved


def test_pretraining_leaves_the_student_alone(probe):
    job = probe
    start = trainer_of(job).plain_model.student
    start = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    job.run(opts=[PRETRAIN, 3, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1])
    folder = job.config.OUTPUT_DIR
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
    probe.run(opts=[PRETRAIN, 2, "MODEL.DISTILLER.PROBE.START_ITER", 1, "SOLVER.MAX_ITER", 3])
    assert seen == [("pretrain", -2), ("pretrain", -1), ("forward", 1), ("forward", 2)]


@pytest.mark.parametrize("last", ["model_0000000", "model_0000001", "model_0000003"])
def test_resume_in_and_after_pretraining(probe, last):
    job = probe
    options = [PRETRAIN, 2, "SOLVER.CHECKPOINT_PERIOD", 1]
    job.run(opts=options)
    whole = checkpoint(job.config.OUTPUT_DIR)
    rewind(job.config.OUTPUT_DIR, last)
    job.run("--resume", opts=options)
    resumed = checkpoint(job.config.OUTPUT_DIR)
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])


def test_pretraining_pads_as_the_student_does(tmp_path):
    """Images of different sizes, with a teacher of a coarser multiple."""
    teacher = save_teacher(tiny_config(width=16), tmp_path)
    model = Distiller(distiller_config(tiny_config(), teacher, types=["ProbeLoss"]))
    for count, size in ((1, 40), (2, 72), (3, 100)):
        batch = tiny_batch(count, size)
        images = [item["image"] for item in batch]
        with EventStorage():  # the student's own forward wants one
            model(batch)
        assert model.padding.of_images(images) == model.padding.size


def test_nothing_to_pretrain(job):
    with pytest.raises(ValueError, match=r"PRETRAIN_TEACHER_ITERS is 2, but none of .*'PKD'"):
        job.run(opts=[PRETRAIN, 2])


def test_no_term_to_pretrain_with(probe, monkeypatch):
    monkeypatch.setattr(ProbeLoss, "pretrain", lambda *_: {})
    with pytest.raises(ValueError, match="PRETRAIN_TEACHER_ITERS is 2, but no loss returned a term"):
        probe.run(opts=[PRETRAIN, 2])


@pytest.mark.parametrize("key", ["PRETRAIN_TEACHER_ITERS", "FIX_BACKBONE_BEFORE", "FIX_HEAD_BEFORE"])
def test_negative_phases(probe, key):
    with pytest.raises(ValueError, match=rf"MODEL.DISTILLER.{key}': -1"):
        trainer_of(probe, opts=[f"MODEL.DISTILLER.{key}", -1])


# Other trainers.


def test_default_trainer_trains_everything_with_one_optimizer(probe, caplog):
    cfg = setup(probe.arguments(), distill=True)
    trainer = DefaultTrainer(cfg)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    learnt = loss_of_default(cfg.OUTPUT_DIR)
    assert len(learnt) == 2 and all(not torch.equal(value, torch.ones(1)) for value in learnt.values())
    log = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
    assert log.count("one optimizer also trains the parameters of ['ProbeLoss']") == 1


def loss_of_default(folder):
    model = checkpoint(folder)["model"]
    return {name: value for name, value in model.items() if name.startswith("distiller.")}


@pytest.mark.parametrize("key", ["PRETRAIN_TEACHER_ITERS", "FIX_BACKBONE_BEFORE", "FIX_HEAD_BEFORE"])
def test_default_trainer_refuses_phases(probe, key):
    cfg = setup(probe.arguments(opts=[f"MODEL.DISTILLER.{key}", 2]), distill=True)
    with pytest.raises(RuntimeError, match=rf"{key}': 2.*cannot do that"):
        DefaultTrainer(cfg).train()


def test_lazy_config(config_file):
    text = config_file.read_text().replace('TYPES=["PKD"]', 'TYPES=["ProbeLoss"]')
    config_file.write_text(text + LAZY_PROBE)
    run_lazy(config_file, "train.checkpointer.period=1")
    folder = config_file.parent / "output"
    whole = checkpoint(folder)
    assert whole["trainer"]["iteration"] == 4
    solver = whole["trainer"]["solvers"]["ProbeLoss"]
    assert solver["scheduler"] == {"base_lrs": [0.5], "last_epoch": 3}
    rates = [line["ProbeLoss/lr"] for line in metrics(folder) if "ProbeLoss/lr" in line]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.375, 0.125])  # cosine over train.max_iter
    (group,) = whole["trainer"]["_trainer"]["optimizer"]["param_groups"][:1]
    assert solver["optimizer"]["param_groups"][0]["params"] == [0, 1] and group["lr"] < 0.01
    rewind(folder, "model_0000000")
    run_lazy(config_file, "--resume", "train.checkpointer.period=1")
    assert checkpoint(folder)["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 3


def test_lazy_optimizer_sees_the_students_names(config_file):
    """Rates by name, as of a vision transformer's layers, are those of the student alone."""
    from distill_d2.engine.optimizer import trained_with_student

    config = distiller_config(tiny_config(), save_teacher(tiny_config(), config_file.parent / "t"))
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
        assert storage.latest()["Own/grad_norm"][0] == pytest.approx(3.0)  # infinity is no JSON
        model.slopes = (2.0, 3.0)
        frozen.append(model.a)
        step.run_step()
        assert (model.a.item(), model.b.item()) == pytest.approx((0.6, 0.4))
        frozen.append(model.b)
        step.run_step()
        assert (model.a.item(), model.b.item()) == pytest.approx((0.6, 0.4))


# Several processes, with find_unused_parameters=False.


def test_processes_resume_from_one_to_two_and_back(probe):
    """An own solver, an adapter that idles, pretraining, and a fixed backbone."""
    node = probe.config.MODEL.DISTILLER
    node.TYPES = ["FeatureMimic", "ProbeLoss"]
    node.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    node.FEATURE_MIMIC.START_ITER = 1
    node.PRETRAIN_TEACHER_ITERS = 2
    node.FIX_BACKBONE_BEFORE = 1
    probe.config.SOLVER.CHECKPOINT_PERIOD = 1
    folder = Path(probe.config.OUTPUT_DIR)
    two = command(probe, "tests/engine/probe_run.py", "--num-procs", 2)
    (output,) = run(two)
    assert "World size: 2" in output
    first, pretrained = checkpoint(folder, "model_0000000"), checkpoint(folder, "model_0000001")
    assert_equal(first["model"], pretrained["model"])
    mimic = "FeatureMimic.pairs.adapters.res3.weight"
    assert torch.equal(first["distiller"][mimic], pretrained["distiller"][mimic])
    whole = checkpoint(folder)
    for processes, last in ((2, "model_0000000"), (1, "model_0000002"), (2, "model_0000003")):
        rewind(folder, last)
        run(command(probe, "tests/engine/probe_run.py", "--num-procs", processes, "--resume"))
        resumed = checkpoint(folder)
        assert resumed["trainer"]["solvers"]["ProbeLoss"]["scheduler"]["last_epoch"] == 4
        # the loss's gradient does not depend on the images, so the number of processes changes nothing
        for name in ("ProbeLoss.query", "ProbeLoss.value"):
            torch.testing.assert_close(resumed["distiller"][name], whole["distiller"][name])
