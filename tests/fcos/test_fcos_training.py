"""FCOS by the two scripts: training and evaluation of small images."""

import json

import pytest
import torch
from detectron2.engine import defaults
from detectron2.modeling import build_model
from fcos_case import CLASSES, fcos_config
from tiny import distiller_config, save_teacher, use_dataset, write_dataset

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
    cfg = fcos_config(INFERENCE_TH_TEST=0.0)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, ()
    student = cfg
    if distill:
        cfg = distiller_config(cfg, save_teacher(fcos_config(width=16), tmp_path / "teacher"))
        cfg.MODEL.DISTILLER.PRELOAD_FPN = cfg.MODEL.DISTILLER.PRELOAD_HEAD = True
    result, losses = run(tmp_path, cfg, distill)
    own = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert losses == own | ({"loss_pkd"} if distill else set())
    assert 0 <= result["bbox"]["AP"] <= 100
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict


def test_another_number_of_classes(tmp_path):
    cfg = fcos_config(NUM_CLASSES=CLASSES + 1)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"has 3 classes \(.*\), but MODEL.FCOS.NUM_CLASSES is 4; set it to 3"):
        run(tmp_path, cfg, False)
