"""FCOS by the two scripts: training and evaluation of small images."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from fcos_case import CLASSES, fcos_config
from runs import run_script

from distill_d2.testing.tiny import distiller_config, save_teacher, use_dataset, write_dataset


@pytest.mark.parametrize("distill", [False, True])
def test_training_and_evaluation(tmp_path, distill):
    cfg = fcos_config(INFERENCE_TH_TEST=0.0)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, ()
    student = cfg
    if distill:
        cfg = distiller_config(cfg, save_teacher(fcos_config(width=16), tmp_path / "teacher"))
        cfg.MODEL.DISTILLER.PRELOAD_FPN = cfg.MODEL.DISTILLER.PRELOAD_HEAD = True
    result, losses = run_script(tmp_path, cfg, distill)
    own = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert losses == own | ({"loss_pkd"} if distill else set())
    assert 0 <= result["bbox"]["AP"] <= 100
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict


def test_weights_by_the_address_of_their_page(tmp_path, monkeypatch):
    """The student's and the teacher's."""
    page = "https://huggingface.co/tianzhi/AdelaiDet-FCOS/blob/main/FCOS_{}.pth?download=true"
    student, teacher = fcos_config(INFERENCE_TH_TEST=0.0), fcos_config(width=16)
    files, asked, plain = {}, [], PathManager.get_local_path
    for name, cfg in (("student", student), ("teacher", teacher)):
        files[f"FCOS_{name}.pth"] = path = tmp_path / f"{name}.pth"
        torch.save({"model": build_model(cfg).state_dict()}, path)

    def get(path, **options):
        if not path.startswith("https://"):
            return plain(path, **options)
        asked.append(path)
        return str(files[path.rpartition("/")[2]])

    monkeypatch.setattr(PathManager, "get_local_path", get)
    use_dataset(student, write_dataset(tmp_path / "data"))
    student.SOLVER.MAX_ITER, student.SOLVER.STEPS, student.SOLVER.BASE_LR = 1, (), 0.0
    cfg = distiller_config(student, save_teacher(teacher, tmp_path / "teacher"))
    cfg.MODEL.WEIGHTS = page.format("student")
    cfg.MODEL.DISTILLER.TEACHER_WEIGHTS = page.format("teacher")
    run_script(tmp_path, cfg, True)
    direct = "https://huggingface.co/tianzhi/AdelaiDet-FCOS/resolve/main/FCOS_{}.pth"
    assert set(asked) == {direct.format("student"), direct.format("teacher")}
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    expected = torch.load(files["FCOS_student.pth"], weights_only=True)["model"]
    names = [name for name in expected if name.endswith("cls_logits.weight")]
    assert len(names) == 1 and torch.equal(weights[names[0]], expected[names[0]])


def test_another_number_of_classes(tmp_path):
    cfg = fcos_config(NUM_CLASSES=CLASSES + 1)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    with pytest.raises(ValueError, match="3 classes .* but MODEL.FCOS.NUM_CLASSES is 4; set it to 3"):
        run_script(tmp_path, cfg, False)
