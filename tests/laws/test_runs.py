"""Every law that takes whole runs: of each loss on its recipe's detector, and of each detector with PKD."""

import contextlib
import functools
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from runs import Job, assert_equal, changed, checkpoint, rewind

from distill_d2.config import student_config
from distill_d2.testing import families, recipes

RUNS = [
    *((name, recipe.family) for name, recipe in recipes().items() if recipe.runs),
    *(("PKD", name) for name, family in families().items() if family.config is not None),
]
RUNS = list(dict.fromkeys(RUNS))
SOLVER = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1e-3]
SOLVER += ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0, "SEED", 1]
CLIPPING = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]
CLIPPING += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1]


BASELINES = {}


class Runs:
    """Runs in a folder; each is done when a test first asks for it."""

    def __init__(self, folder, recipe, family):
        self.recipe, self.family, family = recipes()[recipe], family, families()[family]
        student, teacher = (family.config(width) for width in (8, 16))
        student.merge_from_list(SOLVER)
        types = [self.recipe.loss]
        self.job = Job(folder, student=student, teacher=teacher, types=types, evaluate=False)
        self.recipe.set_keys(self.job.node, family)
        self.done = {}

    def output(self, name):
        return self.job.folder / name

    def baseline(self):
        """The student's tensors after a run of train_baseline.py; one for all losses."""
        if self.family not in BASELINES:
            BASELINES[self.family] = self._run("baseline", distill=False, opts=CLIPPING)["model"]
        return BASELINES[self.family]

    def off(self):
        keys = self.recipe.keys_when_off.items()
        opts = [item for key, value in keys for item in (f"MODEL.DISTILLER.{key}", value)]
        return self._run("off", opts=[*CLIPPING, *opts])

    def whole(self):
        """A run of two iterations, with a checkpoint after each, and its trainer."""
        if "whole" not in self.done:
            self.job.config.OUTPUT_DIR = str(self.output("whole"))
            trainer = self.job.trainer(opts=["SOLVER.CHECKPOINT_PERIOD", 1])
            with as_in_a_new_process():
                trainer.train()
            self.done["whole"] = checkpoint(self.output("whole")), trainer
        return self.done["whole"]

    def resumed(self):
        """The second iteration of ``whole`` once more."""
        self.whole()
        rewind(self.output("whole"), "model_0000000")
        (self.output("whole") / "model_final.pth").unlink()
        return self._run("whole", "--resume", opts=["SOLVER.CHECKPOINT_PERIOD", 1])

    def _run(self, name, *arguments, distill=True, opts=()):
        with as_in_a_new_process():
            self.job.run(*arguments, distill=distill, opts=[*opts, "OUTPUT_DIR", self.output(name)])
        return checkpoint(self.output(name))


@functools.cache
def torchscript_functions():
    values = [value for module in list(sys.modules.values()) for value in vars(module).values()]
    return [value for value in values if type(value) is torch.jit.ScriptFunction]


@contextlib.contextmanager
def as_in_a_new_process():
    """No TorchScript function is optimized yet, and each will be after its first call."""
    for function in torchscript_functions():
        function._debug_flush_compilation_cache()
    with torch.jit.optimized_execution(True):
        yield


@pytest.fixture(scope="module", params=RUNS, ids=", ".join)
def runs(request, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), *request.param)


def test_weight_zero_equals_the_baseline(runs):
    """Law 1, bit for bit on a CPU, with what the loss trains in an optimizer."""
    assert_equal(runs.baseline(), runs.off()["model"])


def test_teacher_is_bit_identical_after_training(runs):
    """Law 2, with the default TEACHER_PREPARE."""
    _, trainer = runs.whole()
    teacher = trainer.plain_model.teacher.model
    assert runs.job.node.TEACHER_PREPARE
    loaded = torch.load(runs.job.folder / "teacher" / "teacher.pth", weights_only=True)["model"]
    assert_equal(teacher.state_dict(), loaded)
    assert not any(module.training for module in teacher.modules())


def test_checkpoint_is_a_plain_student(runs):
    """Law 9; the loss's own parameters are apart, and trained."""
    saved, trainer = runs.whole()
    build_model(student_config(runs.job.config)).load_state_dict(saved["model"], strict=True)
    losses = trainer.plain_model.losses
    assert saved["distiller"].keys() == losses.state_dict().keys()
    early = checkpoint(runs.output("whole"), "model_0000000")
    assert bool(changed(early["distiller"], saved["distiller"])) == bool(list(losses.parameters()))
    assert changed(early["model"], saved["model"])


def test_resumed_run_equals_the_whole(runs):
    """Law 13, bit for bit on a CPU."""
    whole, _ = runs.whole()
    resumed = runs.resumed()
    assert resumed["trainer"]["iteration"] == 1
    for part in ("model", "distiller"):
        assert_equal(whole[part], resumed[part])


@pytest.mark.parametrize("family", [name for name, family in families().items() if family.config])
def test_evaluation_needs_no_teacher(tmp_path, family):
    """Law 9."""
    runs = Runs(tmp_path, "PKD", family)
    config = runs.job.config
    config.MODEL.WEIGHTS = str(tmp_path / "student.pth")
    torch.save({"model": build_model(student_config(config)).state_dict()}, config.MODEL.WEIGHTS)
    runs.job.node.MODEL_DISTILLER_CONFIG = "there/is/no/teacher.yaml"
    config.DATASETS.TEST = config.DATASETS.TRAIN
    assert "AP" in runs.job.run("--eval-only")["bbox"]
    assert "Teacher: " not in (Path(config.OUTPUT_DIR) / "log.txt").read_text()
