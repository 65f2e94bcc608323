"""LazyConfig (.py) students: the same scripts, keys and checkpoints."""

import pytest
from omegaconf import OmegaConf
from runs import checkpoint, metrics

from distill_d2.engine import distributed, lazy, settings


def test_distils_evaluates_and_resumes(lazy_job):
    results = lazy_job.run("train.max_iter=4")
    assert "AP" in results["bbox"]
    assert "loss_pkd" in metrics(lazy_job.output)[0]
    assert f"Ran the code of {lazy_job.folder}/config.py" in (lazy_job.output / "log.txt").read_text()
    assert not any(name.startswith("student.") for name in checkpoint(lazy_job.output)["model"])
    assert lazy_job.run("--resume", "train.max_iter=6")["bbox"].keys() == results["bbox"].keys()
    assert checkpoint(lazy_job.output)["trainer"]["iteration"] == 5


def test_baseline_and_eval_only_ignore_the_distiller(lazy_job):
    lazy_job.run("distiller.MODEL_DISTILLER_CONFIG=nowhere.yaml", "+distiller.TYPO=1", distill=False)
    assert "loss_pkd" not in metrics(lazy_job.output)[0]
    weights = f"train.init_checkpoint={lazy_job.output}/model_final.pth"
    results = lazy_job.run("--eval-only", weights, "distiller.MODEL_DISTILLER_CONFIG=nowhere.yaml")
    assert "AP" in results["bbox"]


def test_model_that_is_a_complete_distiller(lazy_job):
    lazy_job.without_distiller()
    lazy_job.text += f"""
from distill_d2 import Distiller
from distill_d2.losses.icd import InstanceConditionalDistillation as ICD
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import load_teacher
solver = dict(BASE_LR=0.02, CLIP_GRADIENTS=dict(CLIP_VALUE=0.1))
model = L(Distiller)(
    student=model,
    teacher=L(load_teacher)(config="{lazy_job.teacher}", official=False),
    gradient_ratio_period=1,
    losses=[
        L(PKD)(gradient_ratio=2.0),
        L(ICD)(input_feats=["p2", "p3"], hidden_dim=16, bypass_distill=0, solver=solver),
    ],
)
"""
    lazy_job.run()
    first = metrics(lazy_job.output)[0]
    assert {"loss_pkd", "loss_icd_value", "weight/PKD", "grad_ratio/PKD"} < set(first)
    assert first["InstanceConditionalDistillation/lr"] == pytest.approx(0.02)
    lazy_job.run("--eval-only", f"train.init_checkpoint={lazy_job.output}/model_final.pth")


def test_nothing_to_distil(lazy_job):
    lazy_job.without_distiller()
    with pytest.raises(ValueError, match="nothing to distill"):
        lazy_job.run()


@pytest.mark.parametrize(
    "error, override, message",
    [
        (KeyError, "+distiller.TYPE=[PKD]", "TYPE"),
        (KeyError, "train.max_itr=4", "train.max_itr"),
        (ValueError, "train.max_iter", "path.key=value"),
        (ValueError, "train.max_iter=0", "train.max_iter is 0"),
        (ValueError, "optimizer.lr=abc", "'optimizer' of the LazyConfig cannot be built"),
        (ValueError, "train.checkpointer.period=-1", "checkpointer.period is -1; expected"),
        (ValueError, "dataloader.train.num_workers=-1", "train.num_workers is -1; expected an integer"),
        (ValueError, "distiller.TASK_LOSS_WEIGHT=-1.0", "TASK_LOSS_WEIGHT is -1.0; expected"),
        (ValueError, "distiller.FREEZE=[res7]", "MODEL.DISTILLER.FREEZE: 'res7' matches no name"),
        (ValueError, "+distiller.GID.GI_MODE=positive", "GID.GI_MODE is 'positive'"),
        (ValueError, "+distiller.GID.GI_POST_NMS_TOPK=ten", "GID.GI_POST_NMS_TOPK"),
    ],
)
def test_wrong_overrides(lazy_job, error, override, message):
    if "GID" in override:
        lazy_job.replace('TYPES=["PKD"]', 'TYPES=["GID"], GID={}')
    with pytest.raises(error, match=message):
        lazy_job.run(override)


def test_keys_that_the_distiller_dict_leaves_out_can_be_overridden():
    cfg = OmegaConf.create({"train": {}, "distiller": {"TYPES": ["GID"]}})
    lazy._check_overrides(cfg, ["distiller.GID.GI_MODE=pos", "distiller.TASK_LOSS_WEIGHT=0.5"])
    with pytest.raises(KeyError, match="unknown config key 'distiller.GID.GI_MOD'"):
        lazy._check_overrides(cfg, ["distiller.GID.GI_MOD=pos"])
    del cfg.distiller
    with pytest.raises(KeyError, match="unknown config key 'distiller.GID.GI_MODE'"):
        lazy._check_overrides(cfg, ["distiller.GID.GI_MODE=pos"])


def test_options_of_several_processes(lazy_job, monkeypatch):
    """train.ddp is what detectron2's own script gives to create_ddp_model."""
    seen = []
    monkeypatch.setattr(
        distributed, "create_ddp_model", lambda model, **given: seen.append(given) or model
    )
    plain = {"broadcast_buffers": False, "find_unused_parameters": False, "device_ids": None}
    changed = {"broadcast_buffers": True, "fp16_compression": True}
    lazy_job.run("train.max_iter=1")
    options = [f"+train.ddp.{key}={value}" for key, value in changed.items()]
    with pytest.raises(ValueError, match="train.output_dir .* of another run. Give --resume"):
        lazy_job.run("train.max_iter=1")
    lazy_job.run("--overwrite", "train.max_iter=1", *options)
    assert seen == [plain, {**plain, **changed}]


def test_mixed_precision_that_is_only_emulated(lazy_job, monkeypatch):
    monkeypatch.setattr(settings, "native_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="train.amp.enabled is True, but this processor only emulates"):
        lazy_job.run("train.amp.enabled=True")


@pytest.mark.parametrize(
    "text, override, words",
    [
        ("model = (", "", "config.py', a LazyConfig, line 1: SyntaxError"),
        ("\n\nnowhere", "", "config.py', a LazyConfig, line 3: NameError: name 'nowhere'"),
        ("[" * 100_000, "", "config.py', a LazyConfig.*: "),
        ("model = {}", "", "does not define model|does not define dataloader, train.output_dir"),
        ("", "train.max_iter=" + "[" * 1_000, r"'train.max_iter=\[.*' cannot be applied"),
        ("", "train.max_iter=" + "[" * 100_000, "has 100015 characters"),
        (
            "",
            "distiller.MODEL_DISTILLER_CONFIG=none.yaml",
            "MODEL_DISTILLER_CONFIG .*none.yaml.* tried: .*{folder},",
        ),
    ],
)
def test_broken_lazy_config(lazy_job, text, override, words):
    lazy_job.text = text or lazy_job.text
    with pytest.raises(
        (ValueError, FileNotFoundError), match=words.format(folder=lazy_job.folder)
    ) as caught:
        lazy_job.run(*([override] if override else []))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_batches_of_an_evaluation_have_one_size(lazy_job, monkeypatch):
    """Images of 48x64 and 64x48 in turn, three of each."""
    shapes = []

    def inference(model, loader, evaluator):
        shapes.extend([tuple(item["image"].shape[1:]) for item in batch] for batch in loader)
        return {}

    monkeypatch.setattr("distill_d2.engine.lazy.inference_on_dataset", inference)
    lazy_job.replace(
        "    num_workers=0,\n)\ndataloader.evaluator", "    batch_size=2,\n)\ndataloader.evaluator"
    )
    lazy_job.run()
    assert shapes == [[(64, 48)] * 2, [(64, 48)], [(48, 64)] * 2, [(48, 64)]]
