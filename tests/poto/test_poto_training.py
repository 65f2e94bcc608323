"""The two scripts' jobs on a POTO."""

import pytest
import torch
from detectron2.modeling import build_model
from poto_case import config
from runs import run_script

from distill_d2.testing.tiny import distiller_config, save_teacher, use_dataset, write_dataset


@pytest.mark.parametrize("distill", [False, True])
def test_training_and_evaluation(tmp_path, distill):
    cfg = config("both", SCORE_THRESH_TEST=0.0)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.VERSION = 2, (), 2
    student = cfg
    if distill:
        teacher = save_teacher(config("both", width=16), tmp_path / "teacher")
        cfg = distiller_config(cfg, teacher, ["InstanceConditionalDistillation"])
        cfg.MODEL.DISTILLER.INS.HIDDEN_DIM = 16
        cfg.MODEL.DISTILLER.PRELOAD_FPN = cfg.MODEL.DISTILLER.PRELOAD_HEAD = True
    result, losses = run_script(tmp_path, cfg, distill)
    assert 0 <= result["bbox"]["AP"] <= 100
    expected = {"loss_cls", "loss_box_reg", "loss_cls_aux"}
    if distill:
        expected |= {"loss_icd_conf_0", "loss_icd_reg_0", "loss_icd_value"}
    assert losses == expected
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict
