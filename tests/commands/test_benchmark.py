"""distill-d2 benchmark on tiny detectors: its rows, and that each does the work that its name says."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling import build_anchor_generator
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage

from distill_d2 import cli
from distill_d2.benchmark import naive, parts
from distill_d2.benchmark.inputs import generate_inputs
from distill_d2.benchmark.meter import Meter, Sample
from distill_d2.benchmark.report import paired, print_report, spread, summarize
from distill_d2.benchmark.rows import build_tasks
from distill_d2.benchmark.subjects import DISTILLED, STUDENT, build_subjects, own_optimizer
from distill_d2.engine import load_config
from distill_d2.testing.cells import counting
from distill_d2.testing.tiny import distiller_config, save_teacher, tiny_config

STEPS = ["student step", "teacher part, plain", "distilled step", "distilled step, teacher cached"]
STEPS += ["teacher part, prepared", "teacher whole, plain"]
HEADLINE = "distilled step / (student step + teacher part, plain)"
ICD = "InstanceConditionalDistillation"
TINY = {"MODEL.DISTILLER.INS.HIDDEN_DIM": "16", "MODEL.DISTILLER.INS.ATT_HEADS": "2"}
GROWTH = [f"selection of {rows} rows" for rows in ("5k", "20k", "80k")]
GID_PARTS = ["selection", "pooling, feature and relation terms", "response terms"]
NECK = ["neck terms", "masks of the neck", "adapters of the neck"]
NO_NECK = {"HINT_NECK_W": "0.0", "HINT_NECK_BACK_W": "0.0"}
HEADS = {"HEAD_CLS_W": "2.0", "HEAD_CLS_BACK_W": "0.5", "HEAD_CLS_T": "3.0"}
NODES = {ICD: "", "GID": "GID", "DeFeat": "DEFEAT", "PKD": "PKD"}
# GID whose parts are wholly on maps, or wholly on heads.
NO_MAPS = {"FEATURE_WEIGHT": "0.0", "RELATION_WEIGHT": "0.0"}
NO_HEADS = {"RESPONSE_CLS_WEIGHT": "0.0", "RESPONSE_REG_WEIGHT": "0.0"}


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """Writes a distillation config whose teacher has a config, but no weights; returns its path."""

    def make(types, family="retinanet"):
        folder = tmp_path_factory.mktemp(family)
        teacher = save_teacher(tiny_config(family, width=12), folder / "teacher")
        (folder / "teacher" / "teacher.pth").unlink()
        path = folder / f"{family}.yaml"
        path.write_text(distiller_config(tiny_config(family), teacher, types).dump())
        return str(path)

    return make


def options(settings, method=""):
    """KEY VALUE words of MODEL.DISTILLER, or of one method's node."""
    prefix = f"MODEL.DISTILLER.{method}." if method else "MODEL.DISTILLER."
    full = {name if name.startswith("MODEL.") else prefix + name: v for name, v in settings.items()}
    return [word for item in full.items() for word in item]


def build(config_file, settings=TINY, method=""):
    return build_subjects(load_config(config_file, options(settings, method)), (64, 64))


def tasks_of(config_file, settings=TINY, method="", against_naive=True):
    """(subjects, tasks) of heads whose scores have a spread, which random weights do not give."""
    subjects = build(config_file, settings, method)
    for model in (subjects.distiller.student, subjects.distiller.teacher.model):
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight") or name == "head.bbox_pred.weight":
                parameter.data.mul_(30)
    with EventStorage(subjects.iteration):
        return subjects, build_tasks(subjects, against_naive)


@pytest.fixture(scope="module")
def icd(make_config):
    return tasks_of(make_config([ICD]))


def terms(task):
    return task.replay(task.compute)


def gradients(task):
    """Of the terms' sum, for each recorded tensor of the student that they depend on."""
    task.release()
    sum(terms(task).values()).backward()
    result = [leaf.grad.clone() for leaf in task.replay.records.leaves if leaf.grad is not None]
    task.release()
    return result


# The whole program.


def test_every_promised_row_is_printed_and_written(make_config, tmp_path, capsys):
    """The ratios are those of each round; images need not be square."""
    arguments = [
        "--config-file",
        make_config(["PKD", "FeatureMimic"]),
        "--size",
        "48x80",
        "--rounds",
        "2",
    ]
    arguments += ["--threads", "1", "--device", "cpu", "--json", str(tmp_path / "report.json")]
    arguments += ["MODEL.DISTILLER.PKD.GRADIENT_RATIO", "1.0"]
    assert cli.main(["benchmark", *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    losses = ["PKD alone", "PKD alone, naive formula", "FeatureMimic alone"]
    assert list(report["rows"]) == STEPS + losses and report["clock"] == "process"
    for row in report["rows"].values():
        assert len(row["wall_ms"]) == len(row["process_ms"]) == 2
        assert min(row["wall_ms"]) > 0 and row["peak_mb"] >= 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in [*report["rows"], *report["ratios"]])
    for fact in ("processor:", "torch:", "threads:   1", "2 images of 48x80", "process time"):
        assert fact in printed
    times = {name: row["process_ms"] for name, row in report["rows"].items()}
    for index, ratio in enumerate(report["ratios"][HEADLINE]):
        floor = times["student step"][index] + times["teacher part, plain"][index]
        assert ratio == pytest.approx(times["distilled step"][index] / floor)
    pkd = times["PKD alone"], times["PKD alone, naive formula"]
    assert report["ratios"]["PKD alone / PKD alone, naive formula"] == pytest.approx(paired(*pkd))


def test_median_spread_and_ratio_of_memory(capsys):
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0 3.0]"
    names = [*STEPS, "A alone", "A alone, naive formula", "B alone", "B alone, naive formula"]
    rounds = {name: [Sample(w, w / 2, w / 4) for w in (4.0, 8.0)] for name in names}
    memory = {**dict.fromkeys(names, 1.0), "A alone, naive formula": 4.0, "B alone, naive formula": 0.0}
    pairs = [(f"{name} alone", f"{name} alone, naive formula") for name in "AB"]
    report = summarize(rounds, memory, "event", pairs)
    assert report["ratios"][HEADLINE] == [0.5, 0.5]
    assert report["rows"]["student step"]["process_ms"] == [2000.0, 4000.0]
    assert report["rows"]["student step"]["event_ms"] == [1000.0, 2000.0]
    assert list(report["memory_ratios"].values()) == [0.25, None]
    print_report({**report, "facts": {}})
    printed = capsys.readouterr().out
    assert "naive formula | 0.250 " in printed and "naive formula | - " in printed
    assert "event ms" in printed and "event ms" not in str(summarize(rounds, memory, "process"))


def test_peak_memory_counts_what_is_freed_again():
    meter = Meter(torch.device("cpu"))
    if not meter.per_row:
        pytest.skip("this system cannot reset its peak memory")
    assert 30 < meter.peak_memory(lambda: torch.ones(2**23)) < 100  # 32 MB


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "Distillation-GID/fcos_R_50_R101_gid_FPN_1x.py"], "only yaml"),
        (["--config-file", "Base-SSD.yaml", "--size", "1x2x3"], "--size"),
        (["--config-file", "Base-SSD.yaml", "--size", "0"], "--size 0"),
        (["--config-file", "Base-SSD.yaml", "--threads", "-1"], "--threads -1"),
        (["--config-file", "Base-SSD.yaml", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", *arguments])
    assert message in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"TEACHER_WEIGHTS": "missing.pth"}, "missing.pth.*random weights.*TEACHER_WEIGHTS"),
        ({"PKD.WEIGHT": "0.0"}, "PKD.*WEIGHT or WEIGHT_VALUE is 0"),
        ({"INS_ATT_MIMIC.WEIGHT_VALUE": "0.0"}, "not reach the student: WEIGHT or WEIGHT_VALUE is 0"),
        ({"DISTILL_ON": "0"}, f"{ICD}.*DISTILL_ON"),
        ({"PKD.STOP_ITER": "500"}, "PKD'\\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_config, settings, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        build(make_config(["PKD", ICD]), {**TINY, **settings})


@pytest.mark.parametrize(
    "settings, iteration",
    [
        ({}, 1000),
        ({"BYPASS_DISTILL": "30", "PKD.START_ITER": "20", "PKD.WARMUP_ITERS": "5"}, 30),
        ({"BYPASS_DISTILL": "10", "PKD.START_ITER": "20", "PKD.WARMUP_ITERS": "5"}, 25),
        ({"DISTILL_OFF": "1"}, 0),
    ],
)
def test_all_losses_are_measured_switched_on(make_config, settings, iteration):
    assert build(make_config(["PKD", ICD]), {**TINY, **settings}).iteration == iteration


# The subjects.


@pytest.mark.parametrize("mask_format, kind", [("polygon", PolygonMasks), ("bitmask", BitMasks)])
def test_generated_masks_fill_their_boxes(mask_format, kind):
    cfg = tiny_config("mask")
    cfg.INPUT.MASK_FORMAT = mask_format
    for item in generate_inputs(cfg, (40, 64), batch=2, objects=3, classes=3, seed=0):
        instances = item["instances"]
        assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 40, 64)
        assert type(instances.gt_masks) is kind and len(instances) == 3
        inside = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.allclose(inside, instances.gt_boxes.tensor, atol=3.0)


def test_losss_own_optimizer(icd):
    """It updates what it should, at a rate of 0: weights stay, as do those of the detectors."""
    subjects, tasks = icd
    student, distilled = subjects.steps[STUDENT], subjects.steps[DISTILLED]
    assert student.own_optimizers == {} and list(distilled.own_optimizers) == [ICD]
    groups = distilled.own_optimizers[ICD].param_groups
    of_loss = {id(p) for p in subjects.distiller.losses[ICD].parameters()}
    assert {id(p) for group in groups for p in group["params"]} == of_loss
    before = {name: value.clone() for name, value in subjects.distiller.named_parameters()}
    with EventStorage(subjects.iteration):
        for task in tasks.values():
            task()
    after = dict(subjects.distiller.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for row in (f"{ICD} alone", f"{ICD} alone, naive formula"):
        updated, leaves = tasks[row].optimizer.state, tasks[row].leaves
        assert updated and all(any(p is leaf for leaf in leaves) for p in updated)
        assert all(leaf.grad is None for leaf in leaves)
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = own_optimizer(subjects.distiller.losses[ICD], [parameter])
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert parameter.grad.norm() == pytest.approx(0.01, rel=1e-3)  # the loss's clipping
    assert parameter.tolist() == [3.0, 4.0]


# Losses, their parts, and plain formulas.


@pytest.mark.parametrize(
    "method, family, settings, expected",
    [
        (ICD, "retinanet", {}, ["decoder + auxiliary task", "value loss"]),
        ("GID", "retinanet", {}, [*GID_PARTS, *GROWTH]),
        ("GID", "retinanet", NO_MAPS, [GID_PARTS[0], GID_PARTS[2], *GROWTH]),
        ("GID", "retinanet", NO_HEADS, [*GID_PARTS[:2], *GROWTH]),
        ("GID", "retinanet", {"GI_MODE": "gt", **NO_HEADS}, [GID_PARTS[1]]),
        ("GID", "faster", {}, [*GID_PARTS, *GROWTH]),
        ("DeFeat", "faster", {"NECK_ADAPT": "False", **HEADS}, [*NECK[:2], "class terms"]),
        ("DeFeat", "faster", {"HINT_BB_W": "1.0", **HEADS}, [*NECK, "backbone terms", "class terms"]),
        ("DeFeat", "retinanet", {**NO_NECK, **HEADS}, ["class terms"]),
    ],
)
def test_parts(make_config, method, family, settings, expected):
    """Those that the settings have; together they are the terms of the whole loss."""
    config_file = make_config([method], family)
    _, tasks = tasks_of(config_file, {**TINY, **settings}, NODES[method], against_naive=False)
    assert list(tasks) == [*STEPS, f"{method} alone", *(f"{method} part: {part}" for part in expected)]
    whole, found = terms(tasks[f"{method} alone"]), {}
    for part in expected:
        if part not in GROWTH and part not in NECK[1:]:
            found.update(terms(tasks[f"{method} part: {part}"]))
        tasks[f"{method} part: {part}"]()
    values = sorted(value.item() for value in found.values())
    assert values == pytest.approx(sorted(value.item() for value in whole.values()))


@pytest.mark.parametrize(
    "name, family, settings, terms_of_loss",
    [
        ("PKD", "retinanet", {}, 1),
        ("GID", "retinanet", {"GI_SCORE": "classwise"}, 4),
        ("GID", "retinanet", {"GI_SCORE": "max_first"}, 4),
        ("DeFeat", "faster", HEADS, 4),
        ("DeFeat", "retinanet", HEADS, 4),
    ],
)
def test_plain_formula_is_the_loss(make_config, name, family, settings, terms_of_loss):
    _, tasks = tasks_of(make_config([name], family), settings, NODES[name])
    loss, plain = tasks[f"{name} alone"], tasks[f"{name} alone, naive formula"]
    assert loss.against == f"{name} alone, naive formula" and len(terms(loss)) == terms_of_loss
    sums = (sum(terms(task).values()) for task in (loss, plain))
    torch.testing.assert_close(*sums, rtol=1e-4, atol=0.0)
    actual, expected = gradients(plain), gradients(loss)
    assert len(actual) == len(expected) >= 3
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_naive_icd_does_the_same_work(icd, monkeypatch):
    subjects, tasks = icd
    loss, slots, oracle = subjects.distiller.losses[ICD], [], naive.load_oracle("naive_icd")
    draw = oracle.draw_queries
    monkeypatch.setattr(oracle, "draw_queries", lambda *args: slots.append(draw(*args)) or slots[-1])
    monkeypatch.setattr(naive, "load_oracle", lambda _name: oracle)
    compute, parameters = naive.naive_icd(loss)
    replay = tasks[f"{ICD} alone"].replay
    losses = replay(compute)
    queries = replay(lambda _student, teacher, batch: loss.read(teacher, batch)[1])
    assert slots[0].classes.shape == queries.classes.shape == (2, 48)  # 8 objects, 5 fakes each
    assert slots[0].is_real.sum() == sum(queries.real) == 16
    assert losses.keys() == {"tea.0.prop_conf", "tea.0.prop_reg", "distill.0.matt.value"}
    sum(losses.values()).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in replay.records.leaves)
    assert sum(p.grad is not None for p in parameters) > 20
    tasks[f"{ICD} alone"].release()


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("GID", {}, "GID.PREDICTIONS is 'box_head', expected 'dense'"),
        ("DeFeat", {"MASK": "one"}, "DEFEAT.MASK is 'one', expected 'gt'"),
        ("DeFeat", {"HINT_BB_W": "1.0"}, "no backbone terms; set MODEL.DISTILLER.DEFEAT.HINT_"),
    ],
)
def test_settings_that_a_plain_formula_lacks(make_config, name, settings, message):
    with pytest.raises(SystemExit, match=message):
        tasks_of(make_config([name], "faster"), settings, NODES[name])


def test_generated_predictions_are_a_retinanets(make_config):
    """Of five levels, with the same anchors as detectron2's, and the same again for the same seed."""
    _, tasks = tasks_of(make_config(["GID"]))
    head = tasks["GID alone"].replay(lambda _student, teacher, _batch: teacher.dense())
    one, again = (parts.generate_predictions(20, head, seed=0) for _ in range(2))
    rows = sum(9 * side**2 for side in (20, 10, 5, 3, 2))
    assert one.logits.shape == (2, rows, 3) and one.deltas.shape == (2, rows, 4)
    assert torch.equal(one.logits, again.logits) and torch.equal(one.deltas, again.deltas)
    cfg = get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    shapes = [ShapeSpec(stride=stride) for stride in (8, 16, 32, 64, 128)]
    maps = [torch.empty(1, 1, side, side) for side in (20, 10, 5, 3, 2)]
    expected = torch.cat([boxes.tensor for boxes in build_anchor_generator(cfg, shapes)(maps)])
    torch.testing.assert_close(one.anchors, expected)


# Which parts of the detectors run.


def box_head_boxes(model):
    """The boxes that a detector's box head is given: one list for each time that it runs."""
    seen = []
    model.roi_heads.box_pooler.register_forward_pre_hook(
        lambda _, inputs: seen.append([boxes.tensor.clone() for boxes in inputs[1]])
    )
    return seen


@pytest.mark.parametrize("proposals", ["student", "teacher", "both"])
def test_whose_proposals_are_scored(make_config, proposals):
    settings = {"PROPOSALS": proposals, **HEADS}
    subjects, tasks = tasks_of(make_config(["DeFeat"], "faster"), settings, "DEFEAT", False)
    seen = box_head_boxes(subjects.distiller.teacher.model)
    of_student = box_head_boxes(subjects.distiller.student)
    task = tasks["DeFeat part: class terms"]
    task()
    assert seen == []  # the teacher's heads are no work of the loss
    assert len(of_student) == (0 if proposals == "student" else task.repeats)
    rpn = []
    subjects.plain.model.proposal_generator.rpn_head.register_forward_hook(lambda *_: rpn.append(1))
    plain = box_head_boxes(subjects.plain.model)
    with EventStorage(0):
        tasks["distilled step"]()  # the student samples other proposals
    tasks["teacher part, plain"]()
    assert len(rpn) == (0 if proposals == "student" else 1)
    records = tasks["DeFeat alone"].replay.records
    expected = [records.proposals] if proposals != "teacher" else []
    expected += [records.own_proposals[0]] if proposals != "student" else []
    assert len(plain) == len(expected)
    for boxes, recorded in zip(plain, expected):
        assert all(torch.equal(a, b.tensor) for a, b in zip(boxes, recorded))


def test_a_cached_step_does_not_run_the_teacher_again(make_config):
    subjects, tasks = tasks_of(make_config(["PKD"]), settings={})
    cached = "distilled step, teacher cached"
    with EventStorage(0):
        tasks[cached]()
        with counting({"backbone": subjects.distiller.teacher.view.model.backbone}) as calls:
            tasks[cached]()
            assert not calls
            tasks["distilled step"]()
            assert calls == {"backbone": 1}
