import logging
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

from detectron2.engine import defaults
from pool import Pool

import distill_d2  # noqa: F401  first: it silences detectron2's known warnings

# TorchScript functions change their last bits once they were optimized: steps outside of a trainer, which
# sees to that itself, would differ from the ones before.
torch._C._set_graph_executor_optimize(False)

SHARED = ROOT.parent / "shared"

pytest_plugins = ["memory"]


@pytest.fixture(autouse=True)
def _one_thread_one_seed(monkeypatch, tmp_path):
    """Equal results on every machine; generated data never lands in the checkout."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # For caplog; a job's logging, or the benchmark's, turns these off.
    logging.getLogger("distill_d2").propagate = True
    logging.getLogger("distill_d2").setLevel(logging.DEBUG)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))


@pytest.fixture(autouse=True)
def _no_report_of_the_machine(monkeypatch):
    """detectron2 writes one at each start, which takes longer than tiny trainings."""
    monkeypatch.setattr(defaults, "collect_env_info", lambda: "")


@pytest.fixture
def shared():
    """The folder of real data and golden fixtures beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real data and golden fixtures in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def pool():
    """Two processes, for all tests that need them."""
    processes = Pool()
    yield processes
    processes.close()
