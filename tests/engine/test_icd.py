"""ICD as a user trains with it: its phases, resume, fakes, earlier parameters, the reference's yaml files."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from runs import ROOT, Job, assert_equal, changed, checkpoint, metrics, rewind

from distill_d2.data import register_custom_datasets
from distill_d2.engine import load_config
from distill_d2.engine.distributed import distributed
from distill_d2.engine.solvers import LossSolver
from distill_d2.losses import build_losses
from distill_d2.losses.icd.queries import InstanceQueries
from distill_d2.losses.settings import keys_of
from distill_d2.testing import tiny_batch

ICD = "InstanceConditionalDistillation"
NODE = "MODEL.DISTILLER."
# A constant added to all keys changes no attention, so this one's gradient is 0 but for rounding.
NEVER_MOVED = {f"{ICD}.decoder.0.pos_projector.bias"}
OF_STUDENT = {f"{ICD}.student.0.values.{kind}" for kind in ("weight", "bias")}
TERMS = {"loss_icd_conf_0", "loss_icd_reg_0", "loss_icd_value"}

pytestmark = pytest.mark.usefixtures("log_every_iteration")


def icd_job(folder, family="retinanet"):
    """A job that distills by a small ICD from the first iteration on, and does not evaluate."""
    job = Job(folder, family, types=[ICD], evaluate=False)
    job.node.BYPASS_DISTILL = 0
    job.node.INS.HIDDEN_DIM, job.node.INS.ATT_HEADS = 16, 4
    return job


@pytest.fixture
def job(tmp_path):
    return icd_job(tmp_path)


def loss_state(trainer):
    """A copy of ICD's parameters, by their names in a checkpoint."""
    state = trainer.plain_model.losses.state_dict()
    return {name: value.clone() for name, value in state.items()}


def test_student_alone_equals_the_baseline(job):
    """Law 1, while the decoder is trained by its own optimizer, with fakes and dropout."""
    clip = job.config.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 0.1  # without the decoder
    job.node.INS.DROPOUT = 0.3
    start = loss_state(job.trainer())
    job.run(distill=False, opts=["OUTPUT_DIR", job.folder / "baseline"])
    job.run(opts=[NODE + "INS_ATT_MIMIC.WEIGHT_VALUE", 0.0])
    saved = checkpoint(job.output)
    assert_equal(checkpoint(job.folder / "baseline")["model"], saved["model"])
    unmoved = set(start) - changed(start, saved["distiller"])
    assert unmoved | NEVER_MOVED == NEVER_MOVED | OF_STUDENT


def test_logged_values(job):
    job.run(opts=["SOLVER.MAX_ITER", 1])
    (line,) = [line for line in metrics(job.output) if "total_loss" in line]
    assert TERMS | {"lr", "grad_norm", f"{ICD}/lr", f"{ICD}/grad_norm"} < set(line)
    assert line[f"{ICD}/lr"] == pytest.approx(1e-4)
    assert 8 < line["loss_icd_value"] < 24  # two per unit of the weight


def test_decoder_stops_and_the_projection_goes_on(job):
    job.run(opts=[NODE + "STOP_JOINT", 1, "SOLVER.CHECKPOINT_PERIOD", 1])
    early, late = (
        checkpoint(job.output, name)["distiller"] for name in ("model_0000001", "model_final")
    )
    assert changed(early, late) == OF_STUDENT
    rates = [line[f"{ICD}/lr"] for line in metrics(job.output) if f"{ICD}/lr" in line]
    assert rates[0] > rates[1] > rates[2] == rates[3]


def test_pretraining_trains_the_decoder_alone(job):
    trainer = job.trainer()
    student = {name: value.clone() for name, value in trainer.plain_model.student.state_dict().items()}
    start = loss_state(trainer)
    job.run(opts=[NODE + "PRETRAIN_TEACHER_ITERS", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    saved = checkpoint(job.output, "model_0000001")
    assert_equal(student, saved["model"])
    assert set(start) - changed(start, saved["distiller"]) - NEVER_MOVED == OF_STUDENT
    lines = [line for line in metrics(job.output) if "total_loss" in line]
    assert ["loss_icd_value" in line for line in lines] == [False] * 2 + [True] * 4


@pytest.mark.parametrize(
    "family, last, options",
    [
        # in the middle of everything, and with an unknown seed
        ("retinanet", "model_0000001", ["SEED", -1, NODE + "STOP_JOINT", 2, NODE + "INS.DROPOUT", 0.2]),
        ("faster", "model_0000000", [NODE + "PRETRAIN_TEACHER_ITERS", 2, NODE + "BYPASS_DISTILL", 1]),
    ],
)
def test_resumed_run_equals_uninterrupted(tmp_path, family, last, options):
    job = icd_job(tmp_path, family)
    job.config.SOLVER.MAX_ITER = 4
    job.node.INS_ATT_MIMIC.TEMP_DECAY, job.node.INS_ATT_MIMIC.TEMP_VALUE = True, 3.0
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, *options]
    job.run(opts=options)
    whole = checkpoint(job.output)
    rewind(job.output, last)
    job.run("--resume", opts=options)
    resumed = checkpoint(job.output)
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])
    solver, whole_solver = (saved["trainer"]["solvers"][ICD] for saved in (resumed, whole))
    assert solver["scheduler"] == whole_solver["scheduler"]
    assert len(whole_solver["optimizer"]["state"]) == len(whole["distiller"])
    for index, state in whole_solver["optimizer"]["state"].items():
        assert_equal(solver["optimizer"]["state"][index], state)


# Fakes and the statistics that they are drawn from.


def test_fakes_repeat_with_the_seed(job, monkeypatch):
    points, sample = [], InstanceQueries.sample

    def spy(self, *arguments):
        queries = sample(self, *arguments)
        points.append(queries.points[queries.is_real == 0])
        return queries

    monkeypatch.setattr(InstanceQueries, "sample", spy)
    job.node.MEASURE_GRADIENTS = False  # two steps of each run draw fakes, and nothing else
    for seed in (1, 1, 2):
        job.run(opts=["SEED", seed, "OUTPUT_DIR", job.folder / f"of{len(points)}", "SOLVER.MAX_ITER", 2])
    first, again, other = points[:2], points[2:4], points[4:]
    assert all(torch.equal(*pair) for pair in zip(first, again))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(*pair) for pair in zip(first, other))


# Parameters of an earlier run.


@pytest.fixture
def earlier(job):
    """The checkpoint of an earlier run in another folder."""
    job.run(opts=["OUTPUT_DIR", job.folder / "earlier", NODE + "SOLVER.BASE_LR", 0.01])
    return job.folder / "earlier" / "model_final.pth"


def preload_keys(path, part="teacher_only"):
    return [NODE + "PRELOAD_TEACHER", path, NODE + "PRELOAD_TYPE", part]


def test_preloads_an_earlier_run_into_a_fresh_run_only(job, earlier):
    fresh, saved = loss_state(job.trainer()), checkpoint(earlier.parent)["distiller"]
    assert_equal(loss_state(job.trainer(opts=preload_keys(earlier, "all"))), saved)
    loaded = loss_state(job.trainer(opts=preload_keys(earlier, "teacher_only")))
    of_student = {name for name in fresh if name.startswith(f"{ICD}.student.")}
    assert of_student and changed(loaded, saved) == of_student
    assert all(torch.equal(loaded[name], fresh[name]) for name in of_student)

    job.run(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
    rewind(job.output, "model_0000001")
    resumed = loss_state(job.trainer("--resume", opts=preload_keys(earlier, "all")))
    assert_equal(resumed, checkpoint(job.output, "model_0000001")["distiller"])
    nothing_to_resume = ["OUTPUT_DIR", job.folder / "other"]
    loaded = job.trainer("--resume", opts=[*preload_keys(earlier, "all"), *nothing_to_resume])
    assert_equal(loss_state(loaded), saved)


# Configs.


def test_yaml_of_the_reference(job):
    """All keys of its specification, none at its default, reach what is built from them."""
    text = Path(__file__).with_name("icd_reference.yaml").read_text()
    job.text = text.replace("{base}", str(ROOT / "configs" / "Base-RetinaNet.yaml"))
    names = str((job.entry["NAME"],))
    register_custom_datasets([job.entry])
    opts = ["DATASETS.TRAIN", names, "DATASETS.TEST", names, "MODEL.RETINANET.NUM_CLASSES", 3]
    cfg = job.setup(opts=[*opts, "OUTPUT_DIR", job.output])
    written = yaml.safe_load(job.text)["MODEL"]["DISTILLER"]
    node = cfg.MODEL.DISTILLER
    parts = [(written[name], node[name]) for name in ("SOLVER", "INS", "INS_ATT_MIMIC")]
    for given, read in ((written, node), *parts):
        values = {key: v for key, v in given.items() if not isinstance(v, dict) and key != "STEPS"}
        assert {key: read[key] for key in values} == values
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.MAX_ITER == 90000

    loss = build_losses(node)[ICD]
    given = {**written, **written["INS"], **written["INS_ATT_MIMIC"]}
    given = {key.lower(): value for key, value in given.items()}
    not_of_the_reference = {"reference_bugs", "gradient_ratio", "gradient_ratio_iters"}
    keys = set(keys_of(type(loss.settings))) - not_of_the_reference
    assert all(getattr(loss.settings, name) == given[name] for name in keys)
    solver = LossSolver(loss, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS)
    (group,) = solver.optimizer.param_groups
    assert isinstance(solver.optimizer, torch.optim.SGD)
    assert (group["initial_lr"], group["lr"], group["momentum"]) == (0.02, 0.01, 0.8)
    assert (group["nesterov"], group["weight_decay"]) == (True, 0.0003)
    assert solver._scheduler.state_dict()["last_epoch"] == 0


# Two processes, with find_unused_parameters=False.

# Of a run with PRETRAIN_TEACHER_ITERS 2, BYPASS_DISTILL 1, STOP_JOINT 3: the student's iteration, and the
# number of objects in the image of each process.
PHASES = {
    "pretraining": (-1, (1, 3)),
    "bypassed": (0, (1, 3)),
    "distilling": (2, (3, 1)),
    "one without objects": (2, (2, 0)),
    "all without objects": (2, (0, 0)),
    "stopped": (4, (1, 3)),
    "once more": (2, (1, 3)),
}


def phases_of(config_file, rank, wrap):
    """What a process computes: the losses and the gradients of each phase's step.

    Args:
        wrap: what DistributedDataParallel does to a model.
    """
    cfg = load_config(config_file)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.phases.supported_by_trainer = True
    wrapped, results = wrap(model), {}
    for phase, (iteration, objects) in PHASES.items():
        torch.manual_seed(cfg.SEED + rank)
        image = tiny_batch(2, objects=max(*objects, 1))[rank]
        image["instances"] = image["instances"][: objects[rank]]
        model.zero_grad()
        model.student.loss_normalizer = 100
        with EventStorage(iteration + model.phases.pretrain_iters):
            losses = wrapped([image])
        sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        results[phase] = {name: loss.detach() for name, loss in losses.items()}, gradients
    return results


def phases_of_this_process(config_file):
    return phases_of(config_file, comm.get_rank(), distributed)


def test_two_processes(pool, job):
    """Law 8, in every phase: losses have the normalizers, fakes and dropout of their process; gradients are
    the mean."""
    job.node.PRETRAIN_TEACHER_ITERS, job.node.BYPASS_DISTILL, job.node.STOP_JOINT = 2, 1, 3
    job.node.INS.DROPOUT = 0.2
    job.node.INS.HIDDEN_DIM = 12  # adapters on both sides
    job.arguments()  # writes the config
    ranks = pool.run(phases_of_this_process, job.config_file)
    alone = [phases_of(job.config_file, rank, lambda model: model) for rank in (0, 1)]
    for phase in PHASES:
        first, second = (process[phase][1] for process in alone)
        mean = {name: (first[name] + second[name]) / 2 for name in first}
        for process, expected in zip(ranks, alone):
            torch.testing.assert_close(process[phase][0], expected[phase][0])
            torch.testing.assert_close(process[phase][1], mean, rtol=1e-4, atol=1e-6)
    conf = [process["all without objects"][0]["loss_icd_conf_0"] for process in ranks]
    assert not torch.equal(*conf)  # of one fake each, not the same
