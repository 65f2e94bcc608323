"""RunSettings: both kinds of configs give the same settings."""

import pytest
from omegaconf import OmegaConf
from torch import nn

from distill_d2.engine import RunSettings
from distill_d2.engine.settings import UNUSED_DISTILLER, in_subfolder
from distill_d2.testing import tiny_config


def yaml_config():
    cfg = tiny_config()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT = "output", "weights.pth", "RGB"
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 7, 5, 3
    cfg.SOLVER.AMP.ENABLED = True
    cfg.MODEL.DISTILLER.EVAL_TEACHER = True
    return cfg


def lazy_config():
    train = dict(output_dir="output", init_checkpoint="weights.pth", device="cpu", max_iter=7)
    train.update(checkpointer=dict(period=5), eval_period=3, log_period=20, amp=dict(enabled=True))
    mapper = dict(mapper=dict(image_format="RGB"))
    return OmegaConf.create(
        dict(train=train, dataloader=dict(train=mapper), distiller=dict(EVAL_TEACHER=True))
    )


def test_both_kinds_of_configs():
    yaml, lazy = yaml_config(), lazy_config()
    first, second = (dict(vars(RunSettings.from_config(cfg))) for cfg in (yaml, lazy))
    assert (first.pop("amp_key"), second.pop("amp_key")) == ("SOLVER.AMP.ENABLED", "train.amp.enabled")
    assert (first.pop("steps"), second.pop("steps")) == (tuple(yaml.SOLVER.STEPS), None)
    assert first == second
    assert RunSettings.from_config(in_subfolder(yaml, "teacher")).output_dir == "output/teacher"
    assert RunSettings.from_config(in_subfolder(lazy, "teacher")).output_dir == "output/teacher"
    assert (yaml.OUTPUT_DIR, lazy.train.output_dir) == ("output", "output")


def test_what_a_config_may_leave_out():
    lazy = lazy_config()
    lazy[UNUSED_DISTILLER] = lazy.pop("distiller")
    del lazy.dataloader.train.mapper
    lazy.train.amp.enabled = False
    settings = RunSettings.from_config(lazy)
    assert settings.distiller.EVAL_TEACHER and settings.autocast_dtype() is None
    student = nn.Module()
    assert settings.channel_order(student) == "BGR"
    student.input_format = "RGB"
    assert settings.channel_order(student) == "RGB"
    lazy[UNUSED_DISTILLER] = {"EVAL_TECHER": True}
    with pytest.raises(KeyError, match="EVAL_TECHER"):
        RunSettings.from_config(lazy)
