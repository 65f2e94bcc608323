"""distill-d2 report: the page, and what it shows of runs."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from made_up import evaluation, run_of
from runs import Job

from distill_d2.cli import main
from distill_d2.report import models
from distill_d2.report.charts import Line, line_chart, log_ticks, thinned, ticks
from distill_d2.report.kinds import kinds_of
from distill_d2.report.matching import Truth, best_threshold, f1, found_by
from distill_d2.report.roles import entries_of
from distill_d2.run_files import GRADIENTS

VOID = {"meta", "br", "img"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Checks that tags close in order; by id of a heading the text below it."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.place = [], {}, ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]
        self.place = dict(attributes).get("id", self.place) if tag == "h2" else self.place

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.place] = self.texts.get(self.place, "") + data + " "


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A student alone and a distillation, which has evaluated its teacher."""
    job = Job(tmp_path_factory.mktemp("runs"))
    job.use_detecting_teacher()
    options = ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1]
    job.run(distill=False, opts=[*options, "OUTPUT_DIR", job.folder / "alone"])
    job.run(opts=[*options, "MODEL.DISTILLER.EVAL_TEACHER", True])
    terms = {"loss_cls": {"value": 1.0, "gradient": 2.0, "loss": ""}}
    terms["loss_pkd"] = {"value": 9.0, "gradient": None, "loss": "PKD"}
    lines = [{"iteration": i, "terms": terms, "task": 2.0, "losses": {"PKD": 1.0 + i}} for i in (0, 1)]
    lines[1]["weights"] = {"PKD": 7.5}
    run_of(job.output, *lines, name=GRADIENTS)
    return job


@pytest.fixture(autouse=True)
def _measure_shortly(monkeypatch):
    monkeypatch.setattr(models, "_SECONDS", 0.0)


def made(tmp_path, *arguments):
    output = tmp_path / "report.html"
    assert main(["report", *map(str, arguments), "--output", str(output)]) == 0
    return output.read_text()


def test_page_on_a_distillation(job, tmp_path):
    """Teacher, student alone and distilled, in their order, and nothing from elsewhere."""
    text = made(tmp_path, f"<i>pkd</i>={job.output}", job.folder / "alone", "--pictures", "2")
    parts = Page(text).texts
    names = r"teacher .* teacher\s+alone .* student alone\s+<i>pkd</i> .* distilled"
    assert re.search(names, parts["results"], re.S) and "<i>pkd" not in text
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!data:)', text)
    assert text.count("data:image/jpeg;base64,") == 2 and parts["pictures"].count("truth") == 3
    assert parts["size-and-speed"].count("ms ") == 3
    assert "loss_pkd 9 - - 9 - -" in " ".join(parts["gradients"].split())
    assert "loss_pkd" in parts["losses"] and "the task's" in parts["gradients"]
    assert "Weights of the losses: PKD 7.5." in parts["gradients"]
    assert (
        re.search(r"TYPES\s+\['PKD'\]", parts["settings"]) and "distill_config.yaml" in parts["settings"]
    )
    assert "# 20" in parts["commands"]


def test_page_without_detectors_and_data(tmp_path):
    """Metrics alone are enough; several seeds are one row."""
    seeds = [run_of(tmp_path / f"seed{i}", evaluation(float(i), iteration=9)) for i in (1, 2)]
    other = run_of(tmp_path / "other", evaluation(iteration=9))
    parts = Page(made(tmp_path, other, "--student", ",".join(seeds))).texts
    assert re.search(r"seed1, seed2\s+41.5 ± 0.7", parts["results"])
    assert "gain over" not in parts["results"] and "no detector could be loaded" in parts["pictures"]
    assert "other: " in parts["size-and-speed"] and "Nothing was distilled" in parts["gradients"]


def test_gains_of_several_seeds(tmp_path):
    alone, pkd = (
        [run_of(tmp_path / f"{name}{seed}", evaluation(gain + seed, iteration=9)) for seed in (1, 2, 3)]
        for name, gain in (("alone", 0.0), ("pkd", 2.0))
    )
    for run in pkd:
        Path(run, "distill_config.yaml").write_text("MODEL: {DISTILLER: {TYPES: [PKD]}}")
    page = made(tmp_path, "alone=" + ",".join(alone), "PKD=" + ",".join(pkd))
    found = " ".join(Page(page).texts["results"].partition("gain over alone")[2].split())
    assert "PKD 1, 2, 3 44.00 ± 1.00 +2.00, +2.00, +2.00 +2.00 +2.00 to +2.00 < 0.001" in found


def test_roles(tmp_path):
    """The teacher is the run whose weights a distillation names, unless the command line says another."""
    for name in ("a", "b", "c"):
        run_of(tmp_path / name, evaluation())
    distiller = {"TYPES": ["PKD"], "TEACHER_WEIGHTS": str(tmp_path / "b" / "model_final.pth")}
    (tmp_path / "a" / "distill_config.yaml").write_text(json.dumps({"MODEL": {"DISTILLER": distiller}}))
    a, b, c = (kinds_of([str(tmp_path / name)]) for name in "abc")
    entries = entries_of([*a, *b, *c])
    assert [(e.name, e.role) for e in entries] == [
        ("b", "teacher"),
        ("c", "student alone"),
        ("a", "distilled"),
    ]
    assert [e.color for e in entries] == [0, 1, 2]
    entries = entries_of(a, teachers=c, alone=b)
    assert [(e.name, e.role) for e in entries] == [
        ("c", "teacher"),
        ("b", "student alone"),
        ("a", "distilled"),
    ]


def test_detections_find_objects():
    """Each object once, by the detection of its class with the highest score."""
    truth = Truth(np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32), ["dog", "cat"], [None, None])
    boxes = [[1, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]]
    instances = Instances((40, 40), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.scores = torch.tensor([0.9, 0.8, 0.95, 0.3])
    instances.pred_classes = torch.tensor([0, 0, 1, 1])
    found = found_by(instances, ["dog", "cat"], truth)
    assert found.objects.tolist() == [-1, 0, -1, 1]  # the cat's box on the dog, dog, dog again, cat
    assert found.counts(0.5) == (1, 2) and f1(found, truth, 0.5) == pytest.approx(2 / 5)
    assert best_threshold([found], [truth]) < 0.3


def test_a_single_point_is_seen():
    lines = [Line("loss", [(19, 0.5)], 1)]
    assert line_chart("a", lines, "x", "y", dots=False).count("<circle") == 1


def test_scales():
    assert ticks(0, 53) == [0, 20, 40, 60] and ticks(3, 3) == [3, 4, 5, 6]
    assert log_ticks(0.06, 25) == [0.1, 1.0, 10.0] and log_ticks(2, 9) == [2.0, 5.0]
    points = thinned([(i, float(i % 2)) for i in range(1000)])
    assert len(points) == 250 and points[-1][0] == 999


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no browser")
def test_fits_a_phone(job, tmp_path):
    """At 390 pixels only tables scroll sideways."""
    made(tmp_path, job.output, job.folder / "alone")
    script = (
        "const e = this.contentDocument.documentElement; document.title = e.scrollWidth - e.clientWidth"
    )
    frame = f'<iframe src="report.html" style="width: 390px; height: 800px" onload="{script}"></iframe>'
    (tmp_path / "phone.html").write_text(frame)
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--dump-dom",
    ]
    command = [BROWSER, *words, f"file://{tmp_path}/phone.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>0</title>" in done.stdout
