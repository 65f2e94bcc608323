"""Detectors that no loss was written for: each works, or is refused before training."""

import pytest
from runs import Job, last_losses

from distill_d2.testing import tiny_config


def c4(width=8):
    cfg = tiny_config("faster", width=width)
    resnet = cfg.MODEL.RESNETS
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    resnet.STEM_OUT_CHANNELS = resnet.WIDTH_PER_GROUP = width
    resnet.RES2_OUT_CHANNELS, resnet.OUT_FEATURES, resnet.NORM = 2 * width, ["res4"], "BN"
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16.0, 32.0]]
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    return cfg


def panoptic(width=8, architecture="PanopticFPN"):
    cfg = tiny_config("mask", width=width)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.NORM = 8, ""
    return cfg


def semantic(width=8):
    return panoptic(width, "SemanticSegmentor")


def faster(width=8):
    return tiny_config("faster", width=width)


@pytest.fixture
def make(tmp_path):
    def job(student, teacher, loss):
        job = Job(tmp_path, student=student(), teacher=teacher(16), types=[loss], evaluate=False)
        job.config.SOLVER.MAX_ITER = 1
        job.node.PRELOAD_FPN = job.node.PRELOAD_HEAD = False
        return job

    return job


@pytest.mark.parametrize("student, teacher", [(c4, c4), (faster, semantic)])
def test_works(make, student, teacher):
    job = make(student, teacher, "FeatureMimic" if student is c4 else "PKD")
    if student is c4:
        job.node.FEATURE_MIMIC.IN_FEATURES = ["res4"]
    job.run()
    assert all(value >= 0 for value in last_losses(job.output).values())


@pytest.mark.parametrize(
    "student, teacher, loss, error, expected",
    [
        (c4, c4, "HeadKD", TypeError, "not C4 or cascade"),
        (
            faster,
            semantic,
            "HeadKD",
            TypeError,
            "the teacher is a SemanticSegmentor, which has no box_head()",
        ),
        (panoptic, panoptic, "PKD", ValueError, "has no 'sem_seg', on which a PanopticFPN is trained"),
        (semantic, semantic, "PKD", ValueError, "the student is a SemanticSegmentor"),
    ],
)
def test_is_refused(make, student, teacher, loss, error, expected):
    make(student, teacher, loss).fails(error, expected)
