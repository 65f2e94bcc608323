"""Finding configs: by path, from the config that names them, by packaged name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from detectron2 import model_zoo as detectron2_zoo

from distill_d2 import model_zoo

NAME = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
DETECTRON2_ONLY = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture()
def package(tmp_path, monkeypatch):
    """A folder that stands for the installed package's."""
    folder = tmp_path / "site-packages" / "distill_d2"
    folder.mkdir(parents=True)
    monkeypatch.setattr(model_zoo, "_PACKAGE", folder)
    return folder


def write(path, text="VERSION: 2\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_ours_comes_before_detectron2s():
    path = model_zoo.get_config_file(NAME)

    assert os.path.isabs(path) and os.path.isfile(path)
    assert path != detectron2_zoo.get_config_file(NAME)


def test_detectron2s_is_the_fallback():
    path = model_zoo.get_config_file(DETECTRON2_ONLY)

    assert os.path.samefile(path, detectron2_zoo.get_config_file(DETECTRON2_ONLY))


def test_leading_configs_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert model_zoo.find_config(f"configs/{NAME}") == model_zoo.get_config_file(NAME)


def test_available_configs():
    names = model_zoo.available_configs()

    assert names == sorted(names)
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")} <= set(names)
    assert {NAME, DETECTRON2_ONLY, "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"} <= set(names)
    assert all(os.path.isfile(model_zoo.get_config_file(name)) for name in names[::20])


def test_installed_wheel_has_them_inside_the_package(package):
    shutil.copytree(CONFIGS, package / "configs")

    assert model_zoo.get_config_file(NAME) == str(package / "configs" / NAME)


def test_configs_beside_an_installed_package_are_somebody_elses(package):
    write(package.parent / "configs" / "mine.yaml")

    with pytest.raises(FileNotFoundError):
        model_zoo.get_config_file("mine.yaml")


def test_unknown_name_lists_close_ones():
    with pytest.raises(FileNotFoundError) as error:
        model_zoo.get_config_file("COCO-Detection/retinanet_R50_FPN_1x.yml")

    assert NAME in str(error.value)


def test_find_order_is_current_folder_then_naming_config_then_package(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    monkeypatch.chdir(here)
    packaged = model_zoo.find_config(NAME, relative_to=str(beside))
    in_beside = write(beside / NAME)
    found_beside = model_zoo.find_config(NAME, relative_to=str(beside))
    in_here = write(here / NAME)
    found_here = model_zoo.find_config(NAME, relative_to=str(beside))

    assert packaged == model_zoo.get_config_file(NAME)
    assert (found_beside, found_here) == (in_beside, in_here)


def test_find_absolute_and_dotted_paths(tmp_path, monkeypatch):
    path = write(tmp_path / "teacher.yaml")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")

    assert model_zoo.find_config(path) == path
    assert model_zoo.find_config("../teacher.yaml") == path
    assert model_zoo.find_config("../teacher.yaml", relative_to="") == path


def test_find_error_lists_places_and_close_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(FileNotFoundError) as error:
        model_zoo.find_config("retinanet_R_50_FPN_1x.yaml", relative_to="/somewhere")

    for expected in ("'retinanet_R_50_FPN_1x.yaml'", str(tmp_path), "/somewhere", "configs", NAME):
        assert expected in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "/nowhere/teacher.yaml"])
def test_what_is_no_config_is_not_found(name, tmp_path):
    with pytest.raises(FileNotFoundError):
        model_zoo.find_config(name, relative_to=str(tmp_path))


def test_files_of_a_similar_name_are_proposed(tmp_path, monkeypatch):
    write(tmp_path / "runs" / "my_teacher.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean runs/my_teacher.yaml\?"):
        model_zoo.find_config("runs/my_teachr.yml")
    with pytest.raises(FileNotFoundError, match=r"is a folder .* Did you mean runs/my_teacher.yaml\?"):
        model_zoo.find_config("runs")
