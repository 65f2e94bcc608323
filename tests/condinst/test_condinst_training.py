"""CondInst by the two scripts: training and evaluation of small images."""

import pytest
import torch
from condinst_case import condinst_config
from detectron2.modeling import build_model
from runs import run_script

from distill_d2.testing.tiny import distiller_config, save_teacher, use_dataset, write_dataset


@pytest.mark.parametrize("distill, masks", [(False, "polygon"), (False, "bitmask"), (True, "polygon")])
def test_training_and_evaluation(tmp_path, distill, masks):
    cfg = condinst_config(INFERENCE_TH_TEST=0.0)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.INPUT.MASK_FORMAT = 2, (), masks
    student = cfg
    if distill:
        teacher = condinst_config(width=16, MASK_BRANCH__SEMANTIC_LOSS_ON=True)
        cfg = distiller_config(cfg, save_teacher(teacher, tmp_path / "teacher"))
        cfg.MODEL.DISTILLER.PRELOAD_FPN = cfg.MODEL.DISTILLER.PRELOAD_HEAD = True
    result, losses = run_script(tmp_path, cfg, distill)
    own = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_mask"}
    assert losses == own | ({"loss_pkd"} if distill else set())
    assert 0 <= result["bbox"]["AP"] <= 100 and 0 <= result["segm"]["AP"] <= 100
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict
    assert weights["mask_head._iter"].item() == 2
