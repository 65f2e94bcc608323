"""tools/benchmark.py on tiny detectors: every promised row, and ratios of paired rounds."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling import build_anchor_generator
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage

from distill_d2.testing.tiny import distiller_config, save_teacher, tiny_config

TOOLS = Path(__file__).resolve().parents[2] / "tools"
STEPS = [
    "student step",
    "teacher part, plain",
    "distilled step",
    "teacher part, prepared",
    "teacher whole, plain",
]
HEADLINE = "distilled step / (student step + teacher part, plain)"
ICD = "InstanceConditionalDistillation"
TINY_ICD = ["MODEL.DISTILLER.INS.HIDDEN_DIM", "16", "MODEL.DISTILLER.INS.ATT_HEADS", "2"]


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import benchmark

    yield benchmark
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def parts(tool):
    return sys.modules["loss_parts"]


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


@pytest.fixture(scope="module")
def measured(tool, make_config, tmp_path_factory):
    """(report, what was printed, what was written) of one run."""
    path, printed = tmp_path_factory.mktemp("json") / "report.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = run(tool, make_config(["PKD", "FeatureMimic"]), "--json", str(path))
    return report, printed.getvalue(), json.loads(path.read_text())


@pytest.fixture(scope="module")
def icd_config(make_config):
    return make_config([ICD])


@pytest.fixture(scope="module")
def icd(tool, icd_config):
    """(subjects, tasks) with the naive version."""
    subjects = build(tool, icd_config)
    with tool.EventStorage(subjects.iteration):
        return subjects, tool.build_tasks(subjects, against_naive=True)


def build(tool, config_file, *opts):
    arguments = ["--config-file", config_file, "--size", "64", *TINY_ICD, *opts]
    args = tool.parse_arguments(arguments)
    return tool.build_subjects(tool.load_config(args.config_file, args.opts), args)


def terms(task):
    return task.replay(task.compute)


def run(tool, config_file, *more):
    arguments = ["--config-file", config_file, "--size", "64", "--rounds", "2", "--threads", "1"]
    gc.freeze()  # the tool collects before each peak: a second for all that the tests hold
    try:
        return tool.main([*arguments, "--device", "cpu", *more])
    finally:
        gc.unfreeze()


def test_every_promised_row_is_printed_and_written(measured):
    report, printed, written = measured
    losses = ["PKD alone", "PKD alone, naive formula", "FeatureMimic alone"]
    assert list(report["rows"]) == STEPS + losses
    assert written == report
    for row in report["rows"].values():
        assert len(row["wall_ms"]) == len(row["process_ms"]) == 2
        assert min(row["wall_ms"]) > 0 and row["peak_mb"] >= 0
    for name in [*report["rows"], *report["ratios"]]:
        assert f"| {name} " in printed
    for fact in ("processor:", "torch:", "threads:   1", "2 images of 64x64", "process time"):
        assert fact in printed


def test_ratios_are_of_each_round(measured):
    report = measured[0]
    assert report["clock"] == "process"
    times = {name: row["process_ms"] for name, row in report["rows"].items()}
    for index, ratio in enumerate(report["ratios"][HEADLINE]):
        floor = times["student step"][index] + times["teacher part, plain"][index]
        assert ratio == pytest.approx(times["distilled step"][index] / floor)
    pkd = report["ratios"]["PKD alone / PKD alone, naive formula"]
    assert pkd[0] == pytest.approx(times["PKD alone"][0] / times["PKD alone, naive formula"][0])


@pytest.fixture(scope="module")
def measured_icd(tool, icd_config, tmp_path_factory):
    """As ``measured``, against the naive version."""
    path, printed = tmp_path_factory.mktemp("json") / "report.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = run(tool, icd_config, "--json", str(path), "--against-naive", *TINY_ICD)
    return report, printed.getvalue(), json.loads(path.read_text())


def test_icd_in_parts_and_against_its_naive_version(tool, measured_icd):
    report, printed, written = measured_icd
    alone, naive = f"{ICD} alone", f"{ICD} alone, naive formula"
    parts = [f"{ICD} part: decoder + auxiliary task", f"{ICD} part: value loss"]
    assert list(report["rows"]) == [*STEPS, alone, naive, *parts]
    times = [report["rows"][name]["process_ms"] for name in (alone, naive)]
    assert report["ratios"][f"{alone} / {naive}"] == pytest.approx(tool.paired(*times))
    assert list(report["memory_ratios"]) == [f"{alone} / {naive}"]
    assert written == report
    assert printed.count(f"| {alone} / {naive} ") == 2 and "| ratio of memory " in printed
    assert all(f"| {part} " in printed for part in parts)


def test_naive_icd_only_when_asked_for(tool, icd):
    subjects, tasks = icd
    with tool.EventStorage(subjects.iteration):
        fewer = tool.build_tasks(subjects)
    assert set(tasks) - set(fewer) == {f"{ICD} alone, naive formula"}


def test_parts_of_icd_are_its_terms(icd):
    tasks = icd[1]
    whole = terms(tasks[f"{ICD} alone"])
    auxiliary = terms(tasks[f"{ICD} part: decoder + auxiliary task"])
    value = terms(tasks[f"{ICD} part: value loss"])["value"]
    assert auxiliary == {name: whole[name] for name in ("loss_icd_conf_0", "loss_icd_reg_0")}
    assert value == whole["loss_icd_value"] > 0
    value.backward()  # through the student's side alone
    parts = tasks[f"{ICD} part: value loss"]
    reached = [leaf.grad is not None for leaf in parts.replay.records.leaves]
    assert all(reached) and len(reached) == 3
    parts.release()
    assert all(leaf.grad is None for leaf in parts.leaves)


def test_icd_without_its_value_loss_would_not_reach_the_student(tool, icd_config):
    with pytest.raises(SystemExit, match="not reach the student: WEIGHT or WEIGHT_VALUE is 0"):
        build(tool, icd_config, "MODEL.DISTILLER.INS_ATT_MIMIC.WEIGHT_VALUE", "0.0")


def test_naive_icd_does_the_same_work(tool, icd, monkeypatch):
    subjects, tasks = icd
    loss, slots, oracle = subjects.distiller.losses[ICD], [], tool.load_oracle("naive_icd")
    draw = oracle.draw_queries

    def spy(*args):
        slots.append(draw(*args))
        return slots[-1]

    oracle.draw_queries = spy
    monkeypatch.setattr(tool, "load_oracle", lambda _name: oracle)
    compute, parameters = tool.naive_icd(loss)
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


def test_attention_of_naive_icd_is_not_slowed_down_by_denormal_numbers(tool):
    from distill_d2.losses.icd import InstanceConditionalDistillation

    settings = InstanceConditionalDistillation(num_classes=3).settings
    settings = {name.upper(): value for name, value in vars(settings).items()}
    oracle = tool.load_oracle("naive_icd")
    naive = oracle.NaiveICD(tool.naive_icd_weights(oracle, settings), settings, settings)
    generator = torch.Generator().manual_seed(0)
    maps = {"p3": 10 * torch.randn(1, 256, 16, 16, generator=generator)}  # as random networks have
    boxes, classes = [torch.tensor([[10.0, 10.0, 60.0, 80.0]])], [torch.tensor([1])]
    sizes, random = [(128, 128)], np.random.RandomState(0)
    queries = oracle.draw_queries(random, boxes, classes, sizes, settings, settings)
    out = naive.forward(maps, maps, queries, sizes, sizes[0], iteration=0, max_iter=1)
    assert out["dec/0/attn_softmax"].min() > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("row", [f"{ICD} alone", f"{ICD} alone, naive formula"])
def test_both_sides_update_their_parameters(icd, row):
    task = icd[1][row]
    task()
    updated = task.optimizer.state
    assert updated and all(any(p is leaf for leaf in task.leaves) for p in updated)
    assert all(leaf.grad is None for leaf in task.leaves)


def test_own_optimizer_is_the_losss_and_changes_nothing(tool, icd):
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = tool.own_optimizer(icd[0].distiller.losses[ICD], [parameter, frozen])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert parameter.grad.norm() == pytest.approx(0.01, rel=1e-3)
    assert parameter.tolist() == [3.0, 4.0]


def test_losses_without_a_solver_have_no_own_optimizer(tool, make_config):
    subjects = build(tool, make_config(["PKD"]))
    assert subjects.steps[tool.DISTILLED].own_optimizers == {}
    with tool.EventStorage(0):
        assert tool.build_tasks(subjects)["PKD alone"].optimizer is None


def test_distilled_step_has_the_losss_optimizer(tool, icd):
    subjects = icd[0]
    student, distilled = subjects.steps[tool.STUDENT], subjects.steps[tool.DISTILLED]
    assert student.own_optimizers == {} and list(distilled.own_optimizers) == [ICD]
    of_loss = {id(p) for p in subjects.distiller.losses[ICD].parameters()}
    groups = distilled.own_optimizers[ICD].param_groups
    assert {id(p) for group in groups for p in group["params"]} == of_loss
    assert all(group["lr"] == 0 for group in groups)
    others = {id(p) for group in student.optimizer.param_groups for p in group["params"]}
    assert not others & of_loss


def test_naive_version_outside_a_checkout(tool, icd_config, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ORACLES", tmp_path)
    with pytest.raises(SystemExit, match="--against-naive needs .*naive_icd.py.*checkout"):
        run(tool, icd_config, "--against-naive", *TINY_ICD)


def test_memory_is_compared_where_each_row_has_its_own(tool, make_config, monkeypatch):
    monkeypatch.setattr(tool, "linux_reset_peak", lambda: None)
    report = run(tool, make_config(["PKD"]), "--rounds", "1")
    assert report["memory_ratios"] == {}
    assert "cannot reset" in report["facts"]["memory"]


def test_ratio_of_memory(tool, capsys):
    names = [*STEPS, "A alone", "A alone, naive formula", "B alone", "B alone, naive formula"]
    rounds = {name: [tool.Sample(wall=1.0, process=1.0)] for name in names}
    memory = {**dict.fromkeys(names, 1.0), "A alone, naive formula": 4.0, "B alone, naive formula": 0.0}
    pairs = [(f"{name} alone", f"{name} alone, naive formula") for name in "AB"]
    report = tool.summarise(rounds, memory, "wall", pairs)
    assert list(report["memory_ratios"].values()) == [0.25, None]
    tool.print_report({**report, "facts": {}})
    printed = capsys.readouterr().out
    assert "naive formula | 0.250 " in printed and "naive formula | - " in printed


def test_median_and_spread(tool):
    assert tool.spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0 3.0]"
    samples = [tool.Sample(wall=w, process=w / 2) for w in (4.0, 8.0)]
    names = [tool.STUDENT, tool.PART, tool.DISTILLED, tool.PREPARED, tool.WHOLE]
    rounds = dict.fromkeys(names, samples)
    report = tool.summarise(rounds, dict.fromkeys(names, 1.0), "wall")
    assert report["ratios"][HEADLINE] == [0.5, 0.5]
    assert report["rows"][tool.STUDENT]["process_ms"] == [2000.0, 4000.0]


def test_two_stage_detector_with_masks_on_oblong_images(tool, make_config):
    config_file = make_config(["FeatureMimic"], family="mask")
    report = run(tool, config_file, "--batch", "1", "--rounds", "1", "--size", "48x80")
    assert list(report["rows"]) == [*STEPS, "FeatureMimic alone"]
    assert "1 images of 48x80" in report["facts"]["batch"]


@pytest.mark.parametrize("mask_format, kind", [("polygon", PolygonMasks), ("bitmask", BitMasks)])
def test_generated_masks_fill_their_boxes(tool, mask_format, kind):
    cfg = tiny_config("mask")
    cfg.INPUT.MASK_FORMAT = mask_format
    args = tool.parse_arguments(["--config-file", "x.yaml", "--size", "40x64", "--objects", "3"])
    for item in tool.generate_inputs(cfg, args, classes=3):
        instances = item["instances"]
        assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 40, 64)
        assert type(instances.gt_masks) is kind and len(instances) == 3
        inside = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.allclose(inside, instances.gt_boxes.tensor, atol=3.0)


def test_weights_stay_and_the_plain_teacher_is_unprepared(tool, make_config):
    subjects = build(tool, make_config(["PKD", ICD]))
    before = {k: v.clone() for k, v in subjects.distiller.named_parameters()}
    with tool.EventStorage(subjects.iteration):
        for task in tool.build_tasks(subjects).values():
            task()
    after = dict(subjects.distiller.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = [
        sum("norm" in name for name in teacher.model.state_dict())
        for teacher in (subjects.plain, subjects.distiller.teacher)
    ]
    assert norms[0] > 0 and norms[1] == 0


def test_naive_pkd_is_our_pkd(tool):
    from distill_d2.losses.pkd import pearson_distance

    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    assert tool.naive_pkd(student, teacher) == pytest.approx(pearson_distance(student, teacher))


def test_peak_memory_counts_what_is_freed_again(tool):
    meter = tool.Meter(torch.device("cpu"))
    if "per row" in meter.memory_note:
        pytest.skip("this system cannot reset its peak memory")
    peak = meter.peak_memory(lambda: torch.ones(2**23))  # 32 MB
    assert 30 < peak < 100


def test_loss_that_starts_later_is_measured_switched_on(tool, make_config):
    opts = ["MODEL.DISTILLER.PKD.START_ITER", "7", "MODEL.DISTILLER.PKD.WARMUP_ITERS", "3"]
    args = tool.parse_arguments(["--config-file", make_config(["PKD"]), "--size", "64", *opts])
    cfg = tool.load_config(args.config_file, args.opts)
    assert tool.build_subjects(cfg, args).iteration == 10


@pytest.mark.parametrize(
    "opts, iteration",
    [
        ([], 1000),
        (["BYPASS_DISTILL", "30", "PKD.START_ITER", "20", "PKD.WARMUP_ITERS", "5"], 30),
        (["BYPASS_DISTILL", "10", "PKD.START_ITER", "20", "PKD.WARMUP_ITERS", "5"], 25),
        (["DISTILL_OFF", "1"], 0),
    ],
)
def test_icd_is_measured_teaching_the_student(tool, make_config, opts, iteration):
    assert build(tool, make_config(["PKD", ICD]), *of_distiller(opts)).iteration == iteration


@pytest.mark.parametrize(
    "opts, culprit", [(["DISTILL_ON", "0"], f"{ICD}.*DISTILL_ON"), (["PKD.STOP_ITER", "500"], "PKD'\\]")]
)
def test_losses_that_never_teach_together_are_refused(tool, make_config, opts, culprit):
    with pytest.raises(SystemExit, match=culprit):
        build(tool, make_config(["PKD", ICD]), *of_distiller(opts))


def of_distiller(opts):
    return [f"MODEL.DISTILLER.{word}" if word[0].isalpha() else word for word in opts]


def test_loss_that_is_off_is_refused(tool, make_config):
    with pytest.raises(SystemExit, match="PKD.*WEIGHT or WEIGHT_VALUE is 0"):
        run(tool, make_config(["PKD"]), "MODEL.DISTILLER.PKD.WEIGHT", "0.0")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "x.py"], "only yaml"),
        (["--config-file", "x.yaml", "--size", "1x2x3"], "--size"),
        (["--config-file", "x.yaml", "--size", "0"], "--size 0"),
        (["--config-file", "x.yaml", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_wrong_arguments(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert message in capsys.readouterr().err + str(stop.value)


# GID


GROWTH = [f"GID part: selection of {rows} rows" for rows in ("5k", "20k", "80k")]
GID_PARTS = [
    "GID part: selection",
    "GID part: pooling, feature and relation terms",
    "GID part: response terms",
]
GID_TERMS = [f"loss_gid_{term}" for term in ("feature", "relation", "response_cls", "response_reg")]


@pytest.fixture(scope="module")
def gid_config(make_config):
    return make_config(["GID"])


def gid_options(settings):
    return [word for key, value in settings.items() for word in (f"MODEL.DISTILLER.GID.{key}", value)]


def build_gid(tool, config_file, against_naive=False, **settings):
    """(subjects, tasks); the heads' scores have a spread, which random weights do not give."""
    subjects = build(tool, config_file, *gid_options(settings))
    for model in (subjects.distiller.student, subjects.distiller.teacher.model):
        for name, parameter in model.named_parameters():
            if name.startswith(("head.cls_score.w", "head.bbox_pred.w")):
                parameter.data.mul_(30)
    with EventStorage(subjects.iteration):
        return subjects, tool.build_tasks(subjects, against_naive)


@pytest.fixture(scope="module")
def gid(tool, gid_config):
    return build_gid(tool, gid_config, against_naive=True)


@pytest.fixture(scope="module")
def gid_of_proposals(tool, make_config):
    return build_gid(tool, make_config(["GID"], family="faster"))


def gradients(task):
    """Of the terms' sum w.r.t. what the student gave."""
    task.release()
    sum(terms(task).values()).backward()
    found = [leaf.grad.clone() for leaf in task.replay.records.leaves if leaf.grad is not None]
    task.release()
    return found


def test_gid_in_parts_and_against_its_plain_formula(tool, gid_config):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        report = run(tool, gid_config, "--rounds", "1", "--against-naive")
    alone, naive = "GID alone", "GID alone, naive formula"
    assert list(report["rows"]) == [*STEPS, alone, naive, *GID_PARTS, *GROWTH]
    times = {name: row["process_ms"] for name, row in report["rows"].items()}
    pairs = [(alone, naive), (GROWTH[1], GROWTH[0]), (GROWTH[2], GROWTH[1])]
    for above, below in pairs:
        ratio = f"{above} / {below}"
        assert report["ratios"][ratio] == pytest.approx(tool.paired(times[above], times[below]))
        assert ratio in report["memory_ratios"] and f"| {ratio} " in printed.getvalue()
    assert len(report["memory_ratios"]) == len(pairs)


@pytest.mark.parametrize("score", ["classwise", "max_first"])
def test_plain_gid_is_our_gid(tool, gid_config, score):
    tasks = build_gid(tool, gid_config, against_naive=True, GI_SCORE=score)[1]
    ours, plain = tasks["GID alone"], tasks["GID alone, naive formula"]
    assert list(terms(ours)) == GID_TERMS
    for name, value in terms(ours).items():
        assert value.item() > 0
        assert terms(plain)[name].item() == pytest.approx(value.item(), rel=1e-4), name
    expected = gradients(ours)
    assert len(expected) == 9  # of three levels: maps, logits, deltas
    for mine, theirs in zip(expected, gradients(plain)):
        torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-5 * mine.abs().max().item())


def test_plain_gid_where_both_detectors_agree(tool, gid):
    import plain_gid

    logits, boxes = torch.randn(5, 3), torch.tensor([[0.0, 0.0, 40.0, 40.0]]).repeat(5, 1)
    settings = gid[0].distiller.losses["GID"].settings
    assert len(plain_gid.select(logits + 1, logits, boxes, boxes, (64, 64), settings)) == 1
    assert len(plain_gid.select(logits, logits, boxes, boxes, (64, 64), settings)) == 0


def test_parts_of_gid_are_its_terms(gid):
    tasks = gid[1]
    whole = terms(tasks["GID alone"])
    selection, at_instances, response = (terms(tasks[name]) for name in GID_PARTS)
    assert selection == {}
    assert at_instances == {name: whole[name] for name in GID_TERMS[:2]}
    assert response == {name: whole[name] for name in GID_TERMS[2:]}
    # maps and logits and deltas of three levels
    assert [len(gradients(tasks[name])) for name in GID_PARTS[1:]] == [3, 6]


def test_part_without_gradients(tool, gid):
    replay, seen = gid[1]["GID alone"].replay, []

    def compute(student, teacher, batch):
        seen.append((student.role, teacher.role, batch))
        return {}

    tool.LossTask(replay, compute, [])()
    assert seen == [("student", "teacher", replay.records.batch)] * tool.LOSS_REPEATS
    assert all(leaf.grad is None for leaf in replay.records.leaves)


def selections(tool, monkeypatch, task):
    """What the selection in a task is given and returns, once each time that it runs."""
    from distill_d2.losses.gid import GeneralInstanceSelection

    seen, select = [], GeneralInstanceSelection.__call__

    def spy(self, *args):
        seen.append((*args, select(self, *args)))
        return seen[-1][-1]

    monkeypatch.setattr(GeneralInstanceSelection, "__call__", spy)
    task()
    assert len(seen) == tool.LOSS_REPEATS
    return seen


def test_selection_alone_selects_what_the_loss_does(tool, gid, monkeypatch):
    whole = selections(tool, monkeypatch, gid[1]["GID alone"])[0][-1]
    part = selections(tool, monkeypatch, gid[1]["GID part: selection"])[0][-1]
    assert torch.equal(whole.boxes, part.boxes) and part.valid.sum() >= 6


@pytest.mark.parametrize("row, side", list(zip(GROWTH, (20, 40, 80))))
def test_generated_predictions(tool, parts, gid, monkeypatch, row, side):
    levels = [9 * math.ceil(side / 2**level) ** 2 for level in range(5)]
    teacher, student, sizes, found = selections(tool, monkeypatch, gid[1][row])[0]
    assert sizes == [(8 * side, 8 * side)] * 2
    assert found.valid.all() and len(found.scores[0].unique()) == 10
    for heads in (teacher, student):
        assert heads.level_sizes == levels
        assert heads.logits.shape == (2, sum(levels), 3) and heads.deltas.shape[2:] == (4,)
        assert heads.anchors.shape == (sum(levels), 4)
    assert not torch.equal(teacher.logits, student.logits)
    again = parts.generate_predictions(side, teacher, seed=0)
    assert torch.equal(again.logits, teacher.logits) and torch.equal(again.deltas, teacher.deltas)


def test_generated_anchors_are_a_retinanets(parts):
    cfg = get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    shapes = [ShapeSpec(stride=stride) for stride in (8, 16, 32, 64, 128)]
    maps = [torch.empty(1, 1, side, side) for side in (20, 10, 5, 3, 2)]
    expected = torch.cat([boxes.tensor for boxes in build_anchor_generator(cfg, shapes)(maps)])
    torch.testing.assert_close(parts.generate_anchors([20, 10, 5, 3, 2]), expected)


def test_weights_of_zero_leave_parts_out(tool, gid_config):
    no_maps = {"FEATURE_WEIGHT": "0.0", "RELATION_WEIGHT": "0.0"}
    no_heads = {"RESPONSE_CLS_WEIGHT": "0.0", "RESPONSE_REG_WEIGHT": "0.0"}
    whole, pooling, response = GID_PARTS
    cases = [
        (no_maps, [whole, response, *GROWTH]),
        (no_heads, [whole, pooling, *GROWTH]),
        ({"GI_MODE": "gt"}, [pooling, response]),
        ({"GI_MODE": "gt", **no_heads}, [pooling]),
    ]
    for settings, expected in cases:
        tasks = build_gid(tool, gid_config, **settings)[1]
        assert [name for name in tasks if "part:" in name] == expected
        for name in expected:
            tasks[name]()


def test_two_stage_gid(tool, make_config):
    report = run(tool, make_config(["GID"], family="faster"), "--rounds", "1")
    assert list(report["rows"]) == [*STEPS, "GID alone", *GID_PARTS, *GROWTH]


def box_head_boxes(monkeypatch, model):
    """The boxes that a detector's box head is given: one list for each time that it runs."""
    seen, pool = [], model.roi_heads.box_pooler.forward

    def spy(features, boxes):
        seen.append([per_image.tensor.clone() for per_image in boxes])
        return pool(features, boxes)

    monkeypatch.setattr(model.roi_heads.box_pooler, "forward", spy)
    return seen


@pytest.mark.parametrize("row", ["teacher part, plain", "teacher part, prepared"])
def test_teacher_part_scores_the_recorded_proposals(gid_of_proposals, monkeypatch, row):
    subjects, tasks = gid_of_proposals
    teachers = {"plain": subjects.plain, "prepared": subjects.distiller.teacher}
    seen = box_head_boxes(monkeypatch, teachers[row.rpartition(" ")[2]].model)
    tasks[row]()
    with EventStorage(0):
        tasks["distilled step"]()  # the student samples other proposals
    drawn = len(seen)
    tasks[row]()
    expected = tasks["GID alone"].replay.records.proposals
    assert len(expected) == 2 and min(len(boxes) for boxes in expected) > 4
    for run_of_row in (seen[0], seen[drawn]):
        assert len(run_of_row) == 2
        assert all(torch.equal(a, b.tensor) for a, b in zip(run_of_row, expected))
    assert len(seen) - drawn == 1


def test_loss_alone_does_not_run_the_teachers_box_head(gid_of_proposals, monkeypatch):
    subjects, tasks = gid_of_proposals
    view = subjects.distiller.teacher.view
    seen = box_head_boxes(monkeypatch, view.model)
    assert list(terms(tasks["GID alone"])) == GID_TERMS
    for name in ["GID alone", *GID_PARTS, *GROWTH]:
        tasks[name]()
    assert seen == []
    records = tasks["GID alone"].replay.records
    with view.recording():
        view.taps.put("backbone", records.teacher["backbone"])
        scored = view.box_head(records.proposals)  # the view's own again
    assert len(seen) == 1
    torch.testing.assert_close(scored.logits, records.box_head.logits)


def test_teacher_part_runs_the_rpn_that_a_loss_asks_for(tool, make_config, monkeypatch):
    config_file = make_config(["GID"], family="faster")
    subjects, tasks = build_gid(tool, config_file, PREDICTIONS="rpn")
    ran = []
    head = subjects.plain.model.proposal_generator.rpn_head
    head.register_forward_hook(lambda *_: ran.append("rpn"))
    seen = box_head_boxes(monkeypatch, subjects.plain.model)
    tasks["teacher part, plain"]()
    assert ran == ["rpn"] and seen == []
    assert list(terms(tasks["GID alone"])) == GID_TERMS


def test_features_alone_run_no_head_of_the_teacher(tool, make_config):
    subjects, tasks = build_gid(
        tool,
        make_config(["GID"]),
        GI_MODE="gt",
        RESPONSE_CLS_WEIGHT="0.0",
        RESPONSE_REG_WEIGHT="0.0",
    )
    subjects.plain.model.head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    tasks["teacher part, plain"]()


@pytest.mark.parametrize(
    "family, settings, culprit",
    [
        ("faster", {}, "PREDICTIONS is 'box_head', expected 'dense'"),
        ("retinanet", {"GI_MODE": "neg"}, "GI_MODE is 'neg', expected 'all'"),
        ("retinanet", {"FEATURE_MODE": "norm"}, "FEATURE_MODE is 'norm', expected 'L2'"),
        ("retinanet", {"RELATION_WEIGHT": "0.0"}, "RELATION_WEIGHT is 0.0, expected more than 0"),
    ],
)
def test_modes_that_plain_gid_lacks(tool, make_config, family, settings, culprit):
    config_file = make_config(["GID"], family=family)
    with pytest.raises(SystemExit, match=f"--against-naive.*MODEL.DISTILLER.GID.{culprit}"):
        build_gid(tool, config_file, against_naive=True, **settings)


def test_teacher_without_its_weights(tool, make_config):
    opts = ["MODEL.DISTILLER.TEACHER_WEIGHTS", "missing.pth"]
    with pytest.raises(SystemExit, match="missing.pth.*random weights.*TEACHER_WEIGHTS"):
        run(tool, make_config(["PKD"]), *opts)
