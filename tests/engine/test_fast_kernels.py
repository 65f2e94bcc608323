"""MODEL.FAST_KERNELS changes a run by rounding alone, and nothing that the run leaves."""

import torch
from runs import checkpoint

from distill_d2.engine import DistillTrainer
from distill_d2.engine.step import TrainStep


def left_by(trainer):
    """Strides of all tensors of the model and its checkpoint, dilations, and whether the config has the key."""
    saved = checkpoint(trainer.settings.output_dir)
    states = saved["trainer"]["_trainer"]["optimizer"]["state"].values()
    student = trainer.plain_model.student
    tensors = [*saved["model"].values(), *(state["momentum_buffer"] for state in states)]
    strides = [tensor.stride() for tensor in [*tensors, *student.state_dict().values()]]
    with open(f"{trainer.settings.output_dir}/config.yaml") as file:
        config = file.read()
    dilations = [getattr(module, "dilation", None) for module in student.modules()]
    return strides, dilations, "FAST_KERNELS" in config


def test_a_run_differs_by_rounding_alone(job, monkeypatch):
    seen, step = [], TrainStep.run_step

    def run_step(self):
        backbone = self.model.student.backbone
        seen.append((backbone.fpn_output2.weight.is_contiguous(), backbone.fpn_lateral2.dilation))
        step(self)

    monkeypatch.setattr(TrainStep, "run_step", run_step)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    left, models = [], []
    for fast in (False, True):
        opts = ["MODEL.FAST_KERNELS", fast, "OUTPUT_DIR", job.folder / str(fast), "DATASETS.TEST", ()]
        trainer = DistillTrainer(job.setup(opts=opts))
        trainer.resume_or_load(resume=False)
        trainer.train()
        left.append(left_by(trainer))
        models.append(trainer.plain_model.state_dict())
    assert seen == [(True, (1, 1))] * 4 + [(False, (2, 2))] * 4
    assert left[0] == left[1] and not left[0][-1]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-4, atol=1e-5)
