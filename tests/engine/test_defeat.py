"""DeFeat, FGFI and HeadKD end to end, as a user trains with them: the laws, resume, processes, wrong
input."""

import math
from dataclasses import replace

import gid_run
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from job import Job
from promises import (
    equals_the_baseline,
    last_losses,
    processes_share_their_gradients,
    resumes_exactly,
    trains_and_saves,
)
from test_gid import use_teacher
from test_icd import trainer_of
from test_lazy import config_file  # noqa: F401  a fixture
from test_lazy import run as run_lazy
from test_processes import command, run
from test_training import checkpoint
from test_wrong_input import fails

from distill_d2.config import student_config
from distill_d2.testing.tiny import tiny_batch, tiny_config

NODE = "MODEL.DISTILLER."
ADAPTERS = {
    part: {f"DeFeat.{place}.{kind}" for place in places for kind in ("weight", "bias")}
    for part, places in {
        "neck": ["neck.adapters.p2", "neck.adapters.p3", "neck.adapters.p4"],
        "top": ["neck.adapters.p5", "neck.adapters.p6"],
        "stages": ["backbone.adapters.res3.0"],
    }.items()
}
STAGES = {"BB_FEATURES": ["res3"], "HINT_BB_W": 1.0, "HINT_BB_BACK_W": 4.0}
CLASSES = {"HEAD_CLS_W": 1.0, "HEAD_CLS_BACK_W": 1.0}
TERMS = {f"loss_defeat_{part}{kind}" for part in ("neck", "bb", "hcls") for kind in ("", "_back")}
ON_TEACHERS = {"loss_defeat_hcls_teacher", "loss_defeat_hcls_back_teacher"}
HEAD_KD = {"loss_head_kd_cls", "loss_head_kd_reg"}
EVERYTHING = {**STAGES, **CLASSES}


def defeat_job(folder, family="retinanet", types=("DeFeat",), channels=8, **keys):
    """A job that distils by these losses, with these keys of DeFeat's node, and does not evaluate.

    Args:
        channels: of the student's neck; the teacher has 16.
    """
    job = Job(folder, family, channels=channels)
    job.config.DATASETS.TEST = ()
    job.config.MODEL.DISTILLER.TYPES = list(types)
    for key, value in keys.items():
        job.config.MODEL.DISTILLER.DEFEAT[key] = value
    return job


@pytest.fixture
def job(tmp_path):
    return defeat_job(tmp_path)


# A run.


@pytest.mark.parametrize(
    "family, types, keys, terms, parts",
    [
        ("retinanet", ["DeFeat"], EVERYTHING, TERMS, ["neck", "stages"]),
        (
            *("faster", ["DeFeat", "HeadKD"], {**EVERYTHING, "PROPOSALS": "both"}),
            *(TERMS | ON_TEACHERS | HEAD_KD, ["neck", "top", "stages"]),
        ),
        ("mask", ["DeFeat"], {**CLASSES, "PROPOSALS": "teacher"}, TERMS, ["neck", "top"]),
    ],
)
def test_trains_logs_and_saves(tmp_path, monkeypatch, family, types, keys, terms, parts):
    job = defeat_job(tmp_path, family, types, **keys)
    logged, trained = trains_and_saves(job, monkeypatch)
    if "HINT_BB_W" not in keys:
        terms = {name for name in terms if "_bb" not in name}
    assert {name for name in logged if "defeat" in name or "head_kd" in name} == terms
    assert all(0 < logged[name] < math.inf for name in terms)
    assert trained == set().union(*(ADAPTERS[part] for part in parts))


def test_fgfi_trains_logs_and_saves(tmp_path):
    """A RetinaNet by a Mask R-CNN, whose levels p2 to p4 it has."""
    job = defeat_job(tmp_path, types=["FGFI"])
    use_teacher(job, tiny_config("mask", width=16))
    job.run(opts=["SOLVER.MAX_ITER", 2])
    logged = last_losses(job.config.OUTPUT_DIR)
    assert {name for name in logged if "fgfi" in name} == {"loss_fgfi"} and logged["loss_fgfi"] > 0
    saved = checkpoint(job.config.OUTPUT_DIR)
    build_model(student_config(job.config)).load_state_dict(saved["model"], strict=True)
    expected = {name.replace("DeFeat.neck", "FGFI.pairs") for name in ADAPTERS["neck"]}
    assert saved["distiller"].keys() == expected


@pytest.mark.parametrize(
    "family, types, keys",
    [
        ("retinanet", ["DeFeat", "FGFI"], {**EVERYTHING, "WEIGHT": 0.0}),
        ("faster", ["DeFeat", "FGFI", "HeadKD"], {**EVERYTHING, "PROPOSALS": "both", "WEIGHT": 0.0}),
        ("mask", ["DeFeat"], {**CLASSES, "PROPOSALS": "teacher", "START_ITER": 100}),
    ],
)
def test_student_alone_equals_the_baseline(tmp_path, family, types, keys):
    job = defeat_job(tmp_path, family, types, **keys)
    for name in ("FGFI", "HEAD_KD"):
        job.config.MODEL.DISTILLER[name].WEIGHT = 0.0
    assert ADAPTERS["neck"] <= equals_the_baseline(job)


@pytest.mark.parametrize(
    "types, keys, name",
    [
        (["DeFeat"], {}, "backbone.fpn_output2.weight"),
        (["FGFI"], {}, "backbone.fpn_output2.weight"),
        (["HeadKD"], {}, "roi_heads.box_predictor.bbox_pred.weight"),
        (
            *(["DeFeat"], {"HINT_NECK_W": 0.0, "HINT_NECK_BACK_W": 0.0, **CLASSES}),
            "roi_heads.box_predictor.cls_score.weight",
        ),
    ],
)
def test_distillation_reaches_the_student(tmp_path, types, keys, name):
    """The counterpart of law 1; convolutions that start near 0 need more than one step."""
    job = defeat_job(tmp_path, "faster", types, channels=16, **keys)
    job.run(distill=False, opts=["OUTPUT_DIR", tmp_path / "baseline", "SOLVER.MAX_ITER", 2])
    job.run(opts=["SOLVER.MAX_ITER", 2])
    alone, distilled = (
        checkpoint(folder)["model"] for folder in (tmp_path / "baseline", job.config.OUTPUT_DIR)
    )
    for changed in (name, "backbone.bottom_up.stem.conv1.weight"):
        assert not torch.equal(alone[changed], distilled[changed])


@pytest.mark.parametrize(
    "family, types, keys",
    [
        ("retinanet", ["DeFeat", "FGFI"], {**EVERYTHING, "DECAY": "cos", "WARMUP_ITERS": 1}),
        ("faster", ["DeFeat", "HeadKD"], {**CLASSES, "PROPOSALS": "both"}),
    ],
)
def test_resumed_run_equals_uninterrupted(tmp_path, family, types, keys):
    """The teacher's sampling draws random numbers too."""
    resumes_exactly(defeat_job(tmp_path, family, types, **keys))


def test_lazy_config(config_file):
    keys = 'DEFEAT=dict(HEAD_CLS_W=1.0, HEAD_CLS_BACK_W=1.0, DECAY="linear")'
    text = config_file.read_text().replace('TYPES=["PKD"]', f'TYPES=["DeFeat", "FGFI"], {keys}')
    config_file.write_text(text)
    run_lazy(config_file, "train.max_iter=2")
    logged = last_losses(config_file.parent / "output")
    wanted = {name for name in TERMS if "_bb" not in name} | {"loss_fgfi"}
    assert wanted < set(logged) and all(0 < logged[name] < math.inf for name in wanted)
    with pytest.raises(ValueError, match="DEFEAT.MASK is 'box'"):
        run_lazy(config_file, "+distiller.DEFEAT.MASK=box")


@pytest.mark.parametrize(
    "kind, factors", [("linear", [1, 0.75, 0.25]), ("up-down", [1, 2, 2 / 3]), ("none", [1, 1, 1])]
)
def test_decay_is_over_the_run(job, kind, factors):
    """Of 4 iterations the first, second and last; the model stays as it is."""
    model, found = build_model(job.config).train(), []
    for decay in ("none", kind):
        loss = model.losses["DeFeat"]
        loss.settings = replace(loss.settings, decay=decay)
        for iteration in (0, 1, 3):
            with EventStorage(iteration):
                losses = model(tiny_batch())
            found.append(losses["loss_defeat_neck_back"].item())
    assert [value / found[0] for value in found[3:]] == pytest.approx(factors)


# Several processes, with find_unused_parameters=False.


def sampling_all(cfg):
    """Nothing left to chance: RPN and box head train on all that they have."""
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 100
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0


def test_two_processes(tmp_path):
    """Law 8: each process has its own objects, or none, and uses its box head up to three times;
    gradients are the mean."""
    keys = {**EVERYTHING, "PROPOSALS": "both", "START_ITER": 1}
    job = defeat_job(tmp_path, "faster", ["DeFeat", "FGFI", "HeadKD"], **keys)
    node = job.config.MODEL.DISTILLER
    job.config.MODEL.SMALL_RESNET.NORM = "FrozenBN"  # BN cannot train on one image of 32 pixels
    node.FGFI.START_ITER = node.HEAD_KD.START_ITER = 1
    node.HEAD_KD.PROPOSALS = "teacher"
    teacher = tiny_config("faster", width=16)
    for cfg in (job.config, teacher):
        sampling_all(cfg)
    use_teacher(job, teacher)
    torch.save(trainer_of(job).plain_model.state_dict(), f"{job.config.OUTPUT_DIR}/start.pth")
    (lines,) = run(command(job, "tests/engine/gid_run.py", "--num-procs", 2))
    assert "World size: 2" in lines
    terms = TERMS | ON_TEACHERS | HEAD_KD | {"loss_fgfi"}
    logged = last_losses(job.config.OUTPUT_DIR)
    assert all(logged[name] > 0 for name in terms)

    ranks = processes_share_their_gradients(job)
    without_objects = terms - {"loss_fgfi", "loss_head_kd_reg", *(t for t in terms if is_of_objects(t))}
    for name, (iteration, images) in gid_run.STEPS.items():
        for rank, (_, objects) in enumerate(images):
            expected = (terms if objects else without_objects) if iteration else set()
            losses = ranks[rank][name][0]
            assert {term for term in terms if losses.get(term, 0.0) > 0} == expected


def is_of_objects(term):
    return "defeat" in term and "back" not in term


# Wrong input.


WRONG = {
    "mask": (ValueError, "DEFEAT.MASK", "circle", ["is 'circle'", "'gaussian'"]),
    "level_assign": (ValueError, "DEFEAT.LEVEL_ASSIGN", "two", ["is 'two'", "'single'"]),
    "scale": (ValueError, "DEFEAT.FINEST_SCALE", 0.0, ["is 0.0", "above 0"]),
    "phi": (ValueError, "DEFEAT.ROI_PHI", 1.0, ["is 1.0", "0 to below 1"]),
    "form": (ValueError, "DEFEAT.LOSS_FORM", "L3", ["is 'L3'", "'smoothL1'"]),
    "negative": (ValueError, "DEFEAT.HINT_NECK_W", -1.0, ["is -1.0", "0 or more"]),
    "infinite": (ValueError, "DEFEAT.HEAD_CLS_W", "1e999", ["is inf", "finite"]),
    "word": (ValueError, "DEFEAT.HINT_NECK_W", "three", ["float", "str"]),
    "std": (ValueError, "DEFEAT.ADAPT_INIT_STD", -0.1, ["is -0.1", "0 or more"]),
    "temperature": (ValueError, "DEFEAT.HEAD_CLS_BACK_T", 0.0, ["is 0.0", "above 0"]),
    "rows": (ValueError, "DEFEAT.HEAD_CLS_ROWS", "positive", ["is 'positive'", "'decouple'"]),
    "heads": (ValueError, "DEFEAT.PREDICTIONS", "rpn", ["is 'rpn'", "'box_head'"]),
    "proposals": (ValueError, "DEFEAT.PROPOSALS", "none", ["is 'none'", "'both'"]),
    "decay": (ValueError, "DEFEAT.DECAY", "up", ["is 'up'", "'up-down'"]),
    "unknown": (KeyError, "DEFEAT.HINT_NECK", 1.0, ["HINT_NECK'"]),
    "fgfi": (ValueError, "FGFI.ROI_PHI", 1.5, ["is 1.5", "0 to below 1"]),
    "fgfi_scale": (ValueError, "FGFI.FINEST_SCALE", -1.0, ["is -1.0", "above 0"]),
    "headkd": (ValueError, "HEAD_KD.TEMPERATURE", 0.0, ["is 0.0", "above 0"]),
    "headkd_proposals": (ValueError, "HEAD_KD.PROPOSALS", "both", ["is 'both'", "'teacher'"]),
}


@pytest.mark.parametrize("error, key, value, messages", WRONG.values(), ids=list(WRONG))
def test_wrong_values_on_the_command_line(tmp_path, error, key, value, messages):
    kind = {"DEFEAT": "DeFeat", "FGFI": "FGFI", "HEAD_KD": "HeadKD"}[key.split(".")[0]]
    job = defeat_job(tmp_path, "faster", [kind])
    fails(job, error, NODE + key, *messages, opts=[NODE + key, value])


def test_all_weights_are_zero(job):
    keys = [f"{NODE}DEFEAT.HINT_NECK_{kind}" for kind in ("W", "BACK_W")]
    options = [item for key in keys for item in (key, 0.0)]
    fails(job, ValueError, keys[0], "at least one of the *_W weights above 0", opts=options)


@pytest.mark.parametrize(
    "key, value, messages",
    [
        ("IN_FEATURES", "['p9']", ["no level 'p9'", "['p2', 'p3', 'p4']"]),
        ("BB_FEATURES", "['res6']", ["no level 'res6'", "'res4'"]),
    ],
)
def test_levels_that_are_not_there(tmp_path, key, value, messages):
    job = defeat_job(tmp_path, HINT_BB_W=1.0)
    fails(job, KeyError, f"{NODE}DEFEAT.{key}", *messages, opts=[f"{NODE}DEFEAT.{key}", value])


def test_masks_on_levels_without_anchors(job):
    job.config.MODEL.RETINANET.IN_FEATURES = ["p3", "p4"]
    job.config.MODEL.ANCHOR_GENERATOR.SIZES = [[32.0], [64.0]]
    for key, loss in (("DEFEAT", "DeFeat"), ("FGFI", "FGFI")):
        job.config.MODEL.DISTILLER.TYPES = [loss]
        messages = [f"{NODE}{key}.IN_FEATURES", "['p2']", "choose among ['p3', 'p4']"]
        fails(job, ValueError, *messages, opts=[f"{NODE}DEFEAT.MASK", "roi"])


def test_a_loss_for_box_heads_without_one(tmp_path):
    job = defeat_job(tmp_path, types=["HeadKD"])
    fails(job, TypeError, "MODEL.DISTILLER.HEAD_KD", "student is a RetinaNet", "no box_head()")
    job = defeat_job(tmp_path / "heads", "faster", **CLASSES)
    use_teacher(job, tiny_config("retinanet"))
    fails(job, TypeError, "MODEL.DISTILLER.DEFEAT.HEAD_CLS_W", "teacher is a RetinaNet")
