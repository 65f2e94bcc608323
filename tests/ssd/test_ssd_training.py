"""The two scripts' jobs on an SSD."""

import json

import pytest
import torch
from detectron2.engine import defaults
from detectron2.modeling import build_model
from ssd_case import config
from tiny import CLASSES, distiller_config, save_teacher, use_dataset, write_dataset

from distill_d2.engine import argument_parser, main


@pytest.fixture(autouse=True)
def _no_report_of_the_machine(monkeypatch):
    """detectron2 writes one at each start, which takes longer than these trainings."""
    monkeypatch.setattr(defaults, "collect_env_info", lambda: "")


def run(folder, cfg, distill):
    cfg.OUTPUT_DIR = str(folder / "output")
    path = folder / "config.yaml"
    path.write_text(cfg.dump())
    arguments = ["--num-gpus", "0", "--config-file", str(path)]
    result = main(argument_parser().parse_args(arguments), distill)
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    return result, {name for line in lines for name in json.loads(line) if name.startswith("loss_")}


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
    result, losses = run(tmp_path, cfg, distill)
    assert losses == {"loss_box_reg", "loss_cls", *(["loss_pkd"] if distill else [])}
    assert 0 <= result["bbox"]["AP"] <= 100
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict
