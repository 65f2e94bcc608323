"""The packaged configs of DeFeat, FGFI and HeadKD: the schedules and weights that their page gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import get_cfg

from distill_d2.config import add_distill_config, load_yaml
from distill_d2.engine import load_config
from distill_d2.losses.base import build_losses

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
VOC = "PascalVOC-Detection/faster_rcnn_R_{}_FPN_voc.yaml"
VOC_DISTILLED = [
    *("Distillation-DeFeat/voc_faster_rcnn_R101_R50_defeat_neck.yaml",),
    *("Distillation-DeFeat/voc_faster_rcnn_R101_R50_defeat_neck_cls.yaml",),
    *("Distillation-FGFI/voc_faster_rcnn_R101_R50_fgfi.yaml",),
    *("Distillation-HeadKD/voc_faster_rcnn_R101_R50_headkd.yaml",),
]
RCNN, RETINANET = "COCO-Detection/faster_rcnn_R_{}.yaml", "COCO-Detection/retinanet_R_{}.yaml"
# By config: the student's, and the teacher's in the model zoo.
COCO = {
    "Distillation-DeFeat/RCNN_R_50_R101_defeat_neck_FPN_1x.yaml": RCNN,
    "Distillation-DeFeat/RCNN_R_50_R101_defeat_FPN_1x.yaml": RCNN,
    "Distillation-DeFeat/retinanet_R_50_R101_defeat_neck_FPN_1x.yaml": RETINANET,
    "Distillation-FGFI/RCNN_R_50_R101_fgfi_FPN_1x.yaml": RCNN,
    "Distillation-FGFI/retinanet_R_50_R101_fgfi_FPN_1x.yaml": RETINANET,
    "Distillation-HeadKD/RCNN_R_50_R101_headkd_FPN_1x.yaml": RCNN,
}
# "neck", "bb", "hcls": of objects and of the background.
WEIGHTS = {
    "voc_faster_rcnn_R101_R50_defeat_neck": ((3.0, 12.0), (0.0, 0.0), (0.0, 0.0)),
    "voc_faster_rcnn_R101_R50_defeat_neck_cls": ((3.0, 12.0), (0.0, 0.0), (2.0, 2.0)),
    "RCNN_R_50_R101_defeat_neck_FPN_1x": ((4.0, 16.0), (0.0, 0.0), (0.0, 0.0)),
    "RCNN_R_50_R101_defeat_FPN_1x": ((4.0, 16.0), (4.0, 16.0), (2.0, 2.0)),
    "retinanet_R_50_R101_defeat_neck_FPN_1x": ((4.0, 16.0), (0.0, 0.0), (0.0, 0.0)),
}


def load(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, str(CONFIGS / name))
    return cfg


def without_distiller(cfg):
    cfg = cfg.clone()
    cfg.MODEL.pop("DISTILLER")
    return cfg


def test_all_are_here():
    folders = [CONFIGS / f"Distillation-{name}" for name in ("DeFeat", "FGFI", "HeadKD")]
    found = {f"{path.parent.name}/{path.name}" for folder in folders for path in folder.glob("*.yaml")}
    assert found == {*VOC_DISTILLED, *COCO}


@pytest.mark.parametrize("depth, rate", [(50, 0.01), (101, 0.02)])
def test_voc_schedule(depth, rate):
    cfg = load(VOC.format(depth))
    solver = cfg.SOLVER
    assert cfg.DATASETS.TRAIN == ("voc_2007_trainval", "voc_2012_trainval")
    assert cfg.DATASETS.TEST == ("voc_2007_test",)
    assert (solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY) == (rate, 0.9, 1e-4)
    epoch = (5011 + 11540) / solver.IMS_PER_BATCH  # images of the two
    assert solver.MAX_ITER == pytest.approx(12 * epoch, rel=0.002)
    assert solver.STEPS == pytest.approx((9 * epoch,), rel=0.002) and solver.GAMMA == 0.1
    warmup = (solver.WARMUP_METHOD, solver.WARMUP_ITERS, solver.WARMUP_FACTOR)
    assert warmup == ("linear", 200, 0.001)
    assert not solver.CLIP_GRADIENTS.ENABLED
    sizes = cfg.INPUT
    assert (sizes.MIN_SIZE_TRAIN, sizes.MAX_SIZE_TRAIN) == ((600,), 1000)
    assert (sizes.MIN_SIZE_TEST, sizes.MAX_SIZE_TEST) == (600, 1000)
    assert cfg.MODEL.RESNETS.DEPTH == depth and f"R-{depth}" in cfg.MODEL.WEIGHTS


def test_voc_detector_is_that_of_the_spec():
    model = load(VOC.format(50)).MODEL
    assert model.ANCHOR_GENERATOR.SIZES == [[8 * stride] for stride in (4, 8, 16, 32, 64)]
    assert model.ANCHOR_GENERATOR.ASPECT_RATIOS == [[0.5, 1.0, 2.0]]
    assert model.RPN.PRE_NMS_TOPK_TRAIN == 2000 and model.RPN.POST_NMS_TOPK_TRAIN == 1000
    assert model.RPN.SMOOTH_L1_BETA == model.ROI_BOX_HEAD.SMOOTH_L1_BETA == 0.0
    assert (model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.POSITIVE_FRACTION) == (512, 0.25)
    assert model.ROI_HEADS.NUM_CLASSES == 20 and model.BACKBONE.FREEZE_AT == 2


@pytest.mark.parametrize("name", VOC_DISTILLED)
def test_voc_student_is_the_plain_one(name):
    cfg, plain = load(name), load(VOC.format(50))
    clips = cfg.SOLVER.CLIP_GRADIENTS
    if "headkd" not in name:
        assert (clips.ENABLED, clips.CLIP_TYPE, clips.CLIP_VALUE, clips.NORM_TYPE) == (
            *(True, "full_model", 35.0, 2.0),
        )
        cfg.SOLVER.CLIP_GRADIENTS = plain.SOLVER.CLIP_GRADIENTS
    assert without_distiller(cfg) == without_distiller(plain)
    node = cfg.MODEL.DISTILLER
    assert node.MODEL_DISTILLER_CONFIG == VOC.format(101) and not node.MODEL_LOAD_OFFICIAL
    assert node.TEACHER_WEIGHTS == "work/voc/r101/model_final.pth"


@pytest.mark.parametrize("name", COCO)
def test_coco_student_is_the_plain_one(name):
    cfg, plain = load(name), load(COCO[name].format("50_FPN_1x"))
    cfg.SOLVER.CLIP_GRADIENTS = plain.SOLVER.CLIP_GRADIENTS
    assert without_distiller(cfg) == without_distiller(plain)
    node = cfg.MODEL.DISTILLER
    assert node.MODEL_DISTILLER_CONFIG == COCO[name].format("101_FPN_3x") and node.MODEL_LOAD_OFFICIAL


@pytest.mark.parametrize("name", [*VOC_DISTILLED, *COCO])
def test_nothing_is_copied_from_the_teacher(name):
    node = load_config(name).MODEL.DISTILLER
    assert not node.PRELOAD_FPN and not node.PRELOAD_HEAD
    (loss,) = build_losses(node)
    assert loss == {"DeFeat": "DeFeat", "FGFI": "FGFI", "HeadKD": "HeadKD"}[name.split("/")[0][13:]]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    node = load(f"Distillation-DeFeat/{name}.yaml").MODEL.DISTILLER.DEFEAT
    found = (
        (node.HINT_NECK_W, node.HINT_NECK_BACK_W),
        (node.HINT_BB_W, node.HINT_BB_BACK_W),
        (node.HEAD_CLS_W, node.HEAD_CLS_BACK_W),
    )
    assert found == WEIGHTS[name]
    if found[1] != (0.0, 0.0):
        assert node.BB_FEATURES == ["res4", "res5"]


def test_defaults_are_those_of_the_released_config():
    released = load("Distillation-DeFeat/voc_faster_rcnn_R101_R50_defeat_neck.yaml").MODEL.DISTILLER
    defaults = load(VOC.format(50)).MODEL.DISTILLER
    assert released.DEFEAT == defaults.DEFEAT
    fgfi = load("Distillation-FGFI/voc_faster_rcnn_R101_R50_fgfi.yaml").MODEL.DISTILLER
    assert fgfi.FGFI == defaults.FGFI and fgfi.FGFI.WEIGHT == 3.0 and fgfi.FGFI.ROI_PHI == 0.5
