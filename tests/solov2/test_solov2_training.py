"""The two scripts' jobs on a SOLOv2, and its packaged configs."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Instances
from distill_d2.projects.solov2.inference import boxes_of
from runs import run_script
from solov2_case import config

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.data import register_custom_datasets
from distill_d2.evaluation import build_evaluator
from distill_d2.testing.tiny import distiller_config, save_teacher, use_dataset, write_dataset

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("kind", ["baseline", "PKD", "InstanceConditionalDistillation"])
def test_training_and_evaluation(tmp_path, kind):
    cfg = config(SCORE_THR=0.001, UPDATE_THR=0.0)  # so that there is something to evaluate
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", 0])
    student, distill = cfg, kind != "baseline"
    if distill:
        cfg = distiller_config(cfg, save_teacher(config(width=16), tmp_path / "teacher"), [kind])
        node = cfg.MODEL.DISTILLER
        node.INS.HIDDEN_DIM, node.INS.ATT_HEADS, node.BYPASS_DISTILL = 16, 4, 0
        node.PRELOAD_HEAD = True
    result, losses = run_script(tmp_path, cfg, distill)
    own = {"PKD": {"loss_pkd"}, "baseline": set()}
    own["InstanceConditionalDistillation"] = {"loss_icd_conf_0", "loss_icd_reg_0", "loss_icd_value"}
    assert losses == {"loss_ins", "loss_cate"} | own[kind]
    assert 0 <= result["segm"]["AP"] <= 100 and 0 <= result["bbox"]["AP"] <= 100
    weights = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    build_model(student).load_state_dict(weights)  # strict


def test_number_of_classes_is_that_of_the_dataset(tmp_path):
    cfg = config(NUM_CLASSES=7)
    use_dataset(cfg, write_dataset(tmp_path / "data"))
    with pytest.raises(ValueError, match="has 3 classes .* MODEL.SOLOV2.NUM_CLASSES is 7; set it to 3"):
        run_script(tmp_path, cfg, distill=False)


def test_masks_are_evaluated_as_they_are(tmp_path):
    """A detector that knows the answer has an AP of 100, for boxes too."""
    entry = write_dataset(tmp_path / "data")
    register_custom_datasets([entry])
    evaluator = build_evaluator(entry["NAME"], str(tmp_path))
    evaluator.reset()
    for image in DatasetCatalog.get(entry["NAME"]):
        size = (image["height"], image["width"])
        annotations = image["annotations"]
        masks = BitMasks.from_polygon_masks([a["segmentation"] for a in annotations], *size).tensor
        found = Instances(size, scores=torch.ones(len(masks)), pred_masks=masks)
        found.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        found.pred_boxes = boxes_of(masks)
        evaluator.process([image], [{"instances": found}])
    result = evaluator.evaluate()
    assert result["segm"]["AP"] == pytest.approx(100) and result["bbox"]["AP"] == pytest.approx(100)


# Configs


def load(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, str(CONFIGS / name))
    return cfg


@pytest.mark.parametrize("depth", [50, 101])
def test_published_configs(depth):
    cfg = load(f"SOLOv2/R{depth}_3x.yaml")
    solver = cfg.SOLVER
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RESNETS.DEPTH) == ("SOLOv2", depth)
    assert cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask"
    assert (solver.STEPS, solver.MAX_ITER) == ((210000, 250000), 270000)
    assert (solver.BASE_LR, solver.IMS_PER_BATCH) == (0.01, 16)
    assert (solver.WARMUP_FACTOR, solver.WARMUP_ITERS) == (0.01, 1000)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)


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
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters > 0.6e6) == (role == "teacher")
    ends = cfg.MODEL.SOLOV2.FPN_SCALE_RANGES
    assert all(low < high_before for (low, _), (_, high_before) in zip(ends[1:], ends))


def test_quickstarts_classes_are_its_dataset(shared):
    cfg = load("quickstart/Base-nuclei_solov2.yaml")
    for entry in cfg.DATASETS.CUSTOM:
        annotations = json.loads((shared / "data" / entry["JSON"]).read_text())
        assert len(annotations["categories"]) == cfg.MODEL.SOLOV2.NUM_CLASSES
        per_image = [a["image_id"] for a in annotations["annotations"]]
        most = max(per_image.count(image["id"]) for image in annotations["images"])
        assert most <= cfg.MODEL.SOLOV2.MAX_PER_IMG
