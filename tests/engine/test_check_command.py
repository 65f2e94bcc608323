"""distill-d2 check: all faults at once, what a step does, and no trace in OUTPUT_DIR."""

import re

import pytest

from distill_d2.cli import main
from distill_d2.duration import evaluations_of, spoken
from distill_d2.engine import load_config


def check(config_file, *arguments):
    return main(
        ["check", "--device", "cpu", "--batches", "1", "--config-file", str(config_file), *arguments]
    )


def test_a_training_without_faults_is_measured(job, capsys):
    job.arguments()
    balanced = job.folder / "balanced.yaml"
    pictures = job.folder / "pictures"
    words = ["--ratio", "0.5", "--write", str(balanced), "--pictures", str(pictures)]
    words += ["SOLVER.MAX_ITER", "9"]
    assert check(job.config_file, *words) == 0
    out = capsys.readouterr().out
    for text in ("class0 4", "Teacher: ", "| PKD    | p2", "| loss_pkd", "A step takes", "of 9 steps"):
        assert text in out
    assert "Nothing is wrong" in out and not job.output.exists()
    line = out.partition("A step takes")[2].partition(";")[0]
    step, *parts = map(float, re.findall(r"\d[\d.e-]*", line))
    assert len(parts) == 5 and sum(parts) == pytest.approx(step, rel=0.05)  # on one clock
    assert len(list(pictures.glob("*_trained_on.png"))) == job.config.SOLVER.IMS_PER_BATCH
    cfg = load_config(str(balanced))
    assert cfg.SOLVER.MAX_ITER == 9 and f"PKD.WEIGHT {cfg.MODEL.DISTILLER.PKD.WEIGHT:g}" in out
    with pytest.raises(SystemExit):
        check(balanced, "--write", str(balanced))
    assert f"'{balanced}' exists" in capsys.readouterr().err
    check(balanced)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| loss_pkd")]
    assert float(row.split("|")[-2]) == pytest.approx(0.5, rel=0.3)


def test_all_faults_are_listed(job, capsys):
    job.config.SOLVER.BASE_LR = -1.0
    job.config.MODEL.RETINANET.NUM_CLASSES = 7
    job.config.DATASETS.TEST = ("no_such_dataset",)
    job.config.TEST.KEEP_BEST = "bbox/AP"  # right, but the evaluation could not be tried
    job.node.TEACHER_WEIGHTS = "nothing.pth"
    job.node.TYPES = ["PKDD"]
    job.arguments()
    assert check(job.config_file) == 1
    out = capsys.readouterr().out.partition("Wrong:")[2]
    for text in (
        "SOLVER.BASE_LR is -1",
        "NUM_CLASSES is 7",
        "no_such_dataset",
        "'nothing.pth' do not exist",
        "TYPES is ['PKDD']",
    ):
        assert out.count(text) == 1
    assert "KEEP_BEST" not in out
    assert check(job.config_file, "SOLVER.MAX_ITERS", "2", "SEEED", "1") == 1 and not job.output.exists()
    out = capsys.readouterr().out
    assert "- unknown config key 'SOLVER.MAX_ITERS'" in out and "- unknown config key 'SEEED'" in out
    assert check(job.config_file, "MODEL.DISTILLER.MODEL_DISTILLER_CONFIG", "nothing.yaml") == 1
    out = capsys.readouterr().out
    assert "config 'nothing.yaml' does not exist" in out and "SOLVER.BASE_LR is -1" in out


def test_the_student_alone_and_a_lazy_config(job, lazy_job, capsys):
    job.arguments()
    assert check(job.config_file, "--baseline") == 0
    path = lazy_job.folder / "config.py"
    path.write_text(lazy_job.text)
    assert check(path, "train.max_iter=100") == 0
    alone, lazy = capsys.readouterr().out.split("Nothing is wrong")[:2]
    assert "loss_pkd" not in alone and "loss_pkd" in lazy and "of 100 steps" in lazy


def test_durations():
    assert [spoken(s) for s in (7, 130, 9000, 300000)] == [
        "7 s",
        "2 min",
        "2.5 h",
        "3.5 days",
    ]
    assert [evaluations_of(10, period) for period in (0, 3, 5, 10)] == [1, 4, 2, 1]
