"""A trained detector from a run's folder, a config or one file, without the run's data and teacher."""

import shutil

import cv2
import pytest
import torch
from runs import checkpoint

from distill_d2.inference import load_trained


def images(run):
    return [cv2.imread(str(run.data / "images" / f"{index}.png")) for index in range(6)]


def test_predictions_are_those_of_the_evaluation(run):
    trained = load_trained(str(run.folder))
    assert trained.classes == ["class0", "class1", "class2"]
    for image_id, (image, found) in enumerate(zip(images(run), trained.predict(images(run))), start=1):
        scores = [item["score"] for item in run.detections if item["image_id"] == image_id]
        assert len(scores) > 0
        assert found.scores.tolist() == pytest.approx(scores)
        assert found.image_size == image.shape[:2]


def test_one_file_and_a_config_give_the_same(run, tmp_path):
    saved = checkpoint(run.folder)
    text = (run.folder / "config.yaml").read_text()
    entries = {"model": saved["model"], "metadata": {"thing_classes": ["a", "b", "c"]}, "config": text}
    torch.save(entries, tmp_path / "student.pth")
    shutil.copy(run.folder / "config.yaml", tmp_path / "student.yaml")
    expected = load_trained(str(run.folder)).predict(images(run)[:1])[0]
    exported = load_trained(str(tmp_path / "student.pth"))
    for trained in (
        exported,
        load_trained(str(tmp_path / "student.yaml"), str(tmp_path / "student.pth")),
    ):
        assert trained.classes == ["a", "b", "c"]
        assert torch.equal(trained.predict(images(run)[:1])[0].scores, expected.scores)


def test_the_best_checkpoint_comes_first(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    shutil.copy(folder / "model_final.pth", folder / "model_best.pth")
    assert load_trained(str(folder)).cfg.MODEL.WEIGHTS == str(folder / "model_best.pth")


def test_weights_that_do_not_fill_the_model(run, tmp_path):
    saved = checkpoint(run.folder)
    del saved["model"]["head.cls_score.weight"]
    torch.save(saved, tmp_path / "less.pth")
    with pytest.raises(
        ValueError, match="less.pth' do not fit .*\n.* missing in the file: head.cls_score.weight"
    ):
        load_trained(str(run.folder), str(tmp_path / "less.pth"))


def test_a_mapper_of_the_users_reads_a_file(run):
    trained = load_trained(str(run.folder))
    trained.mapper = lambda record: {
        "image": torch.from_numpy(cv2.imread(record["file_name"])),
        **record,
    }
    item = trained.inputs(images(run)[0])
    assert (item["image"].numpy() == images(run)[0]).all()
    assert (item["height"], item["width"]) == images(run)[0].shape[:2]


def test_the_folder_of_a_lazy_run(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  _target_: os.system\n")
    with pytest.raises(ValueError, match="LazyConfig, which is code; give that .py file as the run"):
        load_trained(str(tmp_path))
