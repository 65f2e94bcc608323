"""Finding, loading and checking teachers: law 3, and every place that one may come from."""

import os

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

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
from distill_d2.testing.tiny import save_teacher, tiny_batch, tiny_config

ZOO_NAME = "COCO-Detection/retinanet_R_50_FPN_1x"
BIAS = "head.cls_score.bias"  # (9,)


# Law 3: a teacher is whole.


@pytest.fixture
def fits(tmp_path):
    """Loads a changed checkpoint of a tiny RetinaNet into another one: fits(edit, allow)."""

    def load(edit, allow=()):
        cfg = tiny_config()
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


def test_all_problems_are_listed_at_once_and_long_lists_are_cut(fits):
    def edit(state):
        remove("head.bbox_pred.bias")(state)
        put(BIAS, 5)(state)
        for index in range(13):
            put(f"extra.{index}", 1)(state)

    with pytest.raises(
        ValueError, match=r"13 keys not in the model: extra.0, .*extra.9, and 3 more\n"
    ) as error:
        fits(edit)
    assert sum(text.startswith("  1 keys") for text in str(error.value).splitlines()) == 2


@pytest.mark.parametrize("edit", [edit for edit, _ in PROBLEMS.values()], ids=list(PROBLEMS))
def test_allow_list_excuses(fits, edit):
    count, _, state = fits(edit, allow=[r"cls_score\.bias$", "^head.extra"])
    assert count in (len(state), len(state) - 1)
    with pytest.raises(
        ValueError, match="missing in the file: backbone.bottom_up.stem.conv1.norm.running_var"
    ):
        fits(remove("backbone.bottom_up.stem.conv1.norm.running_var"), allow=[r"cls_score\.bias$"])
    with pytest.raises(ValueError, match=r"TEACHER_ALLOW_MISSING: '\(' is not a valid regular expr"):
        fits(edit, allow=["("])


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


@pytest.mark.parametrize(
    "saved, line",
    [
        ({"family": "faster"}, "missing in the file: head.cls_subnet"),
        ({"width": 16}, r"of another shape .*stem.conv1.weight \(16, 3, 7, 7\) \(8, 3, 7, 7\)"),
    ],
)
def test_weights_of_another_detector(tmp_path, saved, line):
    save_teacher(tiny_config(**saved), tmp_path)
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


# Teachers of detectron2's new_baselines: trained with large-scale jitter (LSJ) and synchronized
# batch normalization, in LazyConfigs.

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


def test_channel_order_and_normalization_of_the_yaml(tmp_path):
    cfg = tiny_config()
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [2.0, 4.0, 8.0]
    teacher, seen = load_teacher(save_teacher(cfg, tmp_path), official=False), []
    assert teacher.input_format == "RGB"
    teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.observe([torch.full((3, 48, 64), 9.0)], (64, 80))
    assert seen[0][0, :, 0, 0].tolist() == [4.0, 1.75, 0.75]
    assert seen[0].shape == (1, 3, 64, 80)
    assert (seen[0][:, :, 48:] == 0).all() and (seen[0][:, :, :, 64:] == 0).all()


def test_emulated_bfloat16_is_refused(tmp_path, monkeypatch):
    path, native = save_teacher(tiny_config(), tmp_path), "distill_d2.teacher.running.native_bfloat16"
    monkeypatch.setattr(native, lambda device: False)
    with pytest.raises(ValueError, match="'bfloat16', which this cpu device only emulates"):
        load_teacher(path, official=False, autocast="bfloat16")
    teacher = Teacher(build_model(tiny_config()), autocast="bfloat16")
    with pytest.raises(ValueError, match="only emulates"):  # on the device to which it was moved
        teacher.observe([torch.zeros(3, 64, 64)], (64, 64))
    monkeypatch.setattr(native, lambda device: True)
    load_teacher(path, official=False, autocast="bfloat16")
