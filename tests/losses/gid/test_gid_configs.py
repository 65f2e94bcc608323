"""The packaged configs of GID: those of its authors, each with its own teacher, and this project's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_anchor_generator, build_backbone
from omegaconf import OmegaConf

from distill_d2 import model_zoo
from distill_d2.config import add_distill_config, load_yaml
from distill_d2.engine import load_config
from distill_d2.losses import DISTILL_LOSS_REGISTRY
from distill_d2.losses.base import build_losses

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FOLDER = CONFIGS / "Distillation-GID"
R50, R101 = (f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl" for depth in (50, 101))
SINGLE, MULTI = (800,), (640, 672, 704, 736, 768, 800)

# By stem: sizes of the training images, beta of the detector's own box loss.
STUDENTS = {
    "RetinaNet_Res50_2x": (SINGLE, 0.0),
    "RetinaNet_Res50_2x_smooth_l1": (SINGLE, 0.1),
    "RetinaNet_Res50_2x_multi-scale": (MULTI, 0.0),
}
TEACHERS = {
    "RetinaNet_Res101_1x": (SINGLE, 0.0),
    "RetinaNet_Res101_1x_smooth_l1": (SINGLE, 0.1),
    "RetinaNet_Res101_1x_multi-scale": (MULTI, 0.0),
}
# The authors' six by suffix: student, teacher, RESPONSE_REG_SMOOTH_L1_BETA.
DISTILLED = {
    "L1Smo": ("RetinaNet_Res50_2x_smooth_l1", "RetinaNet_Res101_1x_smooth_l1", 0.1),
    "L1Smo_T_L1": ("RetinaNet_Res50_2x_smooth_l1", "RetinaNet_Res101_1x", 0.1),
    "L1Smo_T_L1_aug": ("RetinaNet_Res50_2x_smooth_l1", "RetinaNet_Res101_1x_multi-scale", 0.1),
    "L1_T_L1": ("RetinaNet_Res50_2x", "RetinaNet_Res101_1x", 0.0),
    "L1_T_L1_aug": ("RetinaNet_Res50_2x", "RetinaNet_Res101_1x_multi-scale", 0.0),
    "L1_aug_T_L1_aug": ("RetinaNet_Res50_2x_multi-scale", "RetinaNet_Res101_1x_multi-scale", 0.0),
}
SIX = "Distill_RetinaNet_T_Res101_S_Res50_2x_"
RCNN, VOC = "RCNN_R_50_R101_gid_FPN_1x.yaml", "voc_retinanet_R_50_R101_gid_FPN.yaml"
FCOS, FCOS_TEACHER = "fcos_R_50_R101_gid_FPN_1x.py", "fcos_R_101_FPN_2x.py"
# The student's own config, by distillation config.
PLAIN = {
    RCNN: "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    VOC: "PascalVOC-Detection/retinanet_R_50_FPN.yaml",
}
PLAIN.update(
    {
        f"{SIX}{suffix}.yaml": f"Distillation-GID/student/{student}.yaml"
        for suffix, (student, _, _) in DISTILLED.items()
    }
)
QUICKSTART = ["quickstart/shapes_gid.yaml", "quickstart/bccd_gid.yaml"]
DISTILLATION = [*QUICKSTART, *(f"Distillation-GID/{name}" for name in PLAIN)]
# Our defaults: what the authors' six files set. Their config.py has other values for FEATURE_WEIGHT
# (0.005), RESPONSE_REG_WEIGHT (0.1) and IOU_THRESHOLDS (0.3, 0.7), which the six override.
DEFAULTS = {
    "WEIGHT": 1.0,
    "GRADIENT_RATIO": 0.0,
    "GRADIENT_RATIO_ITERS": -1,
    "START_ITER": 0,
    "STOP_ITER": -1,
    "WARMUP_ITERS": 0,
    "IN_FEATURES": [],
    "GI_MODE": "all",
    "GI_NMS_THRESH": 0.3,
    "GI_PRE_NMS_TOPK": 3000,
    "GI_POST_NMS_TOPK": 10,
    "GI_MIN_SIDE": 10.0,
    "IOU_THRESHOLDS": [0.4, 0.5],
    "POOLER_RESOLUTION": 10,
    "POOLER_SAMPLING_RATIO": 2,
    "ADAPTER_KERNEL_SIZE": 3,
    "ADAPTER_SHARE_WEIGHTS": True,
    "FEATURE_WEIGHT": 0.0005,
    "FEATURE_MODE": "L2",
    "FEATURE_SMOOTH_L1_BETA": 0.0,
    "RELATION_WEIGHT": 40.0,
    "RELATION_SMOOTH_L1_BETA": 1.0,
    "RELATION_SCOPE": "batch",
    "RESPONSE_CLS_WEIGHT": 0.1,
    "RESPONSE_CLS_MODE": "BCE",
    "RESPONSE_CLS_SMOOTH_L1_BETA": 0.0,
    "RESPONSE_REG_WEIGHT": 1.0,
    "RESPONSE_REG_MODE": "L1",
    "RESPONSE_REG_SMOOTH_L1_BETA": 0.0,
    "RESPONSE_MASK": "matcher",
    "RESPONSE_REG_MASK": "gi",
    "GI_SCORE": "classwise",  # the paper's; the authors' code has max_first
}


def load(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, str(CONFIGS / name))
    return cfg


def default_node():
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg.MODEL.DISTILLER


def load_complete(name):
    """As the scripts do it, but for datasets, which are not there."""
    return load_config(str(CONFIGS / name), ["DATASETS.CUSTOM", "[]"])


def load_teacher(name):
    node = load_complete(name).MODEL.DISTILLER
    if node.MODEL_LOAD_OFFICIAL:
        return detectron2_zoo.get_config(node.MODEL_DISTILLER_CONFIG)
    return load_complete(model_zoo.find_config(node.MODEL_DISTILLER_CONFIG))


def load_lazy(name):
    return LazyConfig.load(model_zoo.find_config(f"Distillation-GID/{name}"))


def flat(node, prefix=""):
    leaves = {}
    for key, value in node.items():
        nested = isinstance(value, dict)
        leaves.update(flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return leaves


def differences(node, other):
    node, other = flat(node), flat(other)
    return {key: value for key, value in node.items() if value != other[key]}


def files():
    return {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.suffix in (".yaml", ".py")}


def test_these_are_all_configs():
    expected = {*PLAIN, FCOS, f"teacher/{FCOS_TEACHER}"}
    expected |= {f"student/{name}.yaml" for name in STUDENTS}
    expected |= {f"teacher/{name}.yaml" for name in TEACHERS}

    assert {file.as_posix() for file in files()} == expected


def test_defaults_are_the_values_of_the_authors_files():
    node = default_node().GID

    assert {key: node[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", STUDENTS)
def test_student_has_the_authors_values(name):
    check_detector(load(f"Distillation-GID/student/{name}.yaml"), 50, R50, *STUDENTS[name])


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_has_the_authors_values(name):
    check_detector(load(f"Distillation-GID/teacher/{name}.yaml"), 101, R101, *TEACHERS[name])


def check_detector(cfg, depth, weights, sizes, beta):
    model, solver = cfg.MODEL, cfg.SOLVER
    warmup = (solver.WARMUP_ITERS, solver.WARMUP_FACTOR)
    schedule = ((120000, 160000), 180000) if depth == 50 else ((60000, 80000), 90000)

    assert model.META_ARCHITECTURE == "RetinaNet"
    assert (model.RESNETS.DEPTH, model.WEIGHTS) == (depth, weights)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == (sizes, 1333)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert model.RETINANET.SMOOTH_L1_LOSS_BETA == beta
    assert (solver.STEPS, solver.MAX_ITER) == schedule
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.IMS_PER_BATCH) == ("SGD", 0.01, 16)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 1e-4)
    assert (warmup, solver.CLIP_GRADIENTS.ENABLED) == ((1000, 1e-3), False)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), ("coco_2017_val",))


@pytest.mark.parametrize("suffix", DISTILLED)
def test_each_of_the_authors_six_has_its_own_teacher(suffix):
    _, teacher, beta = DISTILLED[suffix]
    node = load(f"Distillation-GID/{SIX}{suffix}.yaml").MODEL.DISTILLER
    own = differences(node.GID, default_node().GID)

    assert node.MODEL_DISTILLER_CONFIG == f"Distillation-GID/teacher/{teacher}.yaml"
    assert node.TEACHER_WEIGHTS == f"output/{teacher}/model_final.pth"
    assert own == ({"RESPONSE_REG_SMOOTH_L1_BETA": beta} if beta else {})


@pytest.mark.parametrize("name", PLAIN)
def test_differs_from_the_student_alone_in_the_distiller_only(name):
    different = differences(load(f"Distillation-GID/{name}"), load(PLAIN[name]))
    keys = {key.replace("MODEL.DISTILLER.", "", 1) for key in different if ".GID." not in key}
    always = {"TYPES", "PRELOAD_FPN", "PRELOAD_HEAD", "MODEL_DISTILLER_CONFIG"}

    assert always <= keys <= always | {"MODEL_LOAD_OFFICIAL", "TEACHER_WEIGHTS"}


def test_faster_rcnn_pools_the_levels_of_its_box_head():
    cfg = load(f"Distillation-GID/{RCNN}")
    node = cfg.MODEL.DISTILLER

    assert (node.MODEL_LOAD_OFFICIAL, node.TEACHER_WEIGHTS) == (True, "")
    assert node.MODEL_DISTILLER_CONFIG == "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
    assert node.GID.IN_FEATURES == list(cfg.MODEL.ROI_HEADS.IN_FEATURES) == ["p2", "p3", "p4", "p5"]
    assert set(differences(node.GID, default_node().GID)) == {"IN_FEATURES"}


@pytest.mark.parametrize("name", DISTILLATION)
def test_builds_gid_and_finds_its_teacher(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere
    node = load_complete(name).MODEL.DISTILLER
    (loss,) = build_losses(node).values()

    assert node.TYPES == ["GID"] and type(loss) is DISTILL_LOSS_REGISTRY.get("GID")
    if node.MODEL_LOAD_OFFICIAL:
        assert detectron2_zoo.get_checkpoint_url(node.MODEL_DISTILLER_CONFIG)  # raises without weights
    else:
        assert Path(model_zoo.find_config(node.MODEL_DISTILLER_CONFIG)).is_relative_to(CONFIGS)


@pytest.mark.parametrize("name", DISTILLATION)
def test_student_and_teacher_have_the_same_anchors(name):
    student, teacher = load(name), load_teacher(name)

    assert anchors_of(student) == anchors_of(teacher)
    for node, key in SAME:
        assert student.MODEL[node][key] == teacher.MODEL[node][key]


# Classes, codings of boxes.
SAME = [(node, "NUM_CLASSES") for node in ("RETINANET", "ROI_HEADS")]
SAME += [(node, "BBOX_REG_WEIGHTS") for node in ("RETINANET", "RPN", "ROI_BOX_HEAD")]


def anchors_of(cfg):
    """[[anchor boxes per cell] per level], strides of the levels that have anchors."""
    with torch.device("meta"):  # shapes without weights
        shapes = build_backbone(cfg).output_shape()
    dense = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    levels = cfg.MODEL.RETINANET.IN_FEATURES if dense else cfg.MODEL.RPN.IN_FEATURES
    generator = build_anchor_generator(cfg, [shapes[level] for level in levels])
    return [cell.tolist() for cell in generator.cell_anchors], generator.strides


def test_fcos_student_and_teacher():
    student, teacher = load_lazy(FCOS), load_lazy(f"teacher/{FCOS_TEACHER}")
    official = detectron2_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
    node = student.pop("distiller")

    assert student == official
    assert node.MODEL_DISTILLER_CONFIG == f"Distillation-GID/teacher/{FCOS_TEACHER}"
    assert node.TEACHER_WEIGHTS == f"output/{FCOS_TEACHER[:-3]}/model_final.pth"
    assert (node.MODEL_LOAD_OFFICIAL, node.PRELOAD_FPN, node.PRELOAD_HEAD) == (False, False, False)
    assert (teacher.train.init_checkpoint, teacher.train.max_iter) == (R101, 180000)
    assert teacher.lr_multiplier.warmup_length * teacher.train.max_iter == pytest.approx(1000)
    assert teacher.model.backbone.bottom_up.stages.depth == 101


def test_fcos_builds_gid_and_its_levels_pair():
    cfg = load_lazy(FCOS)
    configs = (cfg, load_lazy(f"teacher/{FCOS_TEACHER}"))
    node = default_node()
    node.merge_from_other_cfg(CfgNode(OmegaConf.to_container(cfg.distiller)))
    own = differences(node.GID, default_node().GID)
    with torch.device("meta"):
        student, teacher = (instantiate(config.model) for config in configs)

    assert list(build_losses(node)) == ["GID"]
    assert own == {"RESPONSE_MASK": "inside", "RESPONSE_REG_MODE": "GIoU"}
    assert student.anchor_generator.strides == teacher.anchor_generator.strides == [8, 16, 32, 64, 128]
    assert student.backbone.output_shape() == teacher.backbone.output_shape()


def test_page_names_every_config_and_every_key():
    page = (CONFIGS.parent / "docs" / "methods" / "gid.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[\w.-]+", page)) | set(re.findall(r"\w+", page))
    names = {file: {file.name, file.stem, file.name.replace(SIX, "")} for file in files()}

    assert [str(file) for file, known in names.items() if not known & words] == []
    assert [key for key in default_node().GID if key not in words] == []
