"""The Distiller itself: laws 2, 4, 6, 7 and 9 of the design, and its use without our trainer."""

import copy
from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill_d2.losses import DISTILL_LOSS_REGISTRY, DistillLoss
from distill_d2.testing.tiny import distiller_config, save_teacher, tiny_batch, tiny_config


def build(tmp_path, student="retinanet", teacher="retinanet", types=("PKD",), **teacher_options):
    teacher_cfg = tiny_config(teacher, **{"width": 16, **teacher_options})
    cfg = distiller_config(tiny_config(student), save_teacher(teacher_cfg, tmp_path), types)
    return build_model(cfg)


def step(model, batch):
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


PAIRS = [("retinanet", "retinanet"), ("faster", "faster"), ("mask", "mask"), ("retinanet", "mask")]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_trains_every_pair(tmp_path, student, teacher):
    model = build(tmp_path, student, teacher, types=("PKD", "FeatureMimic"))
    losses = step(model, tiny_batch(masks=student == "mask"))
    assert {"loss_pkd", "loss_feature_mimic"} < set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)


def test_teacher_is_invisible_and_frozen(tmp_path):
    model = build(tmp_path, types=("FeatureMimic",))
    teacher = model.teacher.model
    owned = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not owned & {id(t) for t in [*teacher.parameters(), *teacher.buffers()]}
    assert set(model.state_dict()) == set(model.student.state_dict())
    assert len(list(model.modules())) == len(set(model.modules()) - set(teacher.modules()))

    model.train()
    step(model, tiny_batch())  # prepares the teacher
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, tiny_batch())
    optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_teacher_moves_with_the_model(tmp_path):
    model = build(tmp_path).to(torch.float64)
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.float64}


class _Dense(DistillLoss):
    NODE = "DENSE_TEST"

    def bind(self, student, teacher):
        student.require("dense")
        teacher.require("dense")

    def forward(self, student, teacher, batch):
        distance = (student.dense().logits - teacher.dense().logits).pow(2).mean()
        return {"loss_dense": distance}


@pytest.fixture
def dense_loss():
    DISTILL_LOSS_REGISTRY._do_register("Dense", _Dense)
    yield
    DISTILL_LOSS_REGISTRY._obj_map.pop("Dense")


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_teacher_head_runs_only_when_asked(tmp_path, dense_loss):
    features_only = build(tmp_path / "a", types=("PKD",))
    heads = count_calls(features_only.teacher.model.head)
    step(features_only, tiny_batch())
    assert len(heads) == 0

    with_head = build(tmp_path / "b", types=("PKD", "Dense"))
    backbones = count_calls(with_head.teacher.model.backbone)
    heads = count_calls(with_head.teacher.model.head)
    step(with_head, tiny_batch())
    assert (len(backbones), len(heads)) == (1, 1)


def test_no_teacher_pass_while_all_losses_are_off(tmp_path):
    model = build(tmp_path, types=("PKD", "FeatureMimic"), channels=24)
    for name, change in {"PKD": {"start_iter": 5}, "FeatureMimic": {"weight": 0.0}}.items():
        model.losses[name].settings = replace(model.losses[name].settings, **change)
    backbones = count_calls(model.teacher.model.backbone)
    losses = step(model, tiny_batch())
    assert not backbones
    assert losses["loss_pkd"] == 0 and losses["loss_feature_mimic"] == 0
    # DDP needs a gradient for each adapter in each step.
    assert all(p.grad is not None for p in model.losses.parameters())


@pytest.mark.parametrize("teacher_format", ["BGR", "RGB"])
def test_teacher_sees_the_same_pixels_in_its_own_way(tmp_path, teacher_format):
    teacher_cfg = tiny_config(width=16)
    teacher_cfg.INPUT.FORMAT = teacher_format
    teacher_cfg.MODEL.PIXEL_MEAN, teacher_cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    cfg = distiller_config(tiny_config(), save_teacher(teacher_cfg, tmp_path))
    model, seen = build_model(cfg), []
    model.teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = tiny_batch()  # 48x80 and 64x56
    step(model, batch)

    expected = torch.zeros(2, 3, 64, 80)
    for padded, item in zip(expected, batch):
        for channel in range(3):
            source = channel if teacher_format == "BGR" else 2 - channel
            plane = item["image"][source].float()
            padded[channel, : plane.shape[0], : plane.shape[1]] = (plane - (channel + 1)) / (channel + 4)
    torch.testing.assert_close(seen[0].contiguous(), expected)


def test_common_padding_of_different_divisibilities(tmp_path):
    model, sizes = build(tmp_path, teacher="faster"), {"student": [], "teacher": []}
    assert (model.student.backbone.size_divisibility, model.teacher.padding[0]) == (16, 32)
    for name, detector in (("student", model.student), ("teacher", model.teacher.model)):
        hook = lambda _, inputs, name=name: sizes[name].append(tuple(inputs[0].shape[-2:]))  # noqa: E731
        detector.backbone.bottom_up.register_forward_pre_hook(hook)
    step(model, tiny_batch())  # 80 is a multiple of 16, not of 32
    assert sizes["student"] == sizes["teacher"] == [(64, 96)]
    sizes["student"].clear()
    model.eval()
    with torch.no_grad():
        model(tiny_batch())
    assert sizes["student"] == [(64, 80)]  # evaluation is the plain student's


def test_student_equal_to_teacher_gives_zero(tmp_path):
    detector = tiny_config()
    detector.MODEL.SMALL_RESNET.NORM = "FrozenBN"  # BN in training differs from BN in evaluation
    cfg = distiller_config(detector, save_teacher(detector, tmp_path), ("PKD", "FeatureMimic"))
    model = build_model(cfg)
    model.student.load_state_dict(model.teacher.model.state_dict())
    losses = step(model.train(), tiny_batch())
    assert losses["loss_pkd"] < 1e-6 and losses["loss_feature_mimic"] < 1e-8


def test_losses_are_float32_under_autocast_and_do_not_synchronise(tmp_path, monkeypatch):
    model, seen = build(tmp_path, types=("PKD", "FeatureMimic")), []
    for loss in model.losses.values():
        forward = loss.forward

        def spied(student, teacher, batch, forward=forward):
            seen.extend([*student.features.values(), *teacher.features.values()])
            with monkeypatch.context() as patch:
                for name in ("item", "cpu", "tolist", "numpy", "nonzero"):
                    patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
                terms = forward(student, teacher, batch)
            seen.extend(terms.values())
            return terms

        loss.forward = spied
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage(0):
        sum(model(tiny_batch()).values()).backward()
    assert len(seen) == 14 and {tensor.dtype for tensor in seen} == {torch.float32}


@pytest.mark.parametrize("family", ["retinanet", "faster", "mask"])
def test_images_without_objects_are_finite(tmp_path, family):
    model = build(tmp_path, family, family, types=("PKD", "FeatureMimic"))
    losses = step(model, tiny_batch(objects=0))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_state_dict_is_the_students_with_adapters_apart(tmp_path):
    model = build(tmp_path, types=("FeatureMimic",), channels=24)
    state = model.state_dict()
    own = [name for name in state if name.startswith("distiller.")]
    assert own == [
        f"distiller.FeatureMimic.pairs.adapters.p{level}.{kind}"
        for level in (2, 3, 4)
        for kind in ("weight", "bias")
    ]
    assert set(state) - set(own) == set(model.student.state_dict())

    other = build(tmp_path / "other", types=("FeatureMimic",), channels=24)
    other.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: state[name] for name in own})


def test_evaluation_is_the_students(tmp_path):
    model = build(tmp_path).eval()
    backbones = count_calls(model.teacher.model.backbone)
    with torch.no_grad():
        ours, plain = model(tiny_batch()), model.student(tiny_batch())
    assert torch.equal(ours[0]["instances"].scores, plain[0]["instances"].scores)
    assert not backbones


def test_nothing_is_remembered_after_a_step(tmp_path):
    model = build(tmp_path)
    step(model, tiny_batch())
    for view in (model.student_view, model.teacher.view):
        assert not view.taps.has("backbone") and not view._of_step


def test_task_loss_weight(tmp_path):
    model = build(tmp_path)
    torch.manual_seed(0)
    plain = step(model, tiny_batch())
    model.task_loss_weight = 0.5
    model.student.loss_normalizer = 100
    torch.manual_seed(0)
    halved = step(model, tiny_batch())
    torch.testing.assert_close(halved["loss_cls"], plain["loss_cls"] * 0.5)
    torch.testing.assert_close(halved["loss_pkd"], plain["loss_pkd"])


# Distillation alone: TASK_LOSS_WEIGHT 0.

ICD = "InstanceConditionalDistillation"
SMALL_ICD = ["INS.HIDDEN_DIM", 16, "INS.ATT_HEADS", 4]
GID_ON_FEATURES = ["GID.GI_MODE", "gt", "GID.RESPONSE_CLS_WEIGHT", 0.0, "GID.RESPONSE_REG_WEIGHT", 0.0]


def build_alone(tmp_path, types, family="retinanet", opts=()):
    """With these keys below MODEL.DISTILLER, in training mode."""
    teacher = save_teacher(tiny_config(family, width=16), tmp_path)
    cfg = distiller_config(tiny_config(family), teacher, types)
    cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT = 0.0
    keys = [f"MODEL.DISTILLER.{key}" for key in opts[::2]]
    cfg.merge_from_list([item for pair in zip(keys, opts[1::2]) for item in pair])
    return build_model(cfg).train()


def own_terms(losses):
    return {name for name in losses if name.startswith(("loss_cls", "loss_box", "loss_rpn"))}


@pytest.mark.parametrize(
    "family, types, opts, heads_run",
    [
        ("retinanet", ["PKD"], ["PKD.IN_FEATURES", ["res2"]], False),
        ("retinanet", ["PKD", "FeatureMimic"], [], False),
        ("retinanet", ["GID"], GID_ON_FEATURES, False),
        ("faster", ["DeFeat"], [], False),
        ("retinanet", ["GID"], [], True),
        ("retinanet", ["FGFI"], [], True),
        ("faster", ["HeadKD"], [], True),
        ("faster", ["PKD", "HeadKD"], ["PKD.IN_FEATURES", ["res2"]], True),
        ("faster", ["DeFeat"], ["DEFEAT.HEAD_CLS_W", 1.0], True),
    ],
)
def test_student_runs_as_far_as_losses_read_it(tmp_path, family, types, opts, heads_run):
    """Its own losses, where they are computed, count nothing."""
    model = build_alone(tmp_path, types, family, opts)
    student = model.student
    head = student.head if family == "retinanet" else student.roi_heads.box_head
    heads = count_calls(head)
    losses = step(model, tiny_batch())
    assert model.features_only is not heads_run and bool(heads) is heads_run
    assert bool(own_terms(losses)) is heads_run and all(losses[name] == 0 for name in own_terms(losses))
    assert any(loss > 0 for loss in losses.values())


def test_student_runs_whole_with_any_weight(tmp_path):
    model = build(tmp_path)
    assert not model.features_only
    assert build_alone(tmp_path, ["PKD"]).features_only


def test_predictions_are_whole(tmp_path):
    model = build_alone(tmp_path, ["PKD"], opts=["PKD.IN_FEATURES", ["res2"]])
    step(model, tiny_batch())
    model.eval()
    with torch.no_grad():
        ours, plain = model(tiny_batch()), model.student(tiny_batch())
    assert torch.equal(ours[0]["instances"].scores, plain[0]["instances"].scores)


def test_losses_on_features_are_those_of_a_whole_step(tmp_path):
    """The same features, whether the rest of both detectors is computed or not."""
    model = build_alone(tmp_path, ["PKD", "FeatureMimic"], opts=["PKD.IN_FEATURES", ["res3", "res2"]])
    alone = step(model, tiny_batch())
    model.features_only = False
    model.student_view.require("dense")
    model.teacher.view.require("dense")
    whole = step(model, tiny_batch())
    for name in ("loss_pkd", "loss_feature_mimic"):
        torch.testing.assert_close(alone[name], whole[name])


ALL = [
    ("retinanet", ["PKD"], ["PKD.IN_FEATURES", ["res2", "res3"]]),
    ("retinanet", ["PKD"], ["PKD.IN_FEATURES", ["p3"]]),
    ("faster", ["FeatureMimic"], []),
    ("faster", ["DeFeat"], ["DEFEAT.BB_FEATURES", ["res3"], "DEFEAT.HINT_BB_W", 1.0]),
    ("retinanet", ["FGFI"], []),
    ("retinanet", ["GID"], GID_ON_FEATURES),
    ("retinanet", ["GID"], []),
    ("faster", ["HeadKD"], []),
    ("retinanet", [ICD], [*SMALL_ICD, "BYPASS_DISTILL", 0]),
    ("retinanet", [ICD], SMALL_ICD),
    ("retinanet", [ICD], [*SMALL_ICD, "BYPASS_DISTILL", 0, "INS_ATT_MIMIC.WEIGHT_VALUE", 0.0]),
    ("retinanet", ["GHND"], ["GHND.IN_FEATURES", ["res2"], "GHND.START_ITER", 1]),
    ("retinanet", ["PKD", "GHND"], ["GHND.IN_FEATURES", ["res4"], "GHND.START_ITER", 1]),
]


@pytest.mark.parametrize("objects", [2, 0])
@pytest.mark.parametrize("family, types, opts", ALL)
def test_everything_that_is_trained_gets_a_gradient(tmp_path, family, types, opts, objects):
    """As DDP wants it in each step, without find_unused_parameters; and the optimizer trains no more."""
    model = build_alone(tmp_path, types, family, opts)
    losses = step(model, tiny_batch(objects=objects))
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]


def test_a_loss_that_is_off_gives_a_zero(tmp_path):
    opts = ["PKD.IN_FEATURES", ["res2"], "PKD.START_ITER", 5]
    model = build_alone(tmp_path, ["PKD"], opts=opts)
    backbones = count_calls(model.teacher.model.backbone.bottom_up.stem)
    losses = step(model, tiny_batch())
    assert losses and sum(losses.values()) == 0 and not backbones
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_one_of_two_losses_is_off(tmp_path):
    opts = ["PKD.IN_FEATURES", ["res3"], "PKD.START_ITER", 5, "FEATURE_MIMIC.IN_FEATURES", ["res2"]]
    model = build_alone(tmp_path, ["PKD", "FeatureMimic"], opts=opts)
    losses = step(model, tiny_batch())
    assert losses["loss_feature_mimic"] > 0
    res3 = list(model.student.backbone.bottom_up.res3.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in res3)
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.any()


def test_no_ground_truth_is_needed(tmp_path):
    model = build_alone(tmp_path, ["PKD"], "faster", ["PKD.IN_FEATURES", ["res2"]])
    losses = step(model, [{"image": item["image"]} for item in tiny_batch()])
    assert losses["loss_pkd"] > 0


def test_features_only_under_autocast(tmp_path):
    """Law 7."""
    model = build_alone(tmp_path, ["GHND"], opts=["GHND.IN_FEATURES", ["res2"]])
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage(0):
        losses = model(tiny_batch())
    assert losses["loss_ghnd_res2"].dtype is torch.float32 and losses["loss_ghnd_res2"] > 0


def test_nothing_of_a_step_on_features_is_remembered(tmp_path):
    model = build_alone(tmp_path, ["PKD"], opts=["PKD.IN_FEATURES", ["res2"]])
    step(model, tiny_batch())
    for view in (model.student_view, model.teacher.view):
        assert not view.taps.recorded and not view._of_step


def test_one_padding_of_a_step_on_features(tmp_path):
    """Law 6, where the backbones do not run to their ends."""
    teacher = save_teacher(tiny_config("faster", width=16), tmp_path)
    cfg = distiller_config(tiny_config(), teacher, ["PKD"])
    cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT = 0.0
    cfg.MODEL.DISTILLER.PKD.IN_FEATURES = ["res2"]
    model, sizes = build_model(cfg).train(), []
    for detector in (model.student, model.teacher.model):
        detector.backbone.bottom_up.register_forward_pre_hook(
            lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:]))
        )
    for size in (64, 128):
        step(model, tiny_batch(size=size))
    assert sizes == [(64, 96)] * 2 + [(128, 160)] * 2


def test_table_and_teacher_line_at_start(tmp_path, caplog):
    with caplog.at_level("INFO"):
        build(tmp_path, types=("PKD",), channels=24)
    assert "1x1 convolution" in caplog.text and "| PKD" in caplog.text
    assert "runs backbone and neck" in caplog.text
    assert "keys loaded from" in caplog.text


def test_colliding_terms_are_an_error(tmp_path):
    model = build(tmp_path)
    model.losses["PKD"].forward = lambda *_: {"loss_cls": torch.zeros((), requires_grad=True)}
    with pytest.raises(ValueError, match="loss_cls"):
        step(model, tiny_batch())


def test_compiled_teacher_cannot_be_tapped_inside(tmp_path):
    cfg = distiller_config(tiny_config(), save_teacher(tiny_config(), tmp_path))
    cfg.MODEL.DISTILLER.TEACHER_COMPILE = True
    cfg.MODEL.DISTILLER.PKD.IN_FEATURES = ["res3"]
    with pytest.raises(ValueError, match="TEACHER_COMPILE is True, but losses read"):
        build_model(cfg)


@pytest.mark.slow
def test_compiled_teacher_gives_the_same_losses(tmp_path):
    cfg = distiller_config(tiny_config(), save_teacher(tiny_config(width=16), tmp_path))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        cfg.MODEL.DISTILLER.TEACHER_COMPILE = compiled
        losses.append(step(build_model(cfg), tiny_batch())["loss_pkd"])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_autocast_of_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_d2.teacher.running.native_bfloat16", lambda device: True)
    cfg = distiller_config(tiny_config(), save_teacher(tiny_config(width=16), tmp_path))
    exact, dtypes = step(build_model(cfg), tiny_batch())["loss_pkd"], set()
    cfg.MODEL.DISTILLER.TEACHER_AUTOCAST = "bfloat16"
    torch.manual_seed(0)
    model = build_model(cfg)
    model.teacher.model.backbone.register_forward_hook(
        lambda _, __, output: dtypes.update(level.dtype for level in output.values())
    )
    rounded = step(model, tiny_batch())["loss_pkd"]
    assert dtypes == {torch.bfloat16} and rounded.dtype is torch.float32
    assert 0 < abs(rounded - exact) / exact < 0.1
