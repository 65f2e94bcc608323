"""One distillation, whose data are in a folder of their own, and whose teacher is gone."""

import shutil
from types import SimpleNamespace

import pytest
from runs import Job, detections


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    """``folder``: OUTPUT_DIR; ``data``: a folder with annotations.json and images/0.png to 5.png, which the run's
    config does not name; ``detections``: of the run's evaluation."""
    job = Job(tmp_path_factory.mktemp("run"))
    job.config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    job.config.TEST.DETECTIONS_PER_IMAGE = 3
    job.config.INPUT.FIXED_SIZE = [64, 96]
    job.config.INPUT.FORMAT = "RGB"
    job.config.SOLVER.MAX_ITER = 1
    job.run()
    shutil.rmtree(job.folder / "teacher")
    data = shutil.move(job.folder / "data", job.folder / "elsewhere")
    return SimpleNamespace(folder=job.output, data=data, detections=detections(job.output))
