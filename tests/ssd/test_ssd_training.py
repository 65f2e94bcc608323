"""The two scripts' jobs on an SSD."""

import pytest
import torch
from detectron2.modeling import build_model
from runs import run_script
from ssd_case import config

from distill_d2.testing.tiny import CLASSES, distiller_config, save_teacher, use_dataset, write_dataset


@pytest.mark.parametrize("distill", [False, True])
def test_training_and_evaluation(tmp_path, distill):
    """Of small images, which come in 300 x 300 pixels and are judged in their own size."""
    cfg = config("C", WIDTH=0.25, NUM_CLASSES=CLASSES)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()"])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.BASE_LR", 1e-3, "TEST.EVAL_PERIOD", 0])
    student = cfg
    if distill:
        teacher = config("B", WIDTH=0.125, NUM_CLASSES=CLASSES)
        cfg = distiller_config(cfg, save_teacher(teacher, tmp_path / "teacher"))
    result, losses = run_script(tmp_path, cfg, distill)
    assert losses == {"loss_box_reg", "loss_cls", *(["loss_pkd"] if distill else [])}
    assert 0 <= result["bbox"]["AP"] <= 100
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict
