"""ICD end to end, as a user trains with it: the laws, its phases, resume, processes, wrong input."""

from pathlib import Path

import icd_run
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from job import Job
from losses.naive_icd import random_weights
from test_processes import command, run
from test_training import assert_equal, checkpoint, metrics
from test_wrong_input import fails

from distill_d2 import teacher as teacher_module
from distill_d2.config import student_config
from distill_d2.data import register_custom_datasets
from distill_d2.engine import DistillTrainer, setup
from distill_d2.engine.solvers import LossSolver
from distill_d2.losses import build_losses
from distill_d2.losses.icd.queries import InstanceQueries
from distill_d2.testing.tiny import save_teacher, tiny_config, write_dataset

ICD = "InstanceConditionalDistillation"
NODE = "MODEL.DISTILLER."
# A constant added to all keys changes no attention, so this one's gradient is 0 but for rounding.
NEVER_MOVED = {"decoder.0.pos_projector.bias"}
TERMS = {"loss_icd_conf_0", "loss_icd_reg_0", "loss_icd_value"}


@pytest.fixture(autouse=True)
def _own_period(monkeypatch):
    """Write every iteration, not every 20."""
    monkeypatch.setattr("distill_d2.engine.settings.LOG_PERIOD", 1)


def icd_job(folder, family="retinanet"):
    """A job that distils by a small ICD from the first iteration on, and does not evaluate."""
    job = Job(folder, family)
    job.config.DATASETS.TEST = ()
    node = job.config.MODEL.DISTILLER
    node.TYPES = [ICD]
    node.BYPASS_DISTILL = 0
    node.INS.HIDDEN_DIM = 16
    node.INS.ATT_HEADS = 4
    return job


@pytest.fixture
def job(tmp_path):
    return icd_job(tmp_path)


def trainer_of(job, *arguments, opts=()):
    trainer = DistillTrainer(setup(job.arguments(*arguments, opts=opts), distill=True))
    trainer.resume_or_load(resume="--resume" in arguments)
    return trainer


def loss_state(trainer):
    """A copy of ICD's parameters."""
    state = trainer.plain_model.losses[ICD].state_dict()
    return {name: value.clone() for name, value in state.items()}


def output(job):
    return Path(job.config.OUTPUT_DIR)


def rewind(folder, name):
    (Path(folder) / "last_checkpoint").write_text(f"{name}.pth")


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# A run.


@pytest.mark.parametrize("family", ["retinanet", "faster", "mask"])
def test_trains_logs_and_saves(tmp_path, family, monkeypatch):
    """Laws 2 and 9; the teacher has batch normalisation, whose statistics a training mode would change."""
    job = icd_job(tmp_path, family)
    job.config.MODEL.DISTILLER.TEACHER_PREPARE = False  # so that its weights are the file's
    trainer = trainer_of(job, opts=["SOLVER.MAX_ITER", 3])
    teacher = trainer.plain_model.teacher.model
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.modules())
    start = loss_state(trainer)
    trainer.train()

    assert_equal(teacher.state_dict(), torch.load(tmp_path / "teacher/teacher.pth")["model"])
    assert not any(module.training for module in teacher.modules())
    learnt = loss_state(trainer)
    assert changed(start, learnt) | NEVER_MOVED == set(start)

    lines = [line for line in metrics(job.config.OUTPUT_DIR) if "total_loss" in line]
    names = {*TERMS, "lr", "grad_norm", f"{ICD}/lr", f"{ICD}/grad_norm"}
    assert len(lines) == 3 and all(names < set(line) for line in lines)
    parts = sum(value for name, value in lines[0].items() if name.startswith("loss_"))
    assert lines[0]["total_loss"] == pytest.approx(parts, rel=1e-6)
    assert lines[0][f"{ICD}/lr"] == pytest.approx(1e-4)
    assert 8 < lines[0]["loss_icd_value"] < 24  # two per unit of the weight
    log = (output(job) / "log.txt").read_text()
    assert all(f"{name}: " in log for name in names)

    saved = checkpoint(job.config.OUTPUT_DIR)
    assert_equal({f"{ICD}.{name}": value for name, value in learnt.items()}, saved["distiller"])
    plain = build_model(student_config(job.config))
    plain.load_state_dict(saved["model"], strict=True)
    DetectionCheckpointer(plain).load(str(output(job) / "model_final.pth"))

    monkeypatch.setattr(teacher_module, "load_teacher", lambda *_, **__: pytest.fail("a teacher"))
    job.config.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = "there/is/no/teacher.yaml"
    job.config.DATASETS.TEST = job.config.DATASETS.TRAIN
    results = job.run("--eval-only", opts=["MODEL.WEIGHTS", output(job) / "model_final.pth"])
    assert "AP" in results["bbox"]
    resumed = job.run("--eval-only", "--resume")
    assert resumed["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


ALONE = {
    "no weight": [NODE + "INS_ATT_MIMIC.WEIGHT_VALUE", 0.0],
    "bypassed": [NODE + "BYPASS_DISTILL", 100],
    "over": [NODE + "BYPASS_DISTILL_AFTER", -1],
}


@pytest.mark.parametrize(
    "family, way", [("retinanet", "no weight"), ("mask", "bypassed"), ("faster", "over")]
)
def test_student_alone_equals_the_baseline(tmp_path, family, way):
    """Law 1, while the decoder is trained by its own optimizer, with fakes and dropout."""
    job = icd_job(tmp_path, family)
    job.config.SOLVER.CLIP_GRADIENTS.ENABLED = True
    job.config.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # the decoder must not count in the norm
    job.config.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    job.config.MODEL.DISTILLER.INS.DROPOUT = 0.3
    start = {f"{ICD}.{name}": value for name, value in loss_state(trainer_of(job)).items()}
    job.run(distill=False, opts=["OUTPUT_DIR", tmp_path / "baseline"])
    job.run(opts=ALONE[way])
    saved = checkpoint(job.config.OUTPUT_DIR)
    assert_equal(checkpoint(tmp_path / "baseline")["model"], saved["model"])
    learnt = changed(start, saved["distiller"])
    of_student = {name for name in start if name.startswith(f"{ICD}.student.")}
    unmoved = {f"{ICD}.{name}" for name in NEVER_MOVED} | (of_student if way == "no weight" else set())
    assert of_student and learnt | unmoved == set(start)
    assert way != "no weight" or not learnt & of_student


def test_distillation_reaches_the_student(job):
    """The counterpart of law 1."""
    job.run(distill=False, opts=["OUTPUT_DIR", job.folder / "baseline"])
    job.run()
    different = changed(
        checkpoint(job.folder / "baseline")["model"], checkpoint(job.config.OUTPUT_DIR)["model"]
    )
    assert {"backbone.fpn_output2.weight", "backbone.bottom_up.stem.conv1.weight"} < different


def test_decoder_stops_and_the_projection_goes_on(job):
    job.run(opts=[NODE + "STOP_JOINT", 1, "SOLVER.CHECKPOINT_PERIOD", 1])
    early, late = (checkpoint(job.config.OUTPUT_DIR, name) for name in ("model_0000001", "model_final"))
    moved = changed(early["distiller"], late["distiller"])
    assert moved == {f"{ICD}.student.0.values.{kind}" for kind in ("weight", "bias")}
    rates = [line[f"{ICD}/lr"] for line in metrics(job.config.OUTPUT_DIR) if f"{ICD}/lr" in line]
    assert rates[0] > rates[1] > rates[2] == rates[3]


def test_pretraining_trains_the_decoder_alone(job):
    trainer = trainer_of(job)
    student = {name: value.clone() for name, value in trainer.plain_model.student.state_dict().items()}
    start = {f"{ICD}.{name}": value for name, value in loss_state(trainer).items()}
    job.run(opts=[NODE + "PRETRAIN_TEACHER_ITERS", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    saved = checkpoint(job.config.OUTPUT_DIR, "model_0000001")
    assert_equal(student, saved["model"])
    assert set(start) - changed(start, saved["distiller"]) == {
        f"{ICD}.student.0.values.{kind}" for kind in ("weight", "bias")
    }
    lines = [line for line in metrics(job.config.OUTPUT_DIR) if "total_loss" in line]
    assert ["loss_icd_value" in line for line in lines] == [False] * 2 + [True] * 4


def test_teacher_with_other_classes_and_channels(tmp_path):
    job = icd_job(tmp_path)
    teacher = tiny_config(width=16, channels=24)
    teacher.MODEL.RETINANET.NUM_CLASSES = 7
    node = job.config.MODEL.DISTILLER
    node.MODEL_DISTILLER_CONFIG = save_teacher(teacher, tmp_path / "other")
    node.PRELOAD_HEAD = True
    job.run()
    assert TERMS < set(metrics(job.config.OUTPUT_DIR)[0])
    saved = checkpoint(job.config.OUTPUT_DIR)["distiller"]
    assert saved[f"{ICD}.pairs.teacher_adapters.p3.weight"].shape == (16, 24, 1, 1)
    assert saved[f"{ICD}.queries.encoder.0.weight"].shape[1] == 3 + 256 + 10


# Resume.


@pytest.mark.parametrize(
    "family, last, options",
    [
        # in the middle of everything, and with a seed that nobody can repeat
        ("retinanet", "model_0000001", ["SEED", -1, NODE + "STOP_JOINT", 2]),
        ("retinanet", "model_0000003", [NODE + "STOP_JOINT", 2, NODE + "INS.DROPOUT", 0.2]),
        ("faster", "model_0000000", [NODE + "PRETRAIN_TEACHER_ITERS", 2, NODE + "BYPASS_DISTILL", 1]),
    ],
)
def test_resumed_run_equals_uninterrupted(tmp_path, family, last, options):
    job = icd_job(tmp_path, family)
    job.config.SOLVER.MAX_ITER = 5
    job.config.MODEL.DISTILLER.INS_ATT_MIMIC.TEMP_DECAY = True
    job.config.MODEL.DISTILLER.INS_ATT_MIMIC.TEMP_VALUE = 3.0
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, *options]
    job.run(opts=options)
    whole = checkpoint(job.config.OUTPUT_DIR)
    rewind(job.config.OUTPUT_DIR, last)
    (output(job) / "model_final.pth").unlink()
    job.run("--resume", opts=options)
    resumed = checkpoint(job.config.OUTPUT_DIR)
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["distiller"], resumed["distiller"])
    ours, theirs = (saved["trainer"]["solvers"][ICD] for saved in (resumed, whole))
    assert ours["scheduler"] == theirs["scheduler"]
    assert len(theirs["optimizer"]["state"]) == len(whole["distiller"])
    for index, state in theirs["optimizer"]["state"].items():
        assert_equal(ours["optimizer"]["state"][index], state)


# Fakes and the statistics that they are drawn from.


def recorded(monkeypatch):
    """The points of the fakes, step by step, as they are sampled."""
    points, sample = [], InstanceQueries.sample

    def spy(self, *arguments):
        queries = sample(self, *arguments)
        points.append(queries.points[queries.is_real == 0])
        return queries

    monkeypatch.setattr(InstanceQueries, "sample", spy)
    return points


def test_fakes_repeat_with_the_seed(job, monkeypatch):
    points = recorded(monkeypatch)
    for seed in (1, 1, 2):
        job.run(opts=["SEED", seed, "OUTPUT_DIR", job.folder / f"of{len(points)}", "SOLVER.MAX_ITER", 2])
    first, again, other = points[:2], points[2:4], points[4:]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(first, other))


def test_fakes_are_drawn_by_box_statistics(job):
    prior = trainer_of(job).plain_model.losses[ICD].queries.sampler.prior
    # 12 boxes of 16 x 20 pixels in images of 64 x 48 and 48 x 64, 4 of each class
    assert prior.probability.tolist() == pytest.approx([1 / 3] * 3)
    assert prior.mean[:, 0].mean() == pytest.approx((16 / 64 + 16 / 48) / 2)


# Parameters of an earlier run.


@pytest.fixture
def earlier(job):
    """The checkpoint of an earlier run in another folder."""
    job.run(opts=["OUTPUT_DIR", job.folder / "earlier", NODE + "SOLVER.BASE_LR", 0.01])
    return job.folder / "earlier" / "model_final.pth"


def reference_checkpoint(path, prefix="module.", **sizes):
    """As the reference saves it, with the keys that it has besides."""
    sizes = {"hidden_dim": 16, "heads": 4, "layers": 1, "classes": 3, **sizes}
    weights = random_weights(torch.Generator().manual_seed(3), **sizes)
    state = {prefix + name: value for name, value in weights.items()}
    state.update(
        {f"{prefix}pixel_mean": torch.zeros(3, 1, 1), f"{prefix}pixel_std": torch.ones(3, 1, 1)}
    )
    torch.save({"model": {}, "teacher": state, "iteration": 89999}, path)
    return weights


def preload_keys(path, part="teacher_only"):
    return [NODE + "PRELOAD_TEACHER", path, NODE + "PRELOAD_TYPE", part]


@pytest.mark.parametrize("part", ["all", "teacher_only"])
def test_preloads_an_earlier_run(job, earlier, part):
    fresh = loss_state(trainer_of(job))
    loaded = loss_state(trainer_of(job, opts=preload_keys(earlier, part)))
    saved = checkpoint(earlier.parent)["distiller"]
    of_student = {name for name in fresh if name.startswith("student.")}
    same = {name for name in loaded if torch.equal(loaded[name], saved[f"{ICD}.{name}"])}
    assert same == (set(fresh) if part == "all" else set(fresh) - of_student)
    if part == "teacher_only":
        assert all(torch.equal(loaded[name], fresh[name]) for name in of_student)


def test_preloading_is_for_a_fresh_run(job, earlier):
    job.run(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
    rewind(job.config.OUTPUT_DIR, "model_0000001")
    resumed = trainer_of(job, "--resume", opts=preload_keys(earlier, "all"))
    assert_equal(
        {f"{ICD}.{name}": value for name, value in loss_state(resumed).items()},
        checkpoint(job.config.OUTPUT_DIR, "model_0000001")["distiller"],
    )
    other = ["OUTPUT_DIR", job.folder / "other"]  # --resume, with nothing to resume
    fresh = loss_state(trainer_of(job, "--resume", opts=[*preload_keys(earlier, "all"), *other]))
    assert_equal(
        {f"{ICD}.{name}": value for name, value in fresh.items()},
        checkpoint(earlier.parent)["distiller"],
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_preloads_a_checkpoint_of_the_reference(job, prefix):
    weights = reference_checkpoint(job.folder / "reference.pth", prefix)
    loaded = loss_state(trainer_of(job, opts=preload_keys(job.folder / "reference.pth", "all")))
    layer = "attention_module.matt.0."
    for ours, theirs in {
        "decoder.0.in_proj_weight": weights[f"teacher.{layer}matt.in_proj_weight"],
        "queries.encoder.6.bias": weights["teacher.ins_encoder.encoder.layers.2.bias"],
        "student.0.values.weight": weights[f"distillers.0.{layer}matt.in_proj_weight"][32:],
    }.items():
        assert torch.equal(loaded[ours], theirs)
    job.run(opts=preload_keys(job.folder / "reference.pth"))  # it also trains


def test_checkpoint_of_the_reference_of_other_settings(job):
    reference_checkpoint(job.folder / "reference.pth", classes=80)
    message = ("queries.encoder.0.weight (16, 346), here (16, 269)", "NUM_CLASSES")
    fails(job, ValueError, *message, opts=preload_keys(job.folder / "reference.pth"))
    reference_checkpoint(job.folder / "reference.pth", hidden_dim=32)
    message = ("weight (32, 32), here (16, 16)", "HIDDEN_DIM", "PRELOAD_TEACHER")
    fails(job, ValueError, *message, opts=preload_keys(job.folder / "reference.pth"))


def test_nothing_to_preload(job):
    plain = job.folder / "teacher" / "teacher.pth"
    fails(job, ValueError, "PRELOAD_TEACHER", str(plain), "['model']", opts=preload_keys(plain))
    fails(job, FileNotFoundError, "nowhere.pth", opts=preload_keys(job.folder / "nowhere.pth"))
    wrong = ("PRELOAD_TYPE", "'student'", "teacher_only")
    fails(job, ValueError, *wrong, opts=preload_keys(plain, "student"))


# Configs.


REFERENCE_YAML = """
_BASE_: {base}
EXTRA_CFG: []
MODEL:
  WEIGHTS: ""
  RESNETS: {{DEPTH: 50}}
  DISTILLER:
    TEACHER: "ModelTeacher_II"
    TYPES: ["InstanceConditionalDistillation",]
    MODEL_LOAD_OFFICIAL: True
    MODEL_DISTILLER_CONFIG: "COCO-Detection/retinanet_R_50_FPN_3x.yaml"
    PRETRAIN_TEACHER_ITERS: 5
    BYPASS_DISTILL: 1500
    BYPASS_DISTILL_AFTER: 80000
    STOP_JOINT: 70000
    FIX_BACKBONE_BEFORE: 1
    FIX_HEAD_BEFORE: 2
    PRELOAD_TEACHER: ""
    PRELOAD_TYPE: "all"
    PRELOAD_FPN: False
    PRELOAD_HEAD: False
    IGNORE_DISTILL: ["p7"]
    DISTILL_OFF: 2
    DISTILL_ON: 3
    SOLVER:
      OPTIMIZER: "SGD"
      LR_SCHEDULER_NAME: "WarmupMultiStepLR"
      MAX_ITER: 123
      STEPS: (100,)
      BASE_LR: 0.02
      MOMENTUM: 0.8
      NESTEROV: True
      WEIGHT_DECAY: 0.0003
      WEIGHT_DECAY_NORM: 0.5
      WEIGHT_DECAY_BIAS: 0.5
      BIAS_LR_FACTOR: 2.0
      GAMMA: 0.2
      WARMUP_FACTOR: 0.5
      WARMUP_ITERS: 7
      WARMUP_METHOD: "constant"
      CLIP_GRADIENTS: {{"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.05, "NORM_TYPE": 2.0}}
    INS:
      TASK_NAME: "InstanceEncoder"
      DECODER: "DecoderWrapper"
      INPUT_FEATS: ["p3", "p4", "p5"]
      HIDDEN_DIM: 128
      ATT_HEADS: 4
      ATT_LAYERS: 2
      PROJECT_POS: False
      USE_POS_EMBEDDING: True
      DECODER_POSEMB_ON_V: True
      DISTILL_WITH_POS: True
      DISTILL_NORM: "tln"
      DROPOUT: 0.1
      NUM_CLASSES: 80
      ADD_SCALE_INDICATOR: False
      SAMPLE_RULE: "fixed"
      NUM_NEG_POS_RATIO: 3.0
      NUM_LABELS: 60
      MAX_LABELS: 200
      UNIFORM_SAMPLE_CLASS: True
      UNIFORM_SAMPLE_BOX: True
      CONFIDENCE_LOSS_WEIGHT: 0.5
      VALUE_RECONST: 1.0
    INS_ATT_MIMIC:
      WEIGHT_VALUE: 4.0
      TEMP_VALUE: 2.0
      TEMP_DECAY: True
      TEMP_DECAY_TO: 0.5
      TEMP_MASK: 2.0
      DISTILL_NEGATIVE: True
      LOSS_FORM: "smoothL1"
      SAMPLE_RANGE: 0.2
SOLVER:
  OPTIMIZER: "SGD"
  STEPS: (60000, 80000)
  MAX_ITER: 90000
  CLIP_GRADIENTS: {{"ENABLED": True}}
"""


def test_yaml_of_the_reference(job):
    """All keys of its specification, none at its default, reach what is built from them."""
    base = Path(__file__).resolve().parents[2] / "configs" / "Base-RetinaNet.yaml"
    job.text = REFERENCE_YAML.format(base=base)
    cfg = setup(job.arguments(opts=_datasets(job)), True)
    written = yaml.safe_load(job.text)["MODEL"]["DISTILLER"]
    node = cfg.MODEL.DISTILLER
    parts = {name: (written[name], node[name]) for name in ("SOLVER", "INS", "INS_ATT_MIMIC")}
    for ours, theirs in ((written, node), *parts.values()):
        values = {
            key: value for key, value in ours.items() if not isinstance(value, dict) and key != "STEPS"
        }
        assert {key: theirs[key] for key in values} == values
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.MAX_ITER == 90000

    loss = build_losses(node)[ICD]
    given = {**written, **written["INS"], **written["INS_ATT_MIMIC"]}
    given = {key.lower(): value for key, value in given.items()}
    settings = vars(loss.settings)
    assert all(settings[name] == given[name] for name in settings if name != "reference_bugs")
    solver = LossSolver(loss, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS)
    (group,) = solver.optimizer.param_groups
    assert isinstance(solver.optimizer, torch.optim.SGD)
    assert (group["initial_lr"], group["lr"], group["momentum"]) == (0.02, 0.01, 0.8)
    assert (group["nesterov"], group["weight_decay"]) == (True, 0.0003)
    assert solver._scheduler.state_dict()["last_epoch"] == 0


def _datasets(job):
    names = str((job.entry["NAME"],))
    register_custom_datasets([job.entry])
    opts = ["DATASETS.TRAIN", names, "DATASETS.TEST", names, "MODEL.RETINANET.NUM_CLASSES", 3]
    return [*opts, "OUTPUT_DIR", job.folder / "output"]


def test_extra_cfg_comes_before_the_command_line(job):
    extra = job.folder / "extra.yaml"
    extra.write_text(
        "MODEL: {DISTILLER: {INS: {MAX_LABELS: 50, ATT_LAYERS: 2}, INS_ATT_MIMIC: {WEIGHT_VALUE: 5.0}}}\n"
    )
    job.config.MODEL.DISTILLER.INS_ATT_MIMIC.WEIGHT_VALUE = 3.0
    options = ["EXTRA_CFG", f"['{extra}']", NODE + "INS.MAX_LABELS", 40]
    settings = trainer_of(job, opts=options).plain_model.losses[ICD].settings
    assert (settings.max_labels, settings.att_layers, settings.weight_value) == (40, 2, 5.0)


# Wrong input.


WRONG = {
    "levels": (KeyError, ["INS.INPUT_FEATS", "['p3','p7']"], ["'p7'", "['p2', 'p3', 'p4']"]),
    "classes": (ValueError, ["INS.NUM_CLASSES", 2], ["INS.NUM_CLASSES is 2", "3 classes"]),
    "heads": (ValueError, ["INS.HIDDEN_DIM", 18], ["INS.HIDDEN_DIM is 18", "ATT_HEADS, which is 4"]),
    "form": (ValueError, ["INS_ATT_MIMIC.LOSS_FORM", "huber"], ["LOSS_FORM is 'huber'", "smoothL1"]),
    "temperature": (ValueError, ["INS_ATT_MIMIC.TEMP_VALUE", -1.0], ["TEMP_VALUE is -1.0", "above 0"]),
    "optimizer": (ValueError, ["SOLVER.OPTIMIZER", "LAMB"], ["SOLVER.OPTIMIZER is 'LAMB'", "AdamW"]),
    "pretraining": (ValueError, ["PRETRAIN_TEACHER_ITERS", -1], ["PRETRAIN_TEACHER_ITERS': -1"]),
    "decoder": (ValueError, ["INS.DECODER", "Mine"], ["INS.DECODER is 'Mine'", "DecoderWrapper"]),
}


@pytest.mark.parametrize("error, option, messages", WRONG.values(), ids=list(WRONG))
def test_wrong_values(job, error, option, messages):
    fails(job, error, *messages, opts=[NODE + option[0], option[1]])


def test_fewer_classes_than_the_student_without_statistics(job):
    """Fakes drawn from nothing do not hide it."""
    uniform = [NODE + "INS.UNIFORM_SAMPLE_CLASS", True, NODE + "INS.UNIFORM_SAMPLE_BOX", True]
    fails(job, ValueError, "INS.NUM_CLASSES is 2", opts=[NODE + "INS.NUM_CLASSES", 2, *uniform])


# Detectron2's own trainer.


def test_default_trainer_trains_the_decoder(job):
    cfg = setup(job.arguments(opts=["SOLVER.BASE_LR", 1e-3]), distill=True)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer._hooks = [hook for hook in trainer._hooks if type(hook).__name__ != "EvalHook"]
    start = {name: value.clone() for name, value in trainer.model.losses.state_dict().items()}
    trainer.train()
    assert changed(start, trainer.model.losses.state_dict()) == set(start)
    last = [line for line in metrics(cfg.OUTPUT_DIR) if "total_loss" in line][-1]
    assert TERMS < set(last) and torch.tensor([last[name] for name in TERMS]).isfinite().all()


@pytest.mark.parametrize("key", ["FIX_BACKBONE_BEFORE", "FIX_HEAD_BEFORE"])
def test_default_trainer_refuses_phases(job, key):
    cfg = setup(job.arguments(opts=[NODE + key, 2]), distill=True)
    with pytest.raises(RuntimeError, match=rf"{key}': 2.*cannot do that"):
        DefaultTrainer(cfg).train()


# Several processes, with find_unused_parameters=False.


def test_two_processes(tmp_path):
    """Law 8, in every phase and without objects, and resume from one process to two and back."""
    phases, resumed = job_of_phases(tmp_path / "phases"), job_without_chance(tmp_path / "resumed")
    whole = checkpoint(resumed.config.OUTPUT_DIR)
    resumed.arguments()  # writes its config
    other = ["--num-procs", 2, "--then-resume", resumed.config_file]
    (lines,) = run(command(phases, "tests/engine/icd_run.py", *other))
    assert "World size: 2" in lines

    check_phases(phases)
    check_equal_training(checkpoint(resumed.config.OUTPUT_DIR), whole)
    rewind(resumed.config.OUTPUT_DIR, "model_0000003")
    resumed.run("--resume")
    check_equal_training(checkpoint(resumed.config.OUTPUT_DIR), whole)


def job_of_phases(folder):
    job = icd_job(folder)
    node = job.config.MODEL.DISTILLER
    node.PRETRAIN_TEACHER_ITERS, node.BYPASS_DISTILL, node.STOP_JOINT = 2, 1, 3
    node.INS.DROPOUT = 0.2
    node.INS.HIDDEN_DIM = 12  # adapters on both sides
    torch.save(trainer_of(job).plain_model.state_dict(), output(job) / "start.pth")
    return job


def check_phases(job):
    """Losses have the normalisers, fakes and dropout of their process; gradients are the mean."""
    model = icd_run.start(setup(job.arguments(), distill=True))
    ranks = [torch.load(output(job) / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    for phase, (iteration, objects) in icd_run.PHASES.items():
        halves = []
        for rank, inputs in enumerate(icd_run.images_of(objects)):
            torch.manual_seed(job.config.SEED + rank)
            losses, gradients = icd_run.step(model, model, iteration, inputs)
            halves.append({name: gradient.clone() for name, gradient in gradients.items()})
            torch.testing.assert_close(ranks[rank][phase][0], losses)
        mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
        for rank in (0, 1):
            torch.testing.assert_close(ranks[rank][phase][1], mean, rtol=1e-4, atol=1e-6)
    conf = [rank["all without objects"][0]["loss_icd_conf_0"] for rank in ranks]
    assert not torch.equal(*conf)  # of one fake each, not the same


def job_without_chance(folder):
    """A finished run on one image without a random part: the number of processes changes nothing."""
    job = icd_job(folder)
    entry = write_dataset(folder / "single", count=1)
    job.config.DATASETS.CUSTOM, job.config.DATASETS.TRAIN = [entry], (entry["NAME"],)
    job.config.MODEL.SMALL_RESNET.NORM = "FrozenBN"
    job.config.INPUT.RANDOM_FLIP = "none"
    job.config.SOLVER.MAX_ITER = 6
    job.config.SOLVER.CHECKPOINT_PERIOD = 1
    node = job.config.MODEL.DISTILLER
    node.TASK_LOSS_WEIGHT = 0.0  # RetinaNet's own losses depend on the number of images in a process
    node.BYPASS_DISTILL, node.STOP_JOINT = 1, 4
    node.INS.NUM_NEG_POS_RATIO = node.INS_ATT_MIMIC.SAMPLE_RANGE = 0.0
    job.run()
    rewind(job.config.OUTPUT_DIR, "model_0000001")
    return job


def check_equal_training(ours, theirs):
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=1e-4, atol=1e-6)
    ours, theirs = (saved["trainer"]["solvers"][ICD] for saved in (ours, theirs))
    assert ours["scheduler"] == theirs["scheduler"] and ours["scheduler"]["last_epoch"] == 5
    # Not the parameters: where a gradient is 0, as a key's bias's, AdamW's step is rounding.
    states = [solver["optimizer"]["state"] for solver in (ours, theirs)]
    assert sorted({state["step"].item() for state in states[1].values()}) == [5.0, 6.0]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-7)
