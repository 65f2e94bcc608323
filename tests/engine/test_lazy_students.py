"""The packaged LazyConfig students of ICD: what they say, and a step of each as the script takes it."""

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_backbone
from runs import checkpoint, metrics

from distill_d2 import model_zoo
from distill_d2.data import register_custom_datasets
from distill_d2.distiller import Distiller
from distill_d2.engine import argument_parser, load_config, main
from distill_d2.engine.settings import distiller_node
from distill_d2.losses.base import build_losses
from distill_d2.testing.tiny import save_teacher, tiny_config, write_dataset

FCOS = "fcos_R_50_R101_icd_FPN_1x.py"
LSJ = "mask_rcnn_R_50_FPN_100ep_LSJ_icd.py"
STUDENTS = {
    FCOS: "COCO-Detection/fcos_R_50_FPN_1x.py",
    LSJ: "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
}
# One image size, few proposals, data of the test.
SMALL = [
    *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
    *("dataloader.test.num_workers=0", "dataloader.test.mapper.augmentations.0.short_edge_length=64"),
    *("train.max_iter=1", "train.log_period=1", "train.init_checkpoint=''"),
    *("distiller.BYPASS_DISTILL=0", "distiller.MEASURE_GRADIENTS=False"),
]


def load(name):
    return LazyConfig.load(model_zoo.get_config_file(f"Distillation-ICD/{name}"))


def teacher_levels(node):
    """The neck of the teacher, without its weights."""
    if node.MODEL_LOAD_OFFICIAL:
        assert detectron2_zoo.get_checkpoint_url(node.MODEL_DISTILLER_CONFIG).startswith("https://")
        official = detectron2_zoo.get_config(node.MODEL_DISTILLER_CONFIG)
        return instantiate(official.model.backbone).output_shape()
    cfg = load_config(node.MODEL_DISTILLER_CONFIG)
    assert cfg.MODEL.WEIGHTS.startswith("https://")
    return build_backbone(cfg).output_shape()


@pytest.mark.parametrize("name", STUDENTS)
def test_says_what_the_student_is_and_how_it_is_distilled(name):
    """detectron2's student, unchanged; weights of ICD for one-stage and for two-stage detectors."""
    cfg = load(name)
    node = distiller_node(cfg.distiller)
    del cfg["distiller"]
    official = detectron2_zoo.get_config(STUDENTS[name])
    for model in [cfg.model, official.model] if name == LSJ else []:
        for head in (model.roi_heads.box_head, model.roi_heads.mask_head):
            head.conv_norm = ""  # a new function in each, which is not equal
    assert cfg == official
    assert list(build_losses(node)) == ["InstanceConditionalDistillation"]
    expected = (300, 8.0) if name == FCOS else (100, 3.0)
    assert (node.INS.MAX_LABELS, node.INS_ATT_MIMIC.WEIGHT_VALUE) == expected


@pytest.mark.parametrize("name", STUDENTS)
def test_levels_are_those_of_the_teacher(name):
    cfg = load(name)
    node = distiller_node(cfg.distiller)
    with torch.device("meta"):  # shapes without weights
        student, teacher = instantiate(cfg.model.backbone).output_shape(), teacher_levels(node)
    assert node.INS.INPUT_FEATS == sorted(student)
    for level in node.INS.INPUT_FEATS:
        assert student[level].stride == teacher[level].stride
        assert student[level].channels == teacher[level].channels == node.INS.HIDDEN_DIM


# A step, with a small teacher


def small_retinanet():
    """Levels p3 to p7 of the width of detectron2's."""
    cfg = tiny_config(channels=256)
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    resnet = cfg.MODEL.RESNETS
    resnet.STEM_OUT_CHANNELS = resnet.WIDTH_PER_GROUP = 8
    resnet.RES2_OUT_CHANNELS = 16
    resnet.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32.0], [64.0], [128.0], [256.0], [512.0]]
    return cfg


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Take one with train_distill.py: (config, teacher, overrides) -> its metrics, the batch, whether
    there was autocast."""

    def run(name, teacher, *overrides):
        entry = write_dataset(tmp_path / "data")
        register_custom_datasets([entry])
        own = [f"dataloader.{part}.dataset.names={entry['NAME']}" for part in ("train", "test")]
        own += [f"train.output_dir={tmp_path / 'output'}", "distiller.MODEL_LOAD_OFFICIAL=False"]
        own += ["+dataloader.check=none"]  # 80 classes on a dataset of 3
        own += [f"distiller.MODEL_DISTILLER_CONFIG={save_teacher(teacher, tmp_path / 'teacher')}"]
        forward, seen = Distiller.forward, []

        def remember(distiller, inputs):
            if distiller.training:
                seen.append((inputs, torch.is_autocast_enabled("cpu")))
            return forward(distiller, inputs)

        monkeypatch.setattr(Distiller, "forward", remember)
        arguments = ["--num-gpus", "0", "--config-file", f"Distillation-ICD/{name}"]
        main(argument_parser().parse_args([*arguments, *SMALL, *own, *overrides]), distill=True)
        ((inputs, autocast),) = seen
        return metrics(tmp_path / "output")[0], inputs, autocast

    return run


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def losses(logged):
    return {name for name in logged if name.startswith("loss_")}


ICD_LOSSES = {"loss_icd_conf_0", "loss_icd_reg_0", "loss_icd_value"}


def test_step_of_fcos(tmp_path, step):
    augmentation = "dataloader.train.mapper.augmentations.0.short_edge_length=[64]"
    logged, inputs, autocast = step(FCOS, small_retinanet(), augmentation)
    assert losses(logged) == ICD_LOSSES | {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert all(logged[name] > 0 for name in losses(logged))
    assert logged["lr"] == pytest.approx(0.01 * 0.001)  # warm-up of the file
    assert not autocast and all(min(item["image"].shape[1:]) == 64 for item in inputs)
    with torch.device("meta"):
        assert shapes(checkpoint(tmp_path / "output")["model"]) == shapes(
            instantiate(load(FCOS).model).state_dict()
        )


def test_step_of_a_new_baseline(tmp_path, step, monkeypatch):
    """From scratch, with SyncBN, large-scale jitter, recomputed boxes, mixed precision."""
    monkeypatch.setattr("distill_d2.engine.settings.native_bfloat16", lambda device: True)
    augmentations = "dataloader.train.mapper.augmentations"
    resize = [f"{augmentations}.0.target_{side}=64" for side in ("height", "width")]
    crop = f"{augmentations}.1.crop_size=[64,64]"
    heads = ["model.roi_heads.batch_size_per_image=8", "model.proposal_generator.post_nms_topk=[20,20]"]
    logged, inputs, autocast = step(LSJ, tiny_config("mask", channels=256), *resize, crop, *heads)
    own = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert losses(logged) == ICD_LOSSES | own
    assert logged["lr"] == pytest.approx(0.1 * 0.067)
    assert autocast and all(item["image"].shape == (3, 64, 64) for item in inputs)
    for item in inputs:
        boxes = item["instances"].gt_boxes.tensor
        torch.testing.assert_close(item["instances"].gt_masks.get_bounding_boxes().tensor, boxes)
        assert (boxes >= 0).all() and (boxes <= 64).all()
    state = checkpoint(tmp_path / "output")["model"]
    with torch.device("meta"):
        assert shapes(state) == shapes(instantiate(load(LSJ).model).state_dict())
    assert state["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] == 1
    assert all(tensor.dtype != torch.bfloat16 for tensor in state.values())
