"""distill-d2 convert ssd on networks of a few channels, under the public names."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from distill_d2.projects.ssd.names import name_of

from distill_d2 import cli
from distill_d2.checkpoint import SafeCheckpointer
from distill_d2.engine import load_config

SMALL = ["MODEL.SSD.WIDTH", "0.125", "MODEL.DEVICE", "cpu"]
CONFIGS = {
    "ssd300": "Base-SSD300-VGG16.yaml",
    "teacher": "Base-SSD-VGG16-teacher.yaml",
    "mobilenet": "Base-SSD.yaml",
}


def small_ssd(network):
    return build_model(load_config(CONFIGS[network], SMALL))


def candidates(network):
    """Public names of all kinds."""
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    if network != "mobilenet":
        modules = [f"vgg.{i}" for i in range(35)] + [f"extras.{i}" for i in range(10)] + ["L2Norm"]
        modules += [f"{kind}.{i}" for kind in ("loc", "conf") for i in range(6)]
    else:
        modules = [f"base_net.{b}.{i}" for b in (0, 18) for i in (0, 1)]
        modules += [f"base_net.{b}.conv.{i}" for b in range(1, 18) for i in range(8)]
        modules += [f"extras.{b}.conv.{i}" for b in range(4) for i in range(8)]
        kinds = ("regression_headers", "classification_headers")
        modules += [f"{kind}.{i}.{j}" for kind in kinds for i in range(5) for j in range(4)]
        modules += [f"{kind}.5" for kind in kinds]
    return [f"{module}.{leaf}" for module in modules for leaf in leaves]


def public_state(model, network):
    """The state of a model by public names, the background first; written independently."""
    state, public_names = model.state_dict(), {}
    for public in candidates(network):
        public_names.setdefault(name_of(public), public)
    weights = {public_names[name]: tensor.clone() for name, tensor in state.items()}
    for public, tensor in weights.items():
        last = re.fullmatch(r"(conf\.\d|classification_headers\.(\d\.3|5))\.(weight|bias)", public)
        if last:
            rows = tensor.view(-1, 21, *tensor.shape[1:])
            weights[public] = torch.cat([rows[:, 20:], rows[:, :20]], dim=1).reshape(tensor.shape)
    return weights


def converted(tmp_path, weights, *options, entry=None):
    source, target = tmp_path / "public.pth", tmp_path / "converted.pth"
    torch.save({entry: weights} if entry else weights, source)
    cli.main(["convert", "ssd", str(source), str(target), *options, *SMALL])
    return target


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("entry, prefix", [(None, ""), ("model", "module.")])
def test_conversion_gives_the_same_network(tmp_path, network, entry, prefix):
    model, other = small_ssd(network), small_ssd(network)
    weights = {prefix + name: tensor for name, tensor in public_state(model, network).items()}
    target = converted(tmp_path, weights, "--config-file", CONFIGS[network], entry=entry)
    checkpointer = SafeCheckpointer(other)
    checkpointer.load(str(target))
    assert not checkpointer.incompatible.missing_keys and not checkpointer.incompatible.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_backbone_alone(tmp_path, capsys):
    """The original's, for a teacher with other prior boxes; and VGG16 with reduced layers, which is no more."""
    model = small_ssd("ssd300")
    weights = public_state(model, "ssd300")
    target = converted(tmp_path, weights, "--config-file", CONFIGS["teacher"], "--backbone")
    loaded = torch.load(target, weights_only=True)["model"]
    backbone = ("backbone.features", "backbone.extras")
    assert set(loaded) == {name for name in model.state_dict() if name.startswith(backbone)}
    assert "dropped 25" in capsys.readouterr().out
    vgg = {name[len("vgg.") :]: tensor for name, tensor in weights.items() if name.startswith("vgg.")}
    target = converted(tmp_path, vgg, "--config-file", CONFIGS["ssd300"], "--backbone")
    loaded = torch.load(target, weights_only=True)["model"]
    assert len(loaded) == 30 and torch.equal(loaded["backbone.features.33.bias"], vgg["33.bias"])


@pytest.mark.parametrize(
    "remove, add, message",
    [
        ((), ("surprise",), "1 of INPUT's 72 keys do not belong to a known SSD: surprise"),
        (("vgg.0.weight",), (), "1 missing: backbone.features.0.weight"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, remove, add, message):
    weights = public_state(small_ssd("ssd300"), "ssd300")
    weights = {name: tensor for name, tensor in weights.items() if name not in remove}
    weights.update(dict.fromkeys(add, torch.zeros(1)))
    with pytest.raises(SystemExit, match=f"(?s)distill-d2 convert: .*{message}"):
        converted(tmp_path, weights, "--config-file", CONFIGS["ssd300"])
    assert not (tmp_path / "converted.pth").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--to", "detectron2", "--config-file", "Base-SSD.yaml"],
            "--to is an option of adet, not of ssd",
        ),
        ([], "ssd needs --config-file, the config of the detector that INPUT is for"),
    ],
)
def test_options_are_those_of_the_source(options, message):
    with pytest.raises(SystemExit, match=f"distill-d2 convert: {message}"):
        cli.main(["convert", "ssd", "a.pth", "b.pth", *options])
