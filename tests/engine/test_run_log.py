"""What a run shows on the screen, and what goes to its log alone."""

import pytest
from runs import Job


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def screen(capsys, start, end):
    """The lines that a run printed, from one that holds ``start`` to one that holds ``end``."""
    lines = capsys.readouterr().out.splitlines()
    places = [next(i for i, line in enumerate(lines) if text in line) for text in (start, end)]
    return lines[places[0] : places[1] + 1]


def test_what_comes_before_the_first_iteration_fits_a_screen(job, capsys):
    job.run(opts=["SOLVER.MAX_ITER", 2, "MODEL.WEIGHTS", job.folder / "teacher" / "teacher.pth"])
    lines = screen(capsys, "distill_d2 ", "report ")
    start = next(i for i, line in enumerate(lines) if "iter: 1 " in line)
    assert 10 < start < 25
    text = "\n".join(lines[:start])
    told = [
        "train, test |        6 |",
        "Levels compared",
        "tensors are not taken from",
        "0.667 epochs of 6",
    ]
    assert not [words for words in (*told, "Training: iterations 0 to 1 of 2 im") if words not in text]
    assert "distill-d2 evaluate --num-gpus 0" in lines[-3] and "Result: " in "\n".join(lines[start:])
    details = [
        "Environment info",
        "Running with full config",
        "Skip loading parameter",
        "Average Precision",
    ]
    log = (job.output / "log.txt").read_text()
    assert not [words for words in details if words in "\n".join(lines) or words not in log]


def test_a_second_run_of_a_process_has_a_log_of_its_own(job, capsys):
    job.run(opts=["OUTPUT_DIR", job.folder / "first", "SOLVER.MAX_ITER", 1])
    log = (job.folder / "first" / "log.txt").read_text()
    capsys.readouterr()
    job.run("--resume", opts=["OUTPUT_DIR", job.folder / "second", "DATASETS.TEST", "()"])
    assert (job.folder / "first" / "log.txt").read_text() == log
    lines = screen(capsys, "distill_d2 ", "report ")
    assert sum("DATASETS.TEST is empty: nothing is evaluated" in line for line in lines) == 1
    job.run("--resume", opts=["OUTPUT_DIR", job.folder / "first", "SOLVER.MAX_ITER", 2])
    assert "resumed from" in (job.folder / "first" / "log.txt").read_text()[len(log) :]
