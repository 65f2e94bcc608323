"""distill-d2 proof: which runs, in which order, what is not repeated, the gates, and the table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import pytest

from distill_d2 import cli
from distill_d2.demo import Run
from distill_d2.proof import processes, table
from distill_d2.proof.jobs import SETTINGS

run_jobs = processes.run_jobs  # the real one

CLASSES = ("dog", "cat", "sheep", "horse", "cow")
BOX = [8.0, 8.0, 30.0, 30.0]
#: AP on val of the fake trainings, and images of the test set, of ten, whose object they find.
VAL = {"teacher": 40, "student": 30, "student_doubled": 30.2, "pkd": 32, "mimic": 29, "gid": 33}
METHODS = ["pkd", "mimic", "gid"]
FOUND = {"teacher": 10, "student": 5, "pkd": 7, "gid": 10, "mimic": 5}


def ap(right):
    """COCO's AP where the objects of so many images are found, without an error: of the two objects of a class
    one is a recall of 0.5, which 51 of 101 points reach."""
    kinds = Counter(i % len(CLASSES) for i in range(1, right + 1))
    return 100 * sum({1: 51 / 101, 2: 1.0}[count] for count in kinds.values()) / len(CLASSES)


@pytest.fixture
def photos(tmp_path):
    """A folder of photos with one object each."""
    folder = tmp_path / "photos"
    for name in ("annotations", "images"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2), ("test", 10)):
        images, objects = [], []
        for number in range(1, count + 1):
            file = f"{split}{number}.png"
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            cv2.imwrite(str(folder / "images" / file), pixels)
            images.append({"id": number, "file_name": file, "height": 48, "width": 64})
            kind = 1 + number % len(CLASSES)
            objects.append({"id": number, "image_id": number, "category_id": kind, "bbox": BOX})
            objects[-1].update(area=900.0, iscrowd=0)
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
        content = {"images": images, "annotations": objects, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


class FakeRunner:
    """Writes what trainings and evaluations leave.

    Attributes:
        val: AP by row.
        names, jobs: that ran.
        stop_at: the name of the job before which the machine is switched off.
    """

    def __init__(self, val=VAL):
        self.val = val
        self.names, self.jobs = [], []
        self.stop_at = ""

    def __call__(self, jobs, processes, news):
        for job in jobs:
            if job.name == self.stop_at:
                raise RuntimeError("switched off")
            self.names.append(job.name)
            self.jobs.append(job)
            job.prepare()
            (self._train if job.iterations else self._evaluate)(job)
            news([job])

    def _train(self, job):
        seconds = 0.3 if job.row.name == "gid" else 0.2
        lines = [
            {"iteration": job.iterations - 1, "total_loss": 1.0, "time": seconds},
            {"iteration": job.iterations, "bbox/AP": self.val.get(job.row.name, 30) + 0.1 * job.seed},
        ]
        (job.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
        (job.folder / "model_final.pth").touch()

    def _evaluate(self, job):
        right = FOUND.get(job.row.name, 5) - (job.seed == 2)
        items = [
            {"image_id": i, "category_id": 1 + i % len(CLASSES), "bbox": BOX, "score": 0.9}
            for i in range(1, right + 1)
        ]
        folder = job.folder / "inference" / "animals_test"
        folder.mkdir(parents=True)
        (folder / "coco_instances_results.json").write_text(json.dumps(items))
        scores = {f"bbox/{metric}": ap(right) for metric in ("AP", "AP50", "AP75")}
        (job.folder / "evaluations.json").write_text(f"{json.dumps(scores)}\n")


@pytest.fixture
def prove(photos, tmp_path, monkeypatch):
    """Run the command with a fake runner."""

    def run(runner, *words):
        monkeypatch.setattr(processes, "run_jobs", runner)
        monkeypatch.setattr(table, "DRAWS", 200)
        command = ["proof", "--data", str(photos), "--output", str(tmp_path / "out")]
        pairs = ["--pairs", "retinanet", "--only", *METHODS]
        assert cli.main([*command, *pairs, *words]) == 0
        return tmp_path / "out"

    return run


def test_all_stages(prove, capsys):
    """Three seeds of each row, two more of the two best on val and of the student alone; the test comes last."""
    runner = FakeRunner()
    out = prove(runner)

    def place(name):
        return runner.names.index(f"retinanet/{name}")

    trained = [name for name in runner.names if name.startswith("retinanet/")]
    assert len(trained) == 1 + 3 + 1 + 3 * 3 + 3 + 3 * 2
    assert runner.names[: len(trained)] == trained
    assert set(runner.names[len(trained) :]) == {f"test of {name}" for name in trained}
    assert len(runner.names) == 2 * len(trained)
    assert max(place("teacher/seed1"), place("student_doubled/seed1")) < place("pkd/seed1")
    assert place("gid/seed3") < place("gid/seed5")
    assert "retinanet/pkd/seed5" in trained and "retinanet/mimic/seed4" not in trained
    # gid is the slowest: 0.3 s beside the student's 0.2 s
    base, longer = (
        json.loads((out / "train" / "retinanet" / row / "seed1" / SETTINGS).read_text())
        for row in ("student", "student_same_time")
    )
    assert longer["SOLVER.MAX_ITER"] == 1.5 * base["SOLVER.MAX_ITER"]

    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    content = json.loads((out / "table.json").read_text())
    assert [gate["holds"] for gate in content["gates"]] == [True, True]
    pair = content["pairs"]["retinanet"]
    rows = ["teacher", "student", "student_doubled", "student_same_time", *METHODS]
    assert list(pair["AP on val"]) == rows
    assert list(pair["AP on test"]["student"].values()) == [ap(5), ap(4), ap(5), ap(5), ap(5)]
    gid, mimic = (pair["methods"]["methods"][name] for name in ("GID", "FeatureMimic"))
    assert gid["gains"] == pytest.approx([ap(10) - ap(5), ap(9) - ap(4), *[ap(10) - ap(5)] * 3])
    assert gid["over_images"]["low"] > 0
    assert (gid["proven"], mimic["proven"]) == ("better", "no")
    assert len(pair["controls"]["methods"]) == 2


def test_goes_on_where_it_was_stopped(prove, photos):
    """Nothing that is finished runs again; another test set needs no training."""
    runner = FakeRunner()
    few = ("--seeds", "1", "--best-seeds", "2")
    runner.stop_at = "retinanet/mimic/seed1"
    with pytest.raises(RuntimeError, match="switched off"):
        prove(runner, *few)
    before = runner.names

    runner = FakeRunner()
    out = prove(runner, *few)
    assert runner.names[0] == "retinanet/mimic/seed1"
    assert not set(before) & set(runner.names)

    runner = FakeRunner()
    prove(runner, *few)
    assert runner.names == []

    other = photos / "kept.json"
    other.write_text((photos / "annotations" / "test.json").read_text() + " ")
    prove(runner, *few, "--test", str(other))
    assert all(name.startswith("test-kept-") for name in runner.names)
    assert len(list(out.glob("table-kept-*.md"))) == 1


def test_pairs_share_a_teacher(prove):
    """It is trained and tested once; where students see crops, its outputs are not kept."""
    runner = FakeRunner()
    few = ("--seeds", "1", "--best-seeds", "1")
    out = prove(runner, "--pairs", "retinanet", "crops", "--only", "pkd", *few)
    assert runner.names.count("retinanet/teacher/seed1") == 1
    assert runner.names.count("test of retinanet/teacher/seed1") == 1
    kept = [job.name for job in runner.jobs if "MODEL.DISTILLER.TEACHER_CACHE" in job.words]
    assert kept == ["retinanet/pkd/seed1"]
    assert "PKD, crops" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    "val, message",
    [
        ({"teacher": 33.8}, "the teacher is +3.80 AP above the student on val (33.90), at least 4.0"),
        ({"student_doubled": 30.6}, "twice the schedule gains the student alone +0.60 AP on val"),
    ],
)
def test_a_gate_that_does_not_hold_ends_it(prove, capsys, val, message):
    runner = FakeRunner({**VAL, **val})
    few = ("--seeds", "1", "--best-seeds", "1")
    with pytest.raises(SystemExit):
        prove(runner, *few)
    assert message in capsys.readouterr().err
    assert {name.split("/")[1] for name in runner.names} == {"teacher", "student", "student_doubled"}

    out = prove(runner, *few, "--no-gates")
    assert f"{message}" in (out / "table.md").read_text()


def test_a_run_of_other_settings_is_not_taken_for_this_one(prove, photos, capsys):
    rate = "SOLVER.BASE_LR"
    prove(FakeRunner(), "--no-test", "--seeds", "1", "--best-seeds", "1", rate, "0.25")
    with pytest.raises(SystemExit):
        prove(FakeRunner(), "--no-test", rate, "0.5")
    told = capsys.readouterr().err
    assert "seed1' holds a run of other settings (SOLVER.BASE_LR 0.25 -> 0.5" in told
    (photos / "annotations" / "val.json").write_text("{} ")
    with pytest.raises(SystemExit):
        prove(FakeRunner(), "--no-test", rate, "0.25")
    assert "(annotations/val.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--test", "no.json"], "no.json' does not exist"),
        (["--pairs", "rcnn", "--only", "gid"], "--only gid: no pair of rcnn has such a row"),
        (["--no-test", "SOLVER.MAX_ITRE", "5"], "unknown config key 'SOLVER.MAX_ITRE'"),
    ],
)
def test_wrong_arguments(prove, capsys, words, message):
    with pytest.raises(SystemExit):
        prove(FakeRunner(), *words)
    assert message in capsys.readouterr().err


def test_list_tells_hours_and_runs_nothing(prove, capsys):
    runner = FakeRunner()
    out = prove(runner, "--list", "--processes", "2")
    assert runner.names == [] and not out.exists()
    output = capsys.readouterr().out
    assert "23 of 23 trainings left: about " in output and "h with 2 processes" in output


def test_a_failed_run_ends_the_others(tmp_path, capsys):
    """With its status; those that wait are not started."""
    started = []

    def start(code):
        output = tmp_path / f"{len(started)}.txt"
        with open(output, "w") as file:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file)
        started.append(process)
        return Run(process, output)

    with pytest.raises(SystemExit) as caught:
        run_jobs(["import time; time.sleep(600)", "1/0", "waits"], 2, lambda running: None, start)
    assert caught.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [process.returncode for process in started] == [-signal.SIGTERM, 1]


@pytest.mark.slow
def test_the_whole_command(photos, tmp_path, capsys):
    """A few iterations of a teacher, the student alone and a distilled one, from random weights; the second time
    nothing is trained."""
    words = ["proof", "--data", str(photos), "--output", str(tmp_path / "out"), "--pairs", "retinanet"]
    words += ["--only", "pkd", "--seeds", "1", "--best-seeds", "1", "--no-gates"]
    words += ["MODEL.TIMM.WEIGHTS", "", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    words += ["SOLVER.WARMUP_ITERS", "0"]
    cli.main(words)
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    pair = content["pairs"]["retinanet"]
    assert len(pair["methods"]["methods"]["PKD"]["gains"]) == 1
    assert all(value >= 0 for row in pair["AP on test"].values() for value in row.values())

    capsys.readouterr()
    cli.main(words)
    assert "$ distill-d2" not in capsys.readouterr().out
