"""The packaged configs: plain values, valid keys, detectron2's settings, teachers with weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage

from distill_d2 import model_zoo
from distill_d2.config import add_distill_config, load_yaml, student_config
from distill_d2.engine.key_rules import check_keys, run_rules
from distill_d2.losses.base import build_losses
from distill_d2.rules import Context, Levels, check_model, faults
from distill_d2.testing import tiny_batch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DETECTRON2_CONFIGS = Path(detectron2_zoo.__file__).parent / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
# Folders below them hold plain detectors.
DISTILLATION = [name for name in NAMES if name.startswith("Distillation-") and name.count("/") == 1]
# On backbones of timm.
BACKBONES = sorted(path.stem for path in (CONFIGS / "Backbones").glob("*.yaml"))
OF_TIMM = [name for name in DISTILLATION if re.search("|".join(f"_{each}_" for each in BACKBONES), name)]
FEATURE_LOSSES = [
    name for name in DISTILLATION if name.split("/")[0] in ("Distillation-Mimic", "Distillation-PKD")
]
# With the detectors of the table below.
ICD = [
    name
    for name in DISTILLATION
    if re.match("Distillation-ICD/(retinanet|RCNN|MaskRCNN|FCOS|CondInst)_", name)
]
OFFICIAL = [name for name in NAMES if (DETECTRON2_CONFIGS / name).is_file()]

# What differs from detectron2's config of the same name: the FPN bases evaluate during training.
DIFFERENT = {"TEST.EVAL_PERIOD": 10000, "SOLVER.CHECKPOINT_PERIOD": 10000}


def load(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, str(CONFIGS / name))
    return cfg


def flat(node, prefix=""):
    """{"SOLVER.BASE_LR": 0.01, ...}, sequences as lists."""
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = list(value) if isinstance(value, tuple) else value
    return leaves


def test_the_expected_configs_exist():
    expected = {f"Base-{name}.yaml" for name in ("RCNN-C4", "RCNN-DilatedC5", "RCNN-FPN", "RetinaNet")}
    for folder in ("COCO-Detection", "COCO-InstanceSegmentation", "PascalVOC-Detection"):
        official = DETECTRON2_CONFIGS.glob(f"{folder}/*.yaml")
        expected |= {path.relative_to(DETECTRON2_CONFIGS).as_posix() for path in official}

    assert len(expected) > 20
    assert expected <= set(NAMES)
    assert len(FEATURE_LOSSES) >= 6
    assert sorted(ICD) == sorted(f"Distillation-ICD/{name}" for name in ICD_TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_holds_plain_values_and_known_keys(name):
    yaml.safe_load(
        (CONFIGS / name).read_text(encoding="utf-8")
    )  # raises at a tag, as load does for its _BASE_
    cfg = load(name)

    cfg.DATASETS.TRAIN = cfg.DATASETS.TRAIN or ("of_the_user",)
    cfg.MODEL.TIMM.NAME = cfg.MODEL.TIMM.NAME or "of_those_that_inherit"
    rules = {key: rule for key, rule in run_rules(cfg).items() if not isinstance(rule, Levels)}
    assert list(faults(Context(student_config(cfg)), rules)) == []
    if "Base-" not in name:  # a part may leave the schedule to another part
        last = max(cfg.SOLVER.STEPS, default=0)
        assert "MultiStep" not in cfg.SOLVER.LR_SCHEDULER_NAME or last < cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize(
    "name", {name.split("/")[0]: name for name in NAMES if not name.startswith("Backbones/")}.values()
)
def test_the_keys_fit_together(name):
    """One config of each folder; this builds backbones without weights."""
    cfg = load(name)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TRAIN or ("of_the_user",)
    check_keys(cfg)


@pytest.mark.parametrize("name", OFFICIAL)
def test_equals_detectron2s_config(name):
    official = flat(detectron2_zoo.get_config(name))
    values = flat(load(name))
    different = {key: values[key] for key in official if values[key] != official[key]}
    expected = {} if "C4" in name or "C5" in name else DIFFERENT

    assert different == expected


def test_retinanet_anchor_sizes():
    sizes = load("Base-RetinaNet.yaml").MODEL.ANCHOR_GENERATOR.SIZES

    expected = [[size * 2 ** (octave / 3) for octave in range(3)] for size in (32, 64, 128, 256, 512)]
    assert [pytest.approx(row, rel=1e-12) for row in expected] == sizes


@pytest.mark.parametrize("name", DISTILLATION)
def test_distillation_builds_its_losses_and_finds_its_teacher(name):
    node = load(name).MODEL.DISTILLER
    teacher = node.MODEL_DISTILLER_CONFIG

    assert list(build_losses(node)) == list(node.TYPES)
    if not node.MODEL_LOAD_OFFICIAL:
        assert model_zoo.find_config(teacher, relative_to=str((CONFIGS / name).parent))
        return
    assert detectron2_zoo.get_config_file(teacher)
    assert detectron2_zoo.get_checkpoint_url(teacher).startswith("https://")  # raises without weights


@pytest.mark.parametrize("name", [name for name in FEATURE_LOSSES + ICD if name not in OF_TIMM])
def test_distillation_student_is_the_plain_1x_config(name):
    plain = {
        "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "RCNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "MaskRCNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "FCOS": "FCOS-Detection/MS_R_50_1x.yaml",
        "CondInst": "CondInst/MS_R_50_1x.yaml",
    }
    student = flat(load(name))
    alone = flat(load(plain[Path(name).name.split("_")[0]]))
    different = {key: student[key] for key in student if student[key] != alone[key]}
    own = {key for key in different if not key.startswith("MODEL.DISTILLER.")}

    assert own == {"SOLVER.CLIP_GRADIENTS.ENABLED"}
    assert different["SOLVER.CLIP_GRADIENTS.ENABLED"] is True


@pytest.mark.parametrize("name", FEATURE_LOSSES + ICD)
def test_student_and_teacher_have_the_same_levels(name):
    cfg = load(name)
    teacher = load(cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG)

    assert cfg.MODEL.BACKBONE.NAME == teacher.MODEL.BACKBONE.NAME
    assert cfg.MODEL.FPN.IN_FEATURES == teacher.MODEL.FPN.IN_FEATURES
    assert cfg.MODEL.MASK_ON == teacher.MODEL.MASK_ON


@pytest.mark.parametrize("name", [name for name in FEATURE_LOSSES if "PKD" in name])
def test_pkd_weight_is_the_papers(name):
    cfg = load(name)
    one_stage = "retinanet" in cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG

    assert cfg.MODEL.DISTILLER.PKD.WEIGHT == (10.0 if one_stage else 6.0)


HEADS = (
    "COCO-Detection/retinanet_{}_FPN_1x",
    "COCO-Detection/faster_rcnn_{}_FPN_1x",
    "FCOS-Detection/{}_1x",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            f"{head}.yaml".format(net),
            marks=() if i % 3 == j and net != "ConvNeXt_S" else pytest.mark.slow,
        )
        for i, net in enumerate(BACKBONES)
        for j, head in enumerate(HEADS)
    ],
)
def test_a_detector_on_timm_is_built_and_stepped(name):
    """Narrow, from random weights; all that is trained gets a gradient."""
    cfg = load(name)
    check_model(student_config(cfg))
    cfg.MODEL.DEVICE, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = "cpu", 32, 32
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(tiny_batch())
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert cfg.MODEL.TIMM.WEIGHTS and cfg.MODEL.META_ARCHITECTURE == type(model).__name__


# Table 6.1 of ICD's specification: official teacher, its config, levels, MAX_LABELS, WEIGHT_VALUE,
# BASE_LR; and TEST.EVAL_PERIOD.
RETINANET_LEVELS, FPN_LEVELS = ["p3", "p4", "p5", "p6", "p7"], ["p2", "p3", "p4", "p5", "p6"]
ICD_TABLE = {
    "retinanet_R_50_R101_icd_FPN_1x.yaml": (
        *(True, "COCO-Detection/retinanet_R_101_FPN_3x.yaml", RETINANET_LEVELS, 300, 8.0, 0.01, 10000),
    ),
    "RCNN_R_50_R101_icd_FPN_1x.yaml": (
        *(True, "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", FPN_LEVELS, 100, 3.0, 0.02, 10000),
    ),
    "MaskRCNN_R_50_R101_icd_FPN_1x.yaml": (
        *(
            True,
            "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
            FPN_LEVELS,
            100,
            3.0,
            0.02,
            10000,
        ),
    ),
    "FCOS_R50_R101_icd.yaml": (
        *(False, "Teachers/FCOS_R101_2x_ms.yaml", RETINANET_LEVELS, 300, 8.0, 0.01, 0),
    ),
    "CondInst_R50_R101_icd.yaml": (
        *(False, "Teachers/CondIns_R101_3x_ms.yaml", RETINANET_LEVELS, 300, 8.0, 0.01, 0),
    ),
}


@pytest.mark.parametrize("name", ICD)
def test_icd_has_the_values_of_its_specification(name):
    cfg = load(name)
    node, solver = cfg.MODEL.DISTILLER, cfg.SOLVER
    values = (node.MODEL_LOAD_OFFICIAL, node.MODEL_DISTILLER_CONFIG, node.INS.INPUT_FEATS)
    values += (node.INS.MAX_LABELS, node.INS_ATT_MIMIC.WEIGHT_VALUE, solver.BASE_LR)
    values += (cfg.TEST.EVAL_PERIOD,)

    assert values == ICD_TABLE[Path(name).name]
    assert solver.CHECKPOINT_PERIOD == (cfg.TEST.EVAL_PERIOD or 5000)
    assert node.TYPES == ["InstanceConditionalDistillation"]
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH) == (
        "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        50,
    )
    assert (solver.STEPS, solver.MAX_ITER, solver.IMS_PER_BATCH) == ((60000, 80000), 90000, 16)
    assert solver.CLIP_GRADIENTS.ENABLED and (solver.OPTIMIZER, node.SOLVER.OPTIMIZER) == (
        "SGD",
        "ADAMW",
    )


@pytest.mark.parametrize("name", ICD)
def test_icd_reads_levels_that_are_there(name):
    cfg = load(name)
    teacher = cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG
    official = cfg.MODEL.DISTILLER.MODEL_LOAD_OFFICIAL
    teacher = detectron2_zoo.get_config(teacher) if official else load(teacher)
    with torch.device("meta"):  # shapes without weights
        levels = [build_backbone(config).output_shape() for config in (cfg, teacher)]

    for name in cfg.MODEL.DISTILLER.INS.INPUT_FEATS:
        student, teacher = (shapes[name] for shapes in levels)
        assert student.stride == teacher.stride
        assert student.channels == teacher.channels == cfg.MODEL.DISTILLER.INS.HIDDEN_DIM


# Table of section 1 of the specification of AdelaiDet's detectors: weights, released ones of teachers.
RELEASED = "https://huggingface.co/tianzhi/AdelaiDet-"


def test_adets_bases():
    """The values that differ from detectron2's defaults, and no others."""
    plain = get_cfg()
    add_distill_config(plain)
    plain = flat(plain)

    def changed(values):
        return {key: value for key, value in values.items() if value != plain[key]}

    stages = ["res3", "res4", "res5"]
    coco = {"DATASETS.TRAIN": ["coco_2017_train"], "DATASETS.TEST": ["coco_2017_val"]}
    fcos = {
        "MODEL.META_ARCHITECTURE": "OneStageDetector",
        "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": stages,
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.PROPOSAL_GENERATOR.NAME": "FCOS",
        **coco,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.STEPS": [60000, 80000],
        "SOLVER.MAX_ITER": 90000,
        "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
    }
    assert changed(flat(load("Base-FCOS.yaml"))) == changed(fcos)
    condinst = {
        **fcos,
        "MODEL.META_ARCHITECTURE": "CondInst",
        "MODEL.MASK_ON": True,
        "MODEL.FCOS.THRESH_WITH_CTR": True,
        "MODEL.CONDINST.MAX_PROPOSALS": 500,
    }
    assert changed(flat(load("Base-CondInst.yaml"))) == changed(condinst)


@pytest.mark.parametrize("name", ["FCOS_R101_2x_ms", "CondIns_R101_3x_ms"])
def test_released_teachers(name):
    """A checkpoint with a semantic segmentation needs a config that has it, to be whole."""
    cfg = load(f"Teachers/{name}.yaml")
    condinst = name.startswith("CondIns")
    file = "FCOS/resolve/main/FCOS_MS_R_101_2x"
    if condinst:
        file = "CondInst/resolve/main/CondInst_MS_R_101_3x_sem"
    assert f"{RELEASED}{file}.pth" == cfg.MODEL.WEIGHTS and cfg.MODEL.RESNETS.DEPTH == 101
    assert cfg.MODEL.CONDINST.MASK_BRANCH.SEMANTIC_LOSS_ON == condinst


ADET = [name for name in NAMES if name.startswith(("FCOS-Detection/", "CondInst/"))]


@pytest.mark.parametrize("name", ADET)
def test_adets_detectors_are_built(name):
    cfg = load(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # shapes without weights
        model = build_model(cfg)
    parts = Path(name).stem.split("_")
    schedules = {"1x": 90000, "2x": 180000, "3x": 270000, "4x": 360000}
    (schedule,) = set(parts) & set(schedules) or {"4x"}
    iterations = schedules[schedule] if "Base" not in name else 360000
    assert cfg.SOLVER.MAX_ITER == iterations
    assert (cfg.MODEL.FCOS.BOX_QUALITY == "iou") == ("iou" in parts)
    assert (cfg.MODEL.CONDINST.MASK_BRANCH.SEMANTIC_LOSS_ON) == ("sem" in parts)
    assert (cfg.MODEL.RESNETS.DEPTH == 101) == ("101" in parts)
    assert cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS or "Base" in name
    keys = set(model.state_dict())
    assert ("proposal_generator.fcos_head.cls_tower.9.offset.weight" in keys) == ("dcnv2" in parts)
    assert ("backbone.repeated_bifpn.5.weights_f4_4_11" in keys) == ("BiFPN" in parts)
    assert ("backbone.bottom_up.level5.root.conv.weight" in keys) == ("DLA" in parts)
    per_level = any(key.endswith(("_tower.1.0.weight", "_tower.1.0.bias")) for key in keys)
    assert per_level == name.endswith("bn_head.yaml")
