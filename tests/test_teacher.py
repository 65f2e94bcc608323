"""Building, loading and checking teachers: law 3 of the design, and every place one may come from."""

import os

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import inference_on_dataset
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn
from views.recorded import detector

from distill_d2 import teacher as module
from distill_d2.distiller import Distiller
from distill_d2.engine.setup import load_config
from distill_d2.losses.icd.loss import InstanceConditionalDistillation
from distill_d2.teacher import (
    Teacher,
    build_teacher,
    load_teacher,
    load_teacher_weights,
    untrained_teacher,
)
from distill_d2.testing.tiny import save_teacher, tiny_batch, tiny_config, tiny_detector

ZOO_NAME = "COCO-Detection/retinanet_R_50_FPN_1x"
BIAS = "head.cls_score.bias"  # (9,)


# Law 3: a teacher is whole.


@pytest.fixture
def fits(tmp_path):
    """Loads a changed checkpoint of a tiny RetinaNet into another one: fits(edit, allow)."""

    def load(edit, allow=(), norm="BN"):
        cfg = tiny_config()
        cfg.MODEL.SMALL_RESNET.NORM = norm
        state = build_model(cfg).state_dict()
        edit(state)
        torch.save({"model": state}, tmp_path / "weights.pth")
        model = build_model(cfg)
        return load_teacher_weights(model, str(tmp_path / "weights.pth"), allow), model, state

    return load


def remove(name):
    return lambda state: state.pop(name)


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


PROBLEMS = {
    "missing": (remove(BIAS), f"  1 keys missing in the file: {BIAS}"),
    "unexpected": (put("head.extra", 1), "  1 keys not in the model: head.extra"),
    "mis-shaped": (put(BIAS, 5), f"  1 keys of another shape (file, model): {BIAS} (5,) (9,)"),
}


def test_a_whole_teacher(fits):
    count, model, state = fits(lambda state: None)
    assert count == len(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("edit, line", PROBLEMS.values(), ids=list(PROBLEMS))
def test_each_problem_stops_and_is_listed(fits, edit, line):
    with pytest.raises(ValueError) as error:
        fits(edit)
    problems = [text for text in str(error.value).splitlines() if text.startswith("  ")]
    assert problems == [line]
    assert "weights.pth' do not fit its config (RetinaNet)" in str(error.value)
    assert "MODEL.DISTILLER.TEACHER_ALLOW_MISSING" in str(error.value)


def test_all_problems_are_listed_at_once(fits):
    def edit(state):
        remove("head.bbox_pred.bias")(state)
        put("head.extra", 1)(state)
        put(BIAS, 5)(state)

    with pytest.raises(ValueError) as error:
        fits(edit)
    assert sum(text.startswith("  1 keys") for text in str(error.value).splitlines()) == 3


def test_long_lists_are_cut(fits):
    def edit(state):
        for index in range(13):
            put(f"extra.{index}", 1)(state)

    with pytest.raises(ValueError, match=r"13 keys not in the model: extra.0, .*extra.9, and 3 more\n"):
        fits(edit)


@pytest.mark.parametrize("edit", [edit for edit, _ in PROBLEMS.values()], ids=list(PROBLEMS))
def test_allow_list_excuses(fits, edit):
    count, _, state = fits(edit, allow=[r"cls_score\.bias$", "^head.extra"])
    assert count in (len(state), len(state) - 1)


def test_allow_list_excuses_nothing_else(fits):
    with pytest.raises(ValueError, match="missing in the file: head.bbox_pred.bias"):
        fits(remove("head.bbox_pred.bias"), allow=[r"cls_score\.bias$"])


def test_keys_that_change_nothing_are_neutral(fits):
    def edit(state):
        put("pixel_mean", 3, 1, 1)(state)
        put("pixel_std", 3, 1, 1)(state)
        put("anchor_generator.cell_anchors.0", 3, 4)(state)
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            remove(name)(state)

    _, model, _ = fits(edit)
    assert model.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    assert model.pixel_std.flatten().tolist() == [58.0] * 3


def test_statistics_of_batch_norm_are_not_neutral(fits):
    with pytest.raises(ValueError, match="backbone.bottom_up.stem.conv1.norm.running_var"):
        fits(remove("backbone.bottom_up.stem.conv1.norm.running_var"), norm="BN")


def test_weights_of_another_architecture(tmp_path):
    save_teacher(tiny_config("faster"), tmp_path)
    with pytest.raises(ValueError, match="missing in the file: head.cls_subnet"):
        load_teacher_weights(build_model(tiny_config()), str(tmp_path / "teacher.pth"))


def test_weights_of_another_width(tmp_path):
    save_teacher(tiny_config(width=16), tmp_path)
    line = r"of another shape .*stem.conv1.weight \(16, 3, 7, 7\) \(8, 3, 7, 7\)"
    with pytest.raises(ValueError, match=line):
        load_teacher_weights(build_model(tiny_config()), str(tmp_path / "teacher.pth"))


# Where it comes from.


def same_weights(teacher, path):
    saved = torch.load(path, weights_only=True)["model"]
    ours = teacher.model.state_dict()
    return set(saved) == set(ours) and all(torch.equal(ours[name], saved[name]) for name in saved)


def config_naming(folder, teacher, **keys):
    """A student's yaml that names this teacher config."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"    {key}: {value}" for key, value in {"MODEL_LOAD_OFFICIAL": False, **keys}.items()]
    text = f"MODEL:\n  DEVICE: cpu\n  DISTILLER:\n    MODEL_DISTILLER_CONFIG: {teacher}\n"
    (folder / "student.yaml").write_text(text + "\n".join(lines) + "\n")
    return str(folder / "student.yaml")


def test_yaml_by_absolute_path(tmp_path):
    teacher = load_teacher(save_teacher(tiny_config(), tmp_path), official=False)
    assert type(teacher.model).__name__ == "RetinaNet"
    assert same_weights(teacher, tmp_path / "teacher.pth")


def test_yaml_beside_the_config_that_names_it(tmp_path):
    save_teacher(tiny_config(), tmp_path / "configs" / "teachers")
    cfg = load_config(config_naming(tmp_path / "configs", "teachers/teacher.yaml"))
    assert same_weights(build_teacher(cfg), tmp_path / "configs/teachers/teacher.pth")


def test_yaml_in_the_current_folder(tmp_path, monkeypatch):
    save_teacher(tiny_config(), tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    cfg = load_config(config_naming(tmp_path / "configs", "teacher.yaml"))
    assert same_weights(build_teacher(cfg), tmp_path / "work/teacher.pth")


def test_weights_beside_the_yaml(tmp_path, monkeypatch):
    path = save_teacher(tiny_config(), tmp_path / "teachers")
    cfg = tiny_config()
    cfg.MODEL.WEIGHTS = "teacher.pth"
    (tmp_path / "teachers" / "teacher.yaml").write_text(cfg.dump())
    monkeypatch.chdir(tmp_path)
    assert same_weights(load_teacher(path, official=False), tmp_path / "teachers/teacher.pth")


def test_weights_in_the_current_folder(tmp_path, monkeypatch):
    path = save_teacher(tiny_config(), tmp_path / "teachers")
    (tmp_path / "teachers" / "teacher.pth").rename(tmp_path / "other.pth")
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher(path, official=False, weights="other.pth")
    assert same_weights(teacher, tmp_path / "other.pth")


def test_weights_override(tmp_path):
    path = save_teacher(tiny_config(), tmp_path / "a")
    save_teacher(tiny_config(), tmp_path / "b")
    opts = ["MODEL.DISTILLER.TEACHER_WEIGHTS", str(tmp_path / "b/teacher.pth")]
    teacher = build_teacher(load_config(config_naming(tmp_path, path), opts))
    assert same_weights(teacher, tmp_path / "b/teacher.pth")
    assert not same_weights(teacher, tmp_path / "a/teacher.pth")


def test_allow_list_of_the_config(tmp_path):
    path = save_teacher(tiny_config(), tmp_path)
    saved = torch.load(tmp_path / "teacher.pth", weights_only=True)
    saved["model"].pop(BIAS)
    torch.save(saved, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=BIAS):
        build_teacher(load_config(config_naming(tmp_path, path)))
    build_teacher(load_config(config_naming(tmp_path, path, TEACHER_ALLOW_MISSING="['cls_score']")))


def test_no_weights(tmp_path):
    (tmp_path / "teacher.yaml").write_text(tiny_config().dump())
    with pytest.raises(ValueError, match="teacher.yaml' names no weights; set MODEL.WEIGHTS there"):
        load_teacher(str(tmp_path / "teacher.yaml"), official=False)


def test_weights_that_do_not_exist(tmp_path):
    path = save_teacher(tiny_config(), tmp_path)
    with pytest.raises(FileNotFoundError, match="'none.pth' do not exist .*TEACHER_WEIGHTS"):
        load_teacher(path, official=False, weights="none.pth")


def test_truncated_weights(tmp_path):
    path, weights = save_teacher(tiny_config(), tmp_path), tmp_path / "teacher.pth"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot read the checkpoint '.*teacher.pth'"):
        load_teacher(path, official=False)


def test_config_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="config 'Teachers/none.yaml' does not exist"):
        load_teacher("Teachers/none.yaml", official=False)


def test_unknown_zoo_name():
    with pytest.raises(
        FileNotFoundError, match="'none.yaml': none.yaml not available .*MODEL_LOAD_OFFICIAL"
    ):
        load_teacher("none.yaml")


def test_zoo_config_without_published_weights():
    with pytest.raises(FileNotFoundError, match="Pretrained model for .*fcos.* is not available"):
        load_teacher("COCO-Detection/fcos_R_50_FPN_1x.py")


@pytest.fixture(scope="module")
def zoo_weights(tmp_path_factory):
    """A file that stands for the published one of retinanet_R_50_FPN_1x."""
    path = tmp_path_factory.mktemp("zoo") / "model_final.pth"
    cfg = detectron2_zoo.get_config(f"{ZOO_NAME}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    yield str(path)
    path.unlink()


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_zoo(zoo_weights, monkeypatch, kind):
    asked = []
    monkeypatch.setattr(
        detectron2_zoo.model_zoo, "get_checkpoint_url", lambda name: asked.append(name) or zoo_weights
    )
    teacher = load_teacher(f"{ZOO_NAME}.{kind}")
    assert asked == [f"{ZOO_NAME}.{kind}"]
    assert same_weights(teacher, zoo_weights)
    assert teacher.input_format == "BGR" and teacher.model.num_classes == 80
    assert not any(p.requires_grad for p in teacher.model.parameters())


LAZY = """
from detectron2.config import LazyCall as L
from detectron2.modeling import build_model
from distill_d2.testing.tiny import tiny_config


def build(family, width, input_format):
    cfg = tiny_config(family, width=width)
    cfg.INPUT.FORMAT = input_format
    return build_model(cfg)


model = L(build)(family="retinanet", width=16, input_format="RGB")
train = dict(init_checkpoint={weights!r})
"""


def lazy_teacher(folder, weights="teacher.pth"):
    save_teacher(tiny_config(width=16), folder)
    (folder / "lazy.py").write_text(LAZY.format(weights=weights))
    return str(folder / "lazy.py")


def test_lazy_config(tmp_path):
    teacher = load_teacher(lazy_teacher(tmp_path), official=False)
    assert same_weights(teacher, tmp_path / "teacher.pth")
    assert teacher.input_format == "RGB"


def test_lazy_config_without_weights(tmp_path):
    with pytest.raises(ValueError, match="lazy.py' names no weights; .*train.init_checkpoint"):
        load_teacher(lazy_teacher(tmp_path, weights=""), official=False)


def test_lazy_config_with_other_weights(tmp_path):
    save_teacher(tiny_config(width=16), tmp_path / "other")
    other = str(tmp_path / "other" / "teacher.pth")
    teacher = load_teacher(lazy_teacher(tmp_path), official=False, weights=other)
    assert same_weights(teacher, other)


@torch.no_grad()
def test_lsj_baseline():
    cfg = tiny_config()
    cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
    model, input_format = untrained_teacher(cfg.MODEL.DISTILLER, "cpu")
    assert input_format == "BGR"
    assert model.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    teacher = Teacher(model, input_format=input_format)
    image = torch.rand(3, 64, 64) * 255
    expected = model.backbone(((image - model.pixel_mean) / model.pixel_std)[None])
    with teacher.view.recording():
        teacher.observe([image], (64, 64))
        features = teacher.view.features
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    for name, feature in features.items():
        error = (feature - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5


# Teachers of detectron2's new_baselines: trained with large-scale jitter (LSJ) and synchronised
# batch normalisation, in LazyConfigs.

LSJ_NAME = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"
SYNC_BN = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
LSJ = """
from detectron2 import model_zoo

model = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py").model
model.input_format = "RGB"
model.pixel_mean, model.pixel_std = [120.0, 110.0, 100.0], [58.0, 57.0, 56.0]
train = dict(init_checkpoint={weights!r})
"""


def save_random(model, path):
    """As a trained one: statistics that are not those of the start."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value.copy_(0.5 + torch.rand(value.shape))
    torch.save({"model": model.state_dict()}, path)


def student_of(teacher):
    """A Distiller of a tiny student with ICD; its necks have 16 and 256 channels."""
    loss = InstanceConditionalDistillation(hidden_dim=16, att_heads=4, bypass_distill=0)
    model = Distiller(student=build_model(tiny_config("faster")), teacher=teacher, losses=[loss])
    return model.train()


def losses_of(model, batch):
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


def test_lsj_teacher_of_the_zoo_for_icd(tmp_path, monkeypatch):
    weights = str(tmp_path / "model_final.pth")
    cfg = detectron2_zoo.get_config(LSJ_NAME)
    save_random(instantiate(cfg.model), weights)
    asked = []
    monkeypatch.setattr(
        detectron2_zoo.model_zoo, "get_checkpoint_url", lambda name: asked.append(name) or weights
    )
    teacher = load_teacher(LSJ_NAME, prepare=False)  # so that its norms stay what they are
    assert asked == [LSJ_NAME] and same_weights(teacher, weights)
    norms = [module for module in teacher.model.modules() if isinstance(module, SYNC_BN)]
    assert len(norms) > 100 and not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.input_format == "BGR" and teacher.model.pixel_std.flatten().tolist() == [1.0] * 3

    model = student_of(teacher)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    losses = losses_of(model, tiny_batch())
    assert 8 < losses["loss_icd_value"] < 24
    adapters = model.losses["InstanceConditionalDistillation"].pairs.teacher_adapters
    assert list(adapters) == ["p2", "p3", "p4", "p5", "p6"]
    assert all(adapter.weight.shape == (16, 256, 1, 1) for adapter in adapters.values())
    assert any(adapter.weight.grad.any() for adapter in adapters.values())
    after = teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    os.unlink(weights)  # 250 MB


def test_lsj_teacher_of_a_file_sees_its_own_format(tmp_path):
    """The student's images are BGR with other constants."""
    (tmp_path / "teacher.py").write_text(LSJ.format(weights="teacher.pth"))
    save_random(
        instantiate(LazyConfig.load(str(tmp_path / "teacher.py")).model), tmp_path / "teacher.pth"
    )
    teacher, seen = load_teacher(str(tmp_path / "teacher.py"), official=False), []
    assert teacher.input_format == "RGB"
    model = student_of(teacher)
    teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = tiny_batch()
    losses = losses_of(model, batch)
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_icd_value"] > 0
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([58.0, 57.0, 56.0])
    for padded, item in zip(seen[-1], batch):
        expected = (item["image"].flip(0) - mean[:, None, None]) / std[:, None, None]
        height, width = expected.shape[1:]
        torch.testing.assert_close(padded[:, :height, :width], expected)
        assert not padded[:, height:].any()
    os.unlink(tmp_path / "teacher.pth")


# What it is, once built.


def test_channel_order_and_normalisation_of_the_yaml(tmp_path):
    cfg = tiny_config()
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [2.0, 4.0, 8.0]
    teacher, seen = load_teacher(save_teacher(cfg, tmp_path), official=False), []
    assert teacher.input_format == "RGB"
    teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.observe([torch.full((3, 48, 64), 9.0)], (64, 64))
    assert seen[0][0, :, 0, 0].tolist() == [4.0, 1.75, 0.75]
    assert seen[0].shape == (1, 3, 64, 64) and (seen[0][:, :, 48:] == 0).all()


@pytest.mark.parametrize("family, padding", [("retinanet", (16, 0)), ("faster", (32, 0))])
def test_padding(family, padding):
    assert Teacher(build_model(tiny_config(family))).padding == padding


def test_frozen_and_in_eval():
    teacher = Teacher(build_model(tiny_config()).train())
    assert not any(m.training for m in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not isinstance(teacher, nn.Module)


def test_describe():
    teacher = Teacher(build_model(tiny_config(channels=64)))
    assert teacher.describe() == "RetinaNet, 0.2 M parameters; runs backbone and neck"
    teacher.view.require_level("p3")
    teacher.view.require_level("res2")
    assert teacher.describe().endswith("; runs backbone and neck")
    teacher.view.require("dense")
    assert teacher.describe().endswith("; runs backbone and neck, and its head for dense")


def test_describe_of_one_that_ends_early():
    teacher = Teacher(build_model(tiny_config()))
    for name in ("res3", "res2"):
        teacher.view.require_level(name)
    part = "backbone.bottom_up.res2, backbone.bottom_up.res3"
    assert teacher.describe().endswith(f" M parameters; runs its backbone up to {part}")
    teacher.view.require("dense")
    assert teacher.describe().endswith("; runs backbone and neck, and its head for dense")


# Law 4: a teacher costs only what is asked.

ANCHORS = "anchor_generator"
RPN_PARTS = ["proposal_generator.anchor_generator", "proposal_generator.rpn_head"]
BOX_PARTS = [f"roi_heads.{part}" for part in ("box_head", "box_pooler", "box_predictor")]


def parts_that_run(model):
    """Names of the outermost modules of a model that were called, once for each call."""
    running, called = [], []

    def enter(name):
        if not running:
            called.append(name)
        running.append(name)

    for name, part in model.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: enter(name))
        part.register_forward_hook(lambda *_: running.pop() and None)
    return called


@pytest.mark.parametrize(
    "family, capability, parts",
    [
        *((family, "", []) for family in ("retinanet", "fcos", "faster", "mask")),
        *((family, "dense", [ANCHORS, "head"]) for family in ("retinanet", "fcos")),
        *((family, "rpn", RPN_PARTS) for family in ("faster", "mask")),
        *((family, "box_head", BOX_PARTS) for family in ("faster", "mask")),
        *((family, "score_boxes", BOX_PARTS) for family in ("faster", "mask")),
    ],
)
def test_only_what_a_capability_needs_runs(family, capability, parts):
    teacher = Teacher(tiny_detector(family))
    called = parts_that_run(teacher.model)
    boxes = ([Boxes(torch.tensor([[4.0, 4.0, 40.0, 30.0]]))],)
    with teacher.view.recording():
        if capability:
            teacher.view.require(capability)
        teacher.observe([torch.zeros(3, 64, 64)], (64, 64))
        assert called == ["backbone"]
        if capability:
            getattr(teacher.view, capability)(*(boxes if parts is BOX_PARTS else ()))
    assert called[0] == "backbone" and sorted(called[1:]) == parts


@pytest.mark.parametrize(
    "family, levels, not_run",
    [
        ("retinanet", ["res2"], ["res3", "res4", "fpn_lateral2", "fpn_output4", "head"]),
        ("retinanet", ["res4", "res2"], ["fpn_lateral2", "fpn_output4", "head"]),
        ("fcos", ["res3"], ["res4", "fpn_lateral4", "head"]),
        ("mask", ["res5"], ["fpn_lateral5", "fpn_output2", "top_block", "rpn_head", "roi_heads"]),
    ],
)
def test_it_ends_after_the_last_stage_that_is_read(family, levels, not_run):
    teacher, seen = Teacher(tiny_detector(family)), []
    image = torch.rand(3, 64, 64) * 255
    for name in levels:
        teacher.view.require_level(name)
    for name, part in teacher.model.named_modules():
        part.register_forward_hook(lambda *_, name=name: seen.append(name.rpartition(".")[2]))
    with teacher.view.recording():
        teacher.observe([image], (64, 64))
        found = {name: teacher.view.level(name).clone() for name in levels}
    assert not set(seen) & set(not_run) and "backbone" not in seen and "stem" in seen
    backbone = teacher.model.backbone
    batch = ((image - teacher.model.pixel_mean) / teacher.model.pixel_std)[None]
    with torch.no_grad():
        expected = backbone.bottom_up.stem(batch)
        for stage in ("res2", "res3", "res4", "res5")[: int(max(levels)[-1]) - 1]:
            expected = getattr(backbone.bottom_up, stage)(expected)
            if stage in levels:
                torch.testing.assert_close(found[stage], expected)


@pytest.mark.parametrize(
    "levels, tap, capability",
    [
        (["p2"], "", ""),
        (["res2", "p4"], "", ""),
        (["res2"], "", "dense"),
        (["res2"], "head.cls_score", ""),
        ([], "", ""),
    ],
)
def test_it_does_not_end_early_where_more_is_read(levels, tap, capability):
    """And then hooks that anybody has on the backbone run."""
    teacher, seen = Teacher(tiny_detector()), []
    teacher.model.backbone.register_forward_hook(lambda *args: seen.append(set(args[-1])))
    for name in levels:
        teacher.view.require_level(name)
    if tap:
        teacher.view.require_tap(tap)
    if capability:
        teacher.view.require(capability)
    with teacher.view.recording():
        teacher.observe([torch.zeros(3, 64, 64)], (64, 64))
        assert set(teacher.view.features) == {"p2", "p3", "p4"}
    assert seen == [{"p2", "p3", "p4"}]


def test_it_ends_early_in_every_step():
    teacher = Teacher(tiny_detector())
    teacher.view.require_level("res3")
    for size in (64, 32):
        with teacher.view.recording():
            teacher.observe([torch.zeros(3, size, size)], (size, size))
            assert teacher.view.level("res3").shape[-1] == size // 8
    with torch.no_grad():  # and is a whole detector for others
        assert set(teacher.model.backbone(torch.zeros(1, 3, 64, 64))) == {"p2", "p3", "p4"}


# Its predictions, for its evaluation.


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_predictor(input_format):
    """For images in the channel order of the student."""
    teacher = Teacher(detector(), input_format=input_format)
    items = [{key: item[key] for key in ("image", "height", "width")} for item in tiny_batch()]
    copies = [item["image"].clone() for item in items]
    turned = [{**item, "image": item["image"].flip(0)} for item in items]
    own = items if input_format == "BGR" else turned
    teacher.model.test_score_thresh = 0.0
    with torch.no_grad():
        ours, theirs = teacher.predictor("BGR")(items), teacher.model(own)
        other = teacher.predictor("RGB")(items)
    for a, b, c in zip(ours, theirs, other):
        assert torch.equal(a["instances"].scores, b["instances"].scores) and len(a["instances"]) > 10
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert not torch.equal(a["instances"].scores, c["instances"].scores)
    assert all(torch.equal(item["image"], image) for item, image in zip(items, copies))
    assert teacher.predictor(input_format) is teacher.model


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_evaluating_it_leaves_it_in_eval_mode(input_format):
    """Evaluation puts a model back into the mode in which it was."""
    teacher = Teacher(tiny_detector(), input_format=input_format)
    inference_on_dataset(teacher.predictor("BGR"), [tiny_batch(1)], None)
    assert not any(module.training for module in teacher.model.modules())


def test_autocast_gives_float32_features():
    teacher, seen = Teacher(build_model(tiny_config()), autocast="float16"), []
    teacher.model.backbone.register_forward_hook(lambda *args: seen.append(args[-1]["p2"]))
    with teacher.view.recording():
        teacher.observe([torch.zeros(3, 64, 64)], (64, 64))
        assert teacher.view.features["p2"].dtype == torch.float32
    assert seen[0].dtype == torch.float16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_format": "YUV-BT.601"}, "input format 'YUV-BT.601'; expected 'BGR' or 'RGB'"),
        (
            {"autocast": "int8"},
            r"TEACHER_AUTOCAST is 'int8'; expected one of \['', 'float16', 'bfloat16'\]",
        ),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        Teacher(build_model(tiny_config()), **options)


def test_emulated_bfloat16_is_refused(tmp_path, monkeypatch):
    path = save_teacher(tiny_config(), tmp_path)
    monkeypatch.setattr(module, "native_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="'bfloat16', which this cpu device only emulates"):
        load_teacher(path, official=False, autocast="bfloat16")
    monkeypatch.setattr(module, "native_bfloat16", lambda device: True)
    load_teacher(path, official=False, autocast="bfloat16")


def test_emulated_bfloat16_is_refused_on_the_device_it_is_moved_to(monkeypatch):
    monkeypatch.setattr(module, "native_bfloat16", lambda device: False)
    teacher = Teacher(build_model(tiny_config()), autocast="bfloat16")
    with pytest.raises(ValueError, match="only emulates"):
        teacher.observe([torch.zeros(3, 64, 64)], (64, 64))
