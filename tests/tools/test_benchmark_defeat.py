"""tools/benchmark.py of DeFeat: its parts, its plain formula, and whose proposals are scored."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from test_benchmark import (  # noqa: F401  two of them fixtures
    STEPS,
    box_head_boxes,
    build,
    gradients,
    make_config,
    run,
    terms,
    tool,
)

NECK = ["neck terms", "masks of the neck", "adapters of the neck"]
HEADS = {"HEAD_CLS_W": "2.0", "HEAD_CLS_BACK_W": "0.5", "HEAD_CLS_T": "3.0"}


def options(settings):
    return [word for key, value in settings.items() for word in (f"MODEL.DISTILLER.DEFEAT.{key}", value)]


def rows(*parts, naive=False):
    more = ["DeFeat alone, naive formula"] if naive else []
    return [*STEPS, "DeFeat alone", *more, *(f"DeFeat part: {name}" for name in parts)]


def build_tasks(tool, config_file, against_naive=False, **settings):
    subjects = build(tool, config_file, *options(settings))
    for model in (subjects.distiller.student, subjects.distiller.teacher.model):
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight"):
                parameter.data.mul_(30)  # scores with a spread, which random weights do not give
    with EventStorage(subjects.iteration):
        return subjects, tool.build_tasks(subjects, against_naive)


@pytest.mark.parametrize(
    "family, settings, parts",
    [
        ("faster", {}, NECK),
        ("faster", {"NECK_ADAPT": "False", **HEADS}, [*NECK[:2], "class terms"]),
        ("faster", {"HINT_BB_W": "1.0", **HEADS}, [*NECK, "backbone terms", "class terms"]),
        ("retinanet", {"HINT_NECK_W": "0.0", "HINT_NECK_BACK_W": "0.0", **HEADS}, ["class terms"]),
    ],
)
def test_rows(tool, make_config, family, settings, parts):
    report = run(tool, make_config(["DeFeat"], family=family), "--rounds", "1", *options(settings))
    assert list(report["rows"]) == rows(*parts)


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_plain_formula_is_the_loss(tool, make_config, family):
    config_file = make_config(["DeFeat"], family=family)
    _, tasks = build_tasks(tool, config_file, against_naive=True, **HEADS)
    assert list(tasks) == rows(*NECK, "class terms", naive=True)
    loss, plain = tasks["DeFeat alone"], tasks["DeFeat alone, naive formula"]
    assert len(terms(loss)) == 4 and loss.against == "DeFeat alone, naive formula"
    torch.testing.assert_close(sum(terms(loss).values()), sum(terms(plain).values()))
    ours, theirs = gradients(loss), gradients(plain)
    assert len(ours) == len(theirs) > 3
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("proposals", ["student", "teacher", "both"])
def test_whose_proposals_are_scored(tool, make_config, monkeypatch, proposals):
    config_file = make_config(["DeFeat"], family="faster")
    subjects, tasks = build_tasks(tool, config_file, PROPOSALS=proposals, **HEADS)
    seen = box_head_boxes(monkeypatch, subjects.distiller.teacher.model)
    for name in rows(*NECK, "class terms")[len(STEPS) :]:
        tasks[name]()
    assert seen == []  # its heads are no work of the loss
    of_student = box_head_boxes(monkeypatch, subjects.distiller.student)
    task = tasks["DeFeat part: class terms"]
    task()
    assert len(of_student) == (0 if proposals == "student" else task.repeats)
    rpn = []
    subjects.plain.model.proposal_generator.rpn_head.register_forward_hook(lambda *_: rpn.append(1))
    plain = box_head_boxes(monkeypatch, subjects.plain.model)
    tasks["teacher part, plain"]()
    assert len(rpn) == (0 if proposals == "student" else 1)
    records = tasks["DeFeat alone"].replay.records
    expected = [records.proposals] if proposals != "teacher" else []
    expected += [records.own_proposals[0]] if proposals != "student" else []
    assert len(plain) == len(expected)
    for boxes, those in zip(plain, expected):
        assert all(torch.equal(a, b.tensor) for a, b in zip(boxes, those))


@pytest.mark.parametrize(
    "settings, culprit",
    [
        ({"MASK": "one"}, "DEFEAT.MASK is 'one', expected 'gt'"),
        ({"HINT_BB_W": "1.0"}, "no backbone terms; set MODEL.DISTILLER.DEFEAT.HINT_BB_W"),
    ],
)
def test_settings_that_the_plain_formula_lacks(tool, make_config, settings, culprit):
    config_file = make_config(["DeFeat"], family="faster")
    with pytest.raises(SystemExit, match=culprit):
        build_tasks(tool, config_file, against_naive=True, **settings)
