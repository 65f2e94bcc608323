import gc
import itertools
import logging
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]

from detectron2.config import CfgNode
from detectron2.engine import defaults
from pool import Pool

import distill_d2  # noqa: F401  first: it silences detectron2's known warnings

# TorchScript functions change their last bits once they were optimized: steps outside of a trainer, which
# sees to that itself, would differ from the ones before.
torch._C._set_graph_executor_optimize(False)

SHARED = ROOT.parent / "shared"

pytest_plugins = ["memory"]

# The files that take longest: started last, one of them would keep a parallel run waiting for a minute.
LONGEST = (
    *("engine/test_processes.py", "test_golden.py", "laws/test_steps.py", "test_plugins.py"),
    *("engine/test_solvers.py", "engine/test_commands.py", "commands/test_convert_torchdistill.py"),
    *("laws/test_runs.py", "test_configs.py", "commands/test_visualize.py"),
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would start files with few tests last


def pytest_collection_modifyitems(items):
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
    """Else each full collection of garbage looks through all tests, in 0.1 seconds and more."""
    gc.collect()
    gc.freeze()


_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _one_thread_one_seed(monkeypatch, request, tmp_path_factory):
    """Equal results on every machine; generated data never lands in the checkout."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # For caplog; a job's logging, or the benchmark's, turns these off.
    logging.getLogger("distill_d2").propagate = True
    logging.getLogger("distill_d2").setLevel(logging.DEBUG)
    # Most tests write no data: making a folder for each of them would take as long as they do.
    folder = tmp_path_factory.getbasetemp() / f"unused{next(_NUMBERS)}"
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder / "datasets"))


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch):
    """What detectron2 does at each start takes longer than tiny trainings: a report of the machine, a colored
    config, and yaml of the whole config, written by Python and read again for each key that it looks up."""
    monkeypatch.setattr(yaml, "SafeDumper", getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    monkeypatch.setattr(defaults, "collect_env_info", lambda: "")
    monkeypatch.setattr(defaults, "_highlight", lambda code, _filename: code)
    monkeypatch.setattr(defaults, "_try_get_key", _first_of)


def _first_of(cfg, *keys, default=None, slowly=defaults._try_get_key):
    """The value of the first key that a config has."""
    if not isinstance(cfg, CfgNode) or "${" in repr(cfg):  # OmegaConf's way to name another key
        return slowly(cfg, *keys, default=default)
    return next((cfg[key] for key in keys if key in cfg), default)


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
