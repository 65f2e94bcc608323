"""A LazyConfig of a student, its teacher and a dataset, and the two scripts' runs of it in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_d2.data import register_custom_datasets
from distill_d2.engine import argument_parser, main
from distill_d2.testing import save_teacher, short_yaml, tiny_config, use_dataset, write_dataset

CONFIG = """
import torch
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper, build_detection_test_loader, build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf

from detectron2.config import get_cfg
from distill_d2 import add_distill_config

def student():
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.merge_from_file("{student}")
    return build_model(cfg)

model = L(student)()
dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="{name}"),
    mapper=L(DatasetMapper)(is_train=True, augmentations=[L(T.RandomFlip)()], image_format="BGR"),
    total_batch_size=2,
    num_workers=0,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="{name}", filter_empty=False),
    mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="BGR"),
    num_workers=0,
)
dataloader.evaluator = L(COCOEvaluator)(dataset_name="{name}")
optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.01, momentum=0.9
)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
train = dict(
    output_dir="{output}",
    init_checkpoint="",
    max_iter=3,
    amp=dict(enabled=False),
    checkpointer=dict(period=2),
    eval_period=0,
    log_period=1,
    device="cpu",
    seed=1,
)
distiller = dict(
    TYPES=["PKD"],
    MODEL_LOAD_OFFICIAL=False,
    MODEL_DISTILLER_CONFIG="{teacher}",
    PRELOAD_FPN=False,
    PRELOAD_HEAD=False,
)
"""


class LazyJob:
    """Like ``runs.Job``, for a LazyConfig. The student is a yaml file in the folder.

    Attributes:
        text: of the config file, written before each run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = folder / "output"
        self.teacher = save_teacher(tiny_config(width=16), folder / "teacher")
        entry = write_dataset(folder / "data")
        register_custom_datasets([entry])
        student = tiny_config()
        use_dataset(student, entry)
        student.VERSION = 2
        (folder / "student.yaml").write_text(short_yaml(student))
        self.text = CONFIG
        self.replace("{student}", str(folder / "student.yaml"))
        self.replace("{name}", entry["NAME"])
        self.replace("{output}", str(self.output))
        self.replace("{teacher}", self.teacher)

    def replace(self, old: str, new: str) -> None:
        assert old in self.text
        self.text = self.text.replace(old, new)

    def without_distiller(self) -> None:
        self.text, _, _ = self.text.partition("distiller = dict(")

    def run(self, *arguments: str, distill: bool = True) -> Any:
        path = self.folder / "config.py"
        path.write_text(self.text)
        words = ["--num-gpus", "0", "--config-file", str(path), *arguments]
        return main(argument_parser().parse_args(words), distill)
