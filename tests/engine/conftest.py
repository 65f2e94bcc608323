import pytest
from detectron2.engine import defaults
from job import Job


@pytest.fixture(autouse=True)
def _no_report_of_the_machine(monkeypatch):
    """detectron2 writes one at each start, which takes longer than these trainings."""
    monkeypatch.setattr(defaults, "collect_env_info", lambda: "")


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)
