"""Finding, loading and checking teachers: law 3, and every place that one may come from."""

import os

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import instantiate
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from torch import nn

from distill_d2.engine import load_config
from distill_d2.teacher import (
    Teacher,
    build_teacher,
    load_teacher,
    load_teacher_weights,
)
from distill_d2.testing.tiny import save_teacher, tiny_config

ZOO_NAME = "COCO-Detection/retinanet_R_50_FPN_1x"
LSJ_NAME = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
SYNC_BN = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
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


# Where it comes from.


def same_weights(teacher, path):
    saved = torch.load(path, weights_only=True)["model"]
    own = teacher.model.state_dict()
    return set(saved) == set(own) and all(torch.equal(own[name], saved[name]) for name in saved)


def config_naming(folder, teacher, **keys):
    """A student's yaml that names this teacher config."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"    {key}: {value}" for key, value in {"MODEL_LOAD_OFFICIAL": False, **keys}.items()]
    text = f"MODEL:\n  DEVICE: cpu\n  DISTILLER:\n    MODEL_DISTILLER_CONFIG: {teacher}\n"
    (folder / "student.yaml").write_text(text + "\n".join(lines) + "\n")
    return str(folder / "student.yaml")


@pytest.mark.parametrize(
    "folder, working_folder, named",
    [
        ("a", ".", "{folder}/teacher.yaml"),
        ("configs/teachers", ".", "teachers/teacher.yaml"),  # beside the config that names it
        ("work", "work", "teacher.yaml"),
    ],
)
def test_where_the_yaml_is(tmp_path, monkeypatch, folder, working_folder, named):
    save_teacher(tiny_config(), tmp_path / folder)
    monkeypatch.chdir(tmp_path / working_folder)
    cfg = load_config(config_naming(tmp_path / "configs", named.format(folder=tmp_path / folder)))
    assert same_weights(build_teacher(cfg), tmp_path / folder / "teacher.pth")


@pytest.mark.parametrize("working_folder, weights", [(".", ""), ("other", "moved.pth")])
def test_where_the_weights_are(tmp_path, monkeypatch, working_folder, weights):
    """Beside the yaml, or in the current folder."""
    cfg, path = tiny_config(), save_teacher(tiny_config(), tmp_path / "teachers")
    cfg.MODEL.WEIGHTS = "teacher.pth"
    (tmp_path / "teachers/teacher.yaml").write_text(cfg.dump())
    file = tmp_path / "teachers/teacher.pth"
    (tmp_path / "other").mkdir()
    if weights:
        file = file.rename(tmp_path / "other" / weights)
    monkeypatch.chdir(tmp_path / working_folder)
    assert same_weights(load_teacher(path, official=False, weights=weights), file)


def test_weights_override(tmp_path):
    path = save_teacher(tiny_config(), tmp_path / "a")
    save_teacher(tiny_config(), tmp_path / "b")
    opts = ["MODEL.DISTILLER.TEACHER_WEIGHTS", str(tmp_path / "b/teacher.pth")]
    teacher = build_teacher(load_config(config_naming(tmp_path, path), opts))
    assert same_weights(teacher, tmp_path / "b/teacher.pth")


def test_allow_list_of_the_config(tmp_path):
    path = save_teacher(tiny_config(), tmp_path)
    saved = torch.load(tmp_path / "teacher.pth", weights_only=True)
    saved["model"].pop(BIAS)
    torch.save(saved, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=BIAS):
        build_teacher(load_config(config_naming(tmp_path, path)))
    build_teacher(load_config(config_naming(tmp_path, path, TEACHER_ALLOW_MISSING="['cls_score']")))


@pytest.mark.parametrize(
    "name, weights, error, message",
    [
        ("none.yaml", "", FileNotFoundError, "config '.*none.yaml' does not exist"),
        ("bare.yaml", "", ValueError, "bare.yaml' names no weights; set MODEL.WEIGHTS there"),
        ("bare.py", "", ValueError, "bare.py' names no weights; .*train.init_checkpoint"),
        ("bare.yaml", "none.pth", FileNotFoundError, "'none.pth' do not exist .*TEACHER_WEIGHTS"),
        ("teacher.yaml", "", ValueError, "cannot read the checkpoint '.*teacher.pth'"),
        # Weights of other detectors.
        ("bare.yaml", "faster/teacher.pth", ValueError, "missing in the file: head.cls_subnet"),
        ("bare.yaml", "wide/teacher.pth", ValueError, r"shape .*conv1.weight \(16, 3, 7, 7\) \(8, 3,"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, name, weights, error, message):
    save_teacher(tiny_config("faster"), tmp_path / "faster")
    save_teacher(tiny_config(width=16), tmp_path / "wide")
    save_teacher(tiny_config(), tmp_path)
    (tmp_path / "bare.yaml").write_text(tiny_config().dump())
    (tmp_path / "bare.py").write_text(LAZY.format(weights=""))
    truncated = (tmp_path / "teacher.pth").read_bytes()[:5000]
    (tmp_path / "teacher.pth").write_bytes(truncated)
    weights = str(tmp_path / weights) if "/" in weights else weights
    with pytest.raises(error, match=message):
        load_teacher(str(tmp_path / name), official=False, weights=weights)


# Of detectron2's model zoo.


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.yaml", "'none.yaml': none.yaml not available .*MODEL_LOAD_OFFICIAL"),
        ("COCO-Detection/fcos_R_50_FPN_1x.py", "Pretrained model for .*fcos.* is not available"),
    ],
)
def test_not_in_the_zoo(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_teacher(name)


@pytest.mark.parametrize("name", [f"{ZOO_NAME}.yaml", f"{ZOO_NAME}.py", LSJ_NAME])
def test_zoo(tmp_path, monkeypatch, name):
    """Those of new_baselines have synchronized batch norms."""
    asked, path = [], str(tmp_path / "model_final.pth")
    monkeypatch.setattr(
        detectron2_zoo.model_zoo, "get_checkpoint_url", lambda name: asked.append(name) or path
    )
    cfg = detectron2_zoo.get_config(name)
    if name.endswith("yaml"):
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg) if name.endswith("yaml") else instantiate(cfg.model)
    torch.save({"model": model.state_dict()}, path)
    teacher = load_teacher(name)
    assert asked == [name] and same_weights(teacher, path)
    os.unlink(path)  # 140 MB
    norms = sum(isinstance(module, SYNC_BN) for module in teacher.model.modules())
    assert bool(norms) is (name == LSJ_NAME)
    assert teacher.input_format == "BGR" and teacher.model.pixel_std.flatten().tolist() == [1.0] * 3
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


# In a LazyConfig.

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


@pytest.mark.parametrize("other_weights", [False, True])
def test_lazy_config(tmp_path, other_weights):
    save_teacher(tiny_config(width=16), tmp_path)
    save_teacher(tiny_config(width=16), tmp_path / "other")
    (tmp_path / "lazy.py").write_text(LAZY.format(weights="teacher.pth"))
    weights = str(tmp_path / "other/teacher.pth") if other_weights else ""
    teacher = load_teacher(str(tmp_path / "lazy.py"), official=False, weights=weights)
    assert same_weights(teacher, weights or tmp_path / "teacher.pth")
    assert teacher.input_format == "RGB"


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
