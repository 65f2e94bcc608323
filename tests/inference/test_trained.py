"""A trained detector from a run's folder, a config or one file, without the run's data and teacher."""

import shutil

import cv2
import pytest
import torch
from runs import Job, detections

from distill_d2.inference import load_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """OUTPUT_DIR of a distillation whose data and teacher are gone, its images, its own detections."""
    job = Job(tmp_path_factory.mktemp("run"))
    job.config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    job.config.INPUT.FIXED_SIZE = [64, 96]
    job.config.INPUT.FORMAT = "RGB"
    job.config.SOLVER.MAX_ITER = 1
    job.run()
    images = [cv2.imread(str(job.folder / "data" / "images" / f"{index}.png")) for index in range(6)]
    for name in ("data", "teacher"):
        shutil.rmtree(job.folder / name)
    return job.output, images, detections(job.output)


def test_predictions_are_those_of_the_evaluation(run):
    folder, images, expected = run
    trained = load_trained(str(folder))
    assert trained.classes == ["class0", "class1", "class2"]
    for image_id, found in enumerate(trained.predict(images), start=1):
        scores = [item["score"] for item in expected if item["image_id"] == image_id]
        assert len(scores) > 0
        assert found.scores.tolist() == pytest.approx(scores)
        assert found.image_size == images[image_id - 1].shape[:2]


def test_weights_that_do_not_fill_the_model(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    del saved["model"]["head.cls_score.weight"]
    torch.save(saved, folder / "model_final.pth")
    with pytest.raises(ValueError, match=r"model_final.pth' do not fill .*head.cls_score.weight"):
        load_trained(str(folder))
