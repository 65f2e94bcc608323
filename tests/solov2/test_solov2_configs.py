"""The packaged configs, and the tensors of the published networks."""

import json

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file


def load(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(name))
    return cfg


def shapes_of(cfg):
    """A model without weights."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("depth", [50, 101])
def test_published_configs(depth):
    cfg = load(f"SOLOv2/R{depth}_3x.yaml")
    solver = cfg.SOLVER
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RESNETS.DEPTH) == ("SOLOv2", depth)
    assert cfg.MODEL.SOLOV2.NUM_GRIDS == [40, 36, 24, 16, 12]
    assert cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask"
    assert (solver.STEPS, solver.MAX_ITER) == ((210000, 250000), 270000)
    assert (solver.BASE_LR, solver.IMS_PER_BATCH) == (0.01, 16)
    assert (solver.WARMUP_FACTOR, solver.WARMUP_ITERS) == (0.01, 1000)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)


@pytest.mark.parametrize("depth", [50, 101])
def test_tensors_of_the_published_networks(shared, depth):
    recorded = json.loads((shared / "golden" / "adet_state_dict_keys.json").read_text())
    recorded, model = recorded[f"SOLOv2_R{depth}_3x"], shapes_of(load(f"SOLOv2/R{depth}_3x.yaml"))
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == recorded["state_dict"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == recorded["trainable"]


def test_teacher():
    cfg, plain = load("Teachers/SOLOv2_R101_3x_ms.yaml"), load("SOLOv2/R101_3x.yaml")
    expected = "https://huggingface.co/ZjuCv/AdelaiDet/resolve/main/SOLOv2_R101_3x.pth"
    assert cfg.MODEL.WEIGHTS == expected
    cfg.MODEL.WEIGHTS = plain.MODEL.WEIGHTS
    assert cfg == plain


def test_icd():
    """Table 6.1 of its specification, but for levels that exist."""
    cfg = load("Distillation-ICD/SOLOv2_R_50_R101_icd_FPN_1x.yaml")
    node, solver = cfg.MODEL.DISTILLER, cfg.SOLVER
    assert not node.MODEL_LOAD_OFFICIAL
    assert node.MODEL_DISTILLER_CONFIG == "Teachers/SOLOv2_R101_3x_ms.yaml"
    assert node.TYPES == ["InstanceConditionalDistillation"]
    assert (node.INS.MAX_LABELS, node.INS_ATT_MIMIC.WEIGHT_VALUE) == (300, 8.0)
    assert (solver.STEPS, solver.MAX_ITER, solver.BASE_LR) == ((60000, 80000), 90000, 0.01)
    assert solver.CLIP_GRADIENTS.ENABLED and cfg.MODEL.RESNETS.DEPTH == 50
    assert cfg.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    teacher = load(node.MODEL_DISTILLER_CONFIG)
    with torch.device("meta"):  # shapes without weights
        levels = [build_backbone(each).output_shape() for each in (cfg, teacher)]
    assert list(levels[0]) == list(levels[1]) == node.INS.INPUT_FEATS
    assert {shape.channels for shape in levels[0].values()} == {node.INS.HIDDEN_DIM}


@pytest.mark.parametrize("role", ["student", "teacher", "icd"])
def test_quickstart(role):
    cfg = load(f"quickstart/nuclei_solov2_{role}.yaml")
    parameters = sum(p.numel() for p in shapes_of(cfg).parameters())
    assert (parameters > 0.6e6) == (role == "teacher")
    ranges = cfg.MODEL.SOLOV2.FPN_SCALE_RANGES
    assert all(low < previous for (low, _), (_, previous) in zip(ranges[1:], ranges))


def test_quickstart_fits_its_dataset(shared):
    cfg = load("quickstart/Base-nuclei_solov2.yaml")
    for entry in cfg.DATASETS.CUSTOM:
        annotations = json.loads((shared / "data" / entry["JSON"]).read_text())
        assert len(annotations["categories"]) == cfg.MODEL.SOLOV2.NUM_CLASSES
        per_image = [a["image_id"] for a in annotations["annotations"]]
        assert max(map(per_image.count, set(per_image))) <= cfg.MODEL.SOLOV2.MAX_PER_IMG
