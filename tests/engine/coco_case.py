"""Tiny datasets in the layout of COCO, and weights of detectron2's zoo models, for command lines as users type
them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model

from distill_d2 import model_zoo
from distill_d2.testing import write_dataset

# Makes the command lines of the papers' repositories run on a CPU.
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "0.001"]


def write_coco(root: Path) -> None:
    """Two images each of train2017 and val2017, with the 80 classes of COCO."""
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        entry = write_dataset(root / split, count=2)
        content = json.loads(Path(entry["JSON"]).read_text())
        content["categories"] = categories
        (root / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        Path(entry["IMAGES"]).rename(root / "coco" / split)


def write_weights(config: str, path: Path) -> str:
    """Random weights of a zoo model; residual branches are damped, as trained ones are."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    for name, norm in model.backbone.named_modules():
        if name.endswith("conv3.norm"):
            norm.weight.fill_(0.2)
    torch.save({"model": model.state_dict()}, path)
    return str(path)
