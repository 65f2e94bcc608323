"""The VOC workflow of DeFeat's page: teacher, student, distilled student, test; on VOC's own layout with
the real configs, and on the cells of BCCD with small models."""

import math
import os
import re
import subprocess
import sys

import pytest
from coco_case import SMALL, write_weights
from runs import ROOT, checkpoint, metrics, run_commands
from small_datasets import write_voc

PAGE = ROOT / "configs" / "Distillation-DeFeat" / "README.md"
VOC = "PascalVOC-Detection/faster_rcnn_R_{}_FPN_voc.yaml"
STEPS = [*SMALL, "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "SOLVER.WARMUP_ITERS", "0"]
RULES = ("bbox/AP50", "bbox/AP50_11point", "bbox/AP50_area")


def page_commands():
    """The four commands of the page's first block, as lists of words."""
    block = PAGE.read_text().partition("## VOC, step by step")[2].partition("Each also prints")[0]
    lines = [line.split() for line in block.splitlines() if line.startswith("    python train_")]
    assert [words[1] for words in lines] == [*["train_baseline.py"] * 2, "train_distill.py", lines[0][1]]
    return lines


def as_run_here(words, *opts):
    """A command of the page for this machine: the checkout's scripts and configs, no GPU."""
    words = [str(ROOT / word) if re.match("train_|configs/", word) else word for word in words[1:]]
    words[words.index("--num-gpus") + 1] = "0"
    return [sys.executable, *words, *opts]


def values(folder):
    """All that was logged, by name."""
    return {key: value for line in metrics(folder) for key, value in line.items()}


@pytest.mark.slow
def test_the_pages_commands(tmp_path, monkeypatch):
    """On both years in the layout of the official archives, from random weights."""
    images = {"1": [("cat", 5, 5, 40, 30)], "2": [("dog", 10, 8, 50, 35), ("cat", 2, 2, 20, 20)]}
    for year, split in ((2007, "trainval"), (2007, "test"), (2012, "trainval")):
        write_voc(tmp_path / "datasets" / "VOCdevkit" / f"VOC{year}", images, split)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    files = {depth: write_weights(VOC.format(depth), tmp_path / f"{depth}.pth") for depth in (50, 101)}
    teacher, student, distil, test = page_commands()
    run_commands(as_run_here(teacher, *STEPS, "MODEL.WEIGHTS", files[101]))
    run_commands(as_run_here(student, *STEPS, "MODEL.WEIGHTS", files[50]))
    run_commands(as_run_here(distil, *STEPS, "MODEL.WEIGHTS", files[50]))
    for folder in ("work/voc/r101", "work/voc/r50", "work/kd/r101-50-DeFeat"):
        assert all(0 <= values(folder)[rule] <= 100 for rule in RULES)
    logged = values("work/kd/r101-50-DeFeat")
    assert all(0 < logged[f"loss_defeat_{name}"] < math.inf for name in ("neck", "neck_back"))
    saved = checkpoint("work/kd/r101-50-DeFeat")
    assert len(saved["distiller"]) == 2 * 5  # adapters of p2 to p6, weight and bias
    assert set(saved["model"]) == set(checkpoint("work/voc/r50")["model"])
    (lines,) = run_commands(as_run_here(test, *SMALL))
    assert "copypaste: AP,AP50,AP75,AP50_11point,AP50_area" in lines and "Teacher: " not in lines


@pytest.mark.slow
def test_cells(shared, tmp_path):
    """tools/demo.py on real photos: all runs leave checkpoint and metrics, and are compared."""
    methods = ["fgfi", "defeat-neck", "defeat", "headkd"]
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--dataset", "bccd_rcnn"]
    command += ["--methods", *methods, "--output", str(tmp_path), "SOLVER.MAX_ITER", "10"]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(shared / "data"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("teacher", "student", *methods):
        assert (tmp_path / name / "model_final.pth").is_file()
        assert all(0 <= values(tmp_path / name)[rule] <= 100 for rule in RULES)
        assert re.search(rf"^\| {name} +\|", done.stdout, re.MULTILINE)
    logged = {name: set(values(tmp_path / name)) for name in methods}
    neck, classes = {"loss_defeat_neck", "loss_defeat_neck_back"}, {"loss_defeat_hcls"}
    assert neck < logged["defeat-neck"] and not classes & logged["defeat-neck"]
    assert neck | classes < logged["defeat"]
    assert "loss_fgfi" in logged["fgfi"]
    assert {"loss_head_kd_cls", "loss_head_kd_reg"} < logged["headkd"]
    assert all(f"{name} - student: " in done.stdout for name in methods)
