"""Weights & Biases and MLflow, which are not installed here: modules that note what they are given."""

import sys
from types import SimpleNamespace

import pytest
from runs import metrics, rewind


class Tracker:
    """In place of both packages."""

    def __init__(self):
        self.starts, self.sent, self.closed = [], [], 0

    def init(self, **options):
        self.starts.append(options["id"])
        return SimpleNamespace(
            id="a1", log=lambda scalars, step: self.log_metrics(scalars, step), finish=self.end_run
        )

    def start_run(self, run_id, run_name):
        self.starts.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id="a1"))

    def log_metrics(self, scalars, step):
        self.sent.append((step, scalars))

    def end_run(self):
        self.closed += 1

    def set_experiment(self, name):
        assert name == "distill_d2"

    def log_text(self, text, file):
        assert "MODEL:" in text


@pytest.mark.parametrize(
    "package, words", [("wandb", ["--wandb"]), ("mlflow", ["MLFLOW.ENABLED", "True"])]
)
def test_each_iteration_is_sent_once_and_a_resumed_run_goes_on(package, words, job, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, package, tracker)
    job.config.SOLVER.CHECKPOINT_PERIOD = 2
    job.run(*words)
    rewind(job.output, "model_0000001")
    job.run("--resume", *words)
    assert tracker.starts == [None, "a1"] and tracker.closed == 2
    losses = [(step, values["loss_pkd"]) for step, values in tracker.sent if "loss_pkd" in values]
    logged = [
        (line["iteration"], line["loss_pkd"]) for line in metrics(job.output) if "loss_pkd" in line
    ]
    assert losses == 2 * logged  # each of the two runs reached the end
    assert any("bbox/AP" in values for _, values in tracker.sent)


def test_missing_package(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    job.fails(ImportError, "MLFLOW.ENABLED", "pip install mlflow", opts=["MLFLOW.ENABLED", True])
