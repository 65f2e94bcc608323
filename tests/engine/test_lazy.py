"""LazyConfig (.py) students: the same scripts, keys and checkpoints."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from distill_d2.data import register_custom_datasets
from distill_d2.engine import argument_parser, lazy, main, settings, trainer
from distill_d2.testing.tiny import save_teacher, tiny_config, use_dataset, write_dataset

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


@pytest.fixture
def config_file(tmp_path):
    entry = write_dataset(tmp_path / "data")
    register_custom_datasets([entry])
    student = tiny_config()
    use_dataset(student, entry)
    student.VERSION = 2
    (tmp_path / "student.yaml").write_text(student.dump())
    text = CONFIG
    for key, value in {
        "student": tmp_path / "student.yaml",
        "name": entry["NAME"],
        "output": tmp_path / "output",
        "teacher": save_teacher(tiny_config(width=16), tmp_path / "teacher"),
    }.items():
        text = text.replace("{" + key + "}", str(value))
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def run(config_file, *arguments, distill=True):
    args = ["--num-gpus", "0", "--config-file", str(config_file), *arguments]
    return main(argument_parser().parse_args(args), distill)


def checkpoint(config_file, name="model_final"):
    return torch.load(config_file.parent / "output" / f"{name}.pth", weights_only=True)


def test_distils_evaluates_and_resumes(config_file):
    results = run(config_file, "train.max_iter=4")
    assert "AP" in results["bbox"]
    metrics = (config_file.parent / "output" / "metrics.json").read_text()
    assert "loss_pkd" in metrics
    saved = checkpoint(config_file)
    assert not any(name.startswith("student.") for name in saved["model"])
    assert run(config_file, "--resume", "train.max_iter=6")["bbox"].keys() == results["bbox"].keys()
    assert checkpoint(config_file)["trainer"]["iteration"] == 5


def test_baseline_and_eval_only_ignore_the_distiller(config_file):
    run(config_file, "distiller.MODEL_DISTILLER_CONFIG=nowhere.yaml", distill=False)
    assert "loss_pkd" not in (config_file.parent / "output" / "metrics.json").read_text()
    weights = config_file.parent / "output" / "model_final.pth"
    arguments = ["--eval-only", f"train.init_checkpoint={weights}"]
    results = run(config_file, *arguments, "distiller.MODEL_DISTILLER_CONFIG=nowhere.yaml")
    assert "AP" in results["bbox"]


def test_model_that_is_a_complete_distiller(config_file, tmp_path):
    text = config_file.read_text()
    teacher = tmp_path / "teacher" / "teacher.yaml"
    head, _, _ = text.partition("distiller = dict(")
    config_file.write_text(
        head
        + f"""
from distill_d2 import Distiller
from distill_d2.losses.icd import InstanceConditionalDistillation as ICD
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import load_teacher
solver = dict(BASE_LR=0.02, CLIP_GRADIENTS=dict(CLIP_VALUE=0.1))
model = L(Distiller)(
    student=model,
    teacher=L(load_teacher)(config="{teacher}", official=False),
    losses=[L(PKD)(weight=2.0), L(ICD)(input_feats=["p2", "p3"], hidden_dim=16, solver=solver)],
)
"""
    )
    run(config_file)
    first = json.loads((tmp_path / "output" / "metrics.json").read_text().splitlines()[0])
    assert {"loss_pkd", "loss_icd_value"} < set(first)
    assert first["InstanceConditionalDistillation/lr"] == pytest.approx(0.02)
    run(config_file, "--eval-only", f"train.init_checkpoint={tmp_path}/output/model_final.pth")


def test_nothing_to_distil(config_file):
    text, _, _ = config_file.read_text().partition("distiller = dict(")
    config_file.write_text(text)
    with pytest.raises(ValueError, match="nothing to distil"):
        run(config_file)


def test_misspelt_distiller_key(config_file):
    with pytest.raises(KeyError, match="TYPE"):
        run(config_file, "+distiller.TYPE=[PKD]")


def test_misspelt_override(config_file):
    with pytest.raises(KeyError, match="train.max_itr"):
        run(config_file, "train.max_itr=4")
    with pytest.raises(ValueError, match="path.key=value"):
        run(config_file, "train.max_iter", "4")


def test_no_iterations(config_file):
    with pytest.raises(ValueError, match="train.max_iter is 0"):
        run(config_file, "train.max_iter=0")


def test_keys_that_the_distiller_dict_leaves_out_can_be_overridden():
    cfg = OmegaConf.create({"train": {}, "distiller": {"TYPES": ["GID"]}})
    lazy._check_overrides(cfg, ["distiller.GID.GI_MODE=pos", "distiller.TASK_LOSS_WEIGHT=0.5"])
    with pytest.raises(KeyError, match="unknown config key 'distiller.GID.GI_MOD'"):
        lazy._check_overrides(cfg, ["distiller.GID.GI_MOD=pos"])
    del cfg.distiller
    with pytest.raises(KeyError, match="unknown config key 'distiller.GID.GI_MODE'"):
        lazy._check_overrides(cfg, ["distiller.GID.GI_MODE=pos"])


def test_options_of_several_processes(config_file, monkeypatch):
    """train.ddp is what detectron2's own script gives to create_ddp_model."""
    seen = []
    monkeypatch.setattr(trainer, "create_ddp_model", lambda model, **given: seen.append(given) or model)
    plain = {"broadcast_buffers": False, "find_unused_parameters": False, "device_ids": None}
    changed = {"broadcast_buffers": True, "fp16_compression": True}
    overrides = [f"+train.ddp.{key}={value}" for key, value in changed.items()]
    run(config_file, "train.max_iter=1")
    run(config_file, "train.max_iter=1", *overrides)
    assert seen == [plain, {**plain, **changed}]


def test_mixed_precision_that_is_only_emulated(config_file, monkeypatch):
    monkeypatch.setattr(settings, "native_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="train.amp.enabled is True, but this processor only emulates"):
        run(config_file, "train.amp.enabled=True")
