"""Schedules in epochs, which a run writes in iterations."""

import json

import pytest
from detectron2.config import get_cfg
from runs import checkpoint

from distill_d2.engine.config_loading import load_config
from distill_d2.engine.epochs import in_iterations
from distill_d2.engine.key_rules import check_keys
from distill_d2.engine.setup import setup
from distill_d2.epochs import iterations_of
from distill_d2.testing import tiny_config

EPOCHS = ["SOLVER.EPOCHS", 20, "SOLVER.STEPS", (0.5, 0.9), "SOLVER.WARMUP_ITERS", 1000]


def schedule(cfg):
    solver = cfg.SOLVER
    return solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD


def test_the_run_is_written_in_iterations(job):
    """Six images, of which one is not trained on, in batches of two; plain detectron2 reads the result."""
    file = job.folder / "data" / "annotations.json"
    data = json.loads(file.read_text())
    first = data["images"][0]["id"]
    data["annotations"] = [item for item in data["annotations"] if item["image_id"] != first]
    file.write_text(json.dumps(data))
    setup(job.arguments(opts=[*EPOCHS, "TEST.EVAL_EPOCHS", 3]), distill=False)
    plain = get_cfg()
    plain.set_new_allowed(True)
    plain.merge_from_file(str(job.output / "config.yaml"))
    assert schedule(plain) == (50, (25, 45), 5, 8)
    assert "EPOCHS" not in plain.SOLVER
    assert "5 images in batches of 2, SOLVER.MAX_ITER 50 for" in (job.output / "log.txt").read_text()
    with pytest.raises(ValueError, match="names .trian., which is not registered"):
        job.setup(opts=["OUTPUT_DIR", job.folder / "new", *EPOCHS, "DATASETS.TRAIN", "[trian]"])


@pytest.mark.parametrize("epochs, expected", [(1, 4), (0.1, 1), (8.0, 28), (2 / 7, 1)])
def test_a_part_of_an_iteration_counts_as_one(epochs, expected):
    assert iterations_of(epochs, 7, 2) == expected


def test_fractions_of_a_run_in_iterations():
    """Steps of so short a run that they fall together, or into its end, are one step."""
    cfg = tiny_config()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (0.3, 0.4, 0.9)])
    assert in_iterations(cfg) == "The schedule in iterations: SOLVER.STEPS (1,)"
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, in_iterations(cfg)) == (3, (1,), "")


@pytest.mark.parametrize(
    "files, pairs, epochs",
    [
        (["EPOCHS: 12", "MAX_ITER: 5"], [], 0),
        (["MAX_ITER: 5", "EPOCHS: 12"], [], 12),
        (["EPOCHS: 12"], ["SOLVER.MAX_ITER", "5"], 0),
        (["MAX_ITER: 5"], ["SOLVER.EPOCHS", "3"], 3),
        (["EPOCHS: 12"], ["SOLVER.MAX_ITER", "5", "SOLVER.EPOCHS", "3"], "the command line sets"),
        (
            ["EPOCHS: 12, MAX_ITER: 5"],
            [],
            r"config file '.*0.yaml' sets SOLVER.MAX_ITER and SOLVER.EPOCHS",
        ),
        (["EPOCHS: 0, MAX_ITER: 5"], [], 0),
    ],
    ids=str,
)
def test_the_later_of_epochs_and_iterations_decides(tmp_path, files, pairs, epochs):
    for index, keys in enumerate(files):
        base = f"_BASE_: {index - 1}.yaml\n" if index else ""
        (tmp_path / f"{index}.yaml").write_text(f"{base}SOLVER: {{{keys}}}\n")
    last = str(tmp_path / f"{len(files) - 1}.yaml")
    if isinstance(epochs, str):
        with pytest.raises(ValueError, match=epochs):
            load_config(last, pairs)
    else:
        assert load_config(last, pairs).SOLVER.EPOCHS == epochs


@pytest.mark.parametrize(
    "pairs, words",
    [
        (
            ["SOLVER.EPOCHS", 12.0, "SOLVER.STEPS", (60, 80), "SOLVER.MAX_ITER", 90],
            r"STEPS is \(60, 80\); .* with SOLVER.EPOCHS 12; \(0.667, 0.889\) are those of MAX_ITER 90",
        ),
        (["SOLVER.STEPS", (0.5, 80)], r"such as \(0.67, 0.89\)"),
        (["SOLVER.EPOCHS", -1.0], "SOLVER.EPOCHS is -1.0"),
    ],
    ids=str,
)
def test_wrong_values(pairs, words):
    cfg = tiny_config()
    cfg.DATASETS.TRAIN = ("shapes_train",)
    cfg.merge_from_list(pairs)
    with pytest.raises(ValueError, match=words):
        check_keys(cfg)


def test_epochs_of_a_lazy_config(lazy_job):
    lazy_job.replace("max_iter=3", "max_iter=3, epochs=0.5")
    lazy_job.run("train.checkpointer.epochs=0.3")
    assert (lazy_job.output / "model_0000000.pth").exists()
    assert checkpoint(lazy_job.output)["trainer"]["iteration"] == 1
    lazy_job.run("--overwrite", "train.max_iter=1")
    assert checkpoint(lazy_job.output)["trainer"]["iteration"] == 0
