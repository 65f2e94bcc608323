import pytest
from lazy_job import LazyJob
from runs import Job


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture
def lazy_job(tmp_path):
    return LazyJob(tmp_path)


@pytest.fixture
def log_every_iteration(monkeypatch):
    """Instead of every 20."""
    monkeypatch.setattr("distill_d2.engine.settings.LOG_PERIOD", 1)
