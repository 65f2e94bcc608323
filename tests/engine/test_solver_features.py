"""A moving average of the student, a step in several parts, and all that a run may have together."""

import pytest
import torch
from runs import Job, assert_equal, changed, checkpoint, metrics, rewind
from torch import nn

from distill_d2.engine import DistillTrainer, argument_parser, setup
from distill_d2.engine.ema import AveragedWeights

FEW = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()]
ALL = ["SOLVER.EPOCHS", 2.0, "SOLVER.STEPS", (0.5,), "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.EMA", 0.9]
ALL += ["SOLVER.ACCUMULATE", 2, "SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 1]
ALL += ["TEST.KEEP_BEST", "bbox/AP", "TEST.PATIENCE", 9, "DATALOADER.NUM_WORKERS", 1]


class FakeTrainer:
    """A step after which the hook acts, without pretraining."""

    pretraining, iter = False, 0

    def __init__(self):
        self.loss_training = self
        self.pretrain_iters = 0


def test_the_average_by_hand():
    """Decays of 2 / 11, 3 / 12 and then the constant one; batch norm's statistics, too; tied weights once."""
    student = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    student.add_module("tied", student[0])
    average = AveragedWeights(student, 0.3)
    average.trainer = FakeTrainer()
    average.before_train()
    weight, mean = student[0].weight, student[1].running_mean
    expected = {"0.weight": weight.item(), "1.running_mean": float(mean)}
    for step, decay in enumerate([2 / 11, 3 / 12, 0.3]):
        with torch.no_grad():
            weight.add_(step + 1)
            mean.add_(2)
        average.trainer.iter = step
        average.after_step()
        for name, tensor in (("0.weight", weight), ("1.running_mean", mean)):
            expected[name] = decay * expected[name] + (1 - decay) * tensor.item()
    trained = {name: tensor.clone() for name, tensor in average.entries()["trained_weights"].items()}
    with average.applied():
        assert student[0].weight is weight
        for name, value in expected.items():
            assert float(student.state_dict()[name]) == pytest.approx(value)
        assert_equal(average.entries()["trained_weights"], trained)
    assert_equal({name: student.state_dict()[name] for name in trained}, trained)


def test_the_average_is_what_is_evaluated_and_saved(job):
    """Beside the training, which stays what it is without."""
    job.run(opts=[*FEW, "OUTPUT_DIR", job.folder / "plain"])
    job.config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    results = job.run(opts=[*FEW, "SOLVER.EMA", 0.9])
    saved = checkpoint(job.output)
    plain = checkpoint(job.folder / "plain")["model"]
    trained = saved["trainer"]["trained_weights"]
    assert_equal(trained, {name: plain[name] for name in trained})
    assert changed(trained, {name: saved["model"][name] for name in trained})
    weights = ["MODEL.WEIGHTS", job.output / "model_final.pth"]
    assert job.run("--eval-only", opts=weights)["bbox"]["AP"] == results["bbox"]["AP"] > 0


def test_parts_of_a_step_give_its_gradients(tmp_path):
    """Of a loss that is a mean over the images, without batch statistics; with workers, and a loss's adapters."""
    job = Job(tmp_path, types=["FeatureMimic"], evaluate=False)
    job.config.MODEL.SMALL_RESNET.NORM = "FrozenBN"
    job.config.INPUT.FIXED_SIZE, job.node.TASK_LOSS_WEIGHT = [64, 64], 0.0
    opts = [*FEW, "SOLVER.IMS_PER_BATCH", 6, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    runs = []
    for parts in (1, 3):
        folder = tmp_path / str(parts)
        job.run(opts=[*opts, "SOLVER.ACCUMULATE", parts, "OUTPUT_DIR", folder])
        runs.append((checkpoint(folder), metrics(folder)[-1]["total_loss"]))
    (whole, loss), (parted, loss_of_parts) = runs
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)
    for part in ("model", "distiller"):
        torch.testing.assert_close(whole[part], parted[part], rtol=1e-4, atol=1e-6)


def test_all_of_it_resumes_exactly(job):
    """Law 13: the trained weights, their average, the losses' parameters, and the best student."""
    job.config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    job.config.INPUT.CROP.ENABLED = True
    job.run(opts=ALL)
    whole, best = checkpoint(job.output), checkpoint(job.output, "model_best")
    assert [line["iteration"] for line in metrics(job.output) if "bbox/AP" in line] == [0, 1, 3]
    assert whole["trainer"]["iteration"] == 2
    rewind(job.output, "model_0000000")
    (job.output / "model_final.pth").unlink()
    job.run("--resume", opts=ALL)
    resumed = checkpoint(job.output)
    for part in ("model", "distiller"):
        assert_equal(whole[part], resumed[part])
    assert_equal(whole["trainer"]["trained_weights"], resumed["trainer"]["trained_weights"])
    again = checkpoint(job.output, "model_best")
    assert_equal(best["model"], again["model"])
    assert best["metadata"] == again["metadata"]


def run_here(words):
    trainer = DistillTrainer(setup(argument_parser().parse_args(words), distill=True))
    trainer.resume_or_load(resume="--resume" in words)
    trainer.train()
    return {**trainer.plain_model.student.state_dict(), **trainer.average.buffers()}


def test_all_of_it_in_two_processes(pool, tmp_path):
    """They agree on the end of the run; each has statistics of its own, and their average."""
    job = Job(tmp_path)
    job.config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    job.arguments()
    words = ["--num-gpus", "0", "--config-file", job.config_file]
    opts = [*map(str, ALL), "DATALOADER.NUM_WORKERS", "0", "TEST.PATIENCE", "1"]
    whole = pool.run(run_here, [*words, *opts])
    saved = checkpoint(job.output)
    rewind(job.output, "model_0000000")
    (job.output / "model_final.pth").unlink()
    for process, uninterrupted in zip(pool.run(run_here, [*words, "--resume", *opts]), whole):
        assert_equal(process, uninterrupted)
    assert any(name.startswith("average.") for name in changed(*whole))
    assert checkpoint(job.output)["trainer"]["iteration"] == saved["trainer"]["iteration"]
