"""The optimizers of torch.optim, by name, with the settings of SOLVER and OPTIMIZER_ARGS."""

import copy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import ViT
from probe_loss import ProbeLoss, solver_of
from runs import Job, assert_equal, rewind
from torch import nn

from distill_d2.engine import build_optimizer, load_config
from distill_d2.engine.optimizer import optimizer_signature
from distill_d2.testing.tiny import tiny_config, use_ghnd

OPTIMIZER, ARGUMENTS = "SOLVER.OPTIMIZER", "SOLVER.OPTIMIZER_ARGS"
NAMES = ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"]


def small_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def built(model=None, **solver):
    """The optimizer of a config with these keys of SOLVER."""
    cfg = tiny_config()
    arguments = solver.pop("OPTIMIZER_ARGS", {})
    cfg.SOLVER.OPTIMIZER_ARGS = CfgNode(arguments)
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return build_optimizer(cfg, model or small_model())


def step(optimizer, gradient=0.5):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


# By name.


@pytest.mark.parametrize("name", NAMES)
def test_each_by_its_name_in_any_case(name):
    for spelled in (name, name.lower(), name.upper()):
        optimizer = built(OPTIMIZER=spelled)
        assert type(optimizer) is getattr(torch.optim, name)
    before = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    step(optimizer)
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(before) == 6 and not any(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.isfinite().all() for p in after)


def settings_of(model, **solver):
    """Learning rate and weight decay of each parameter, by name."""
    groups = built(model, **solver).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "SGD"])
def test_rate_and_decay_of_each_group(name):
    keys = {"BASE_LR": 0.3, "WEIGHT_DECAY": 0.1, "WEIGHT_DECAY_NORM": 0.2, "WEIGHT_DECAY_BIAS": 0.05}
    assert settings_of(small_model(), OPTIMIZER=name, BIAS_LR_FACTOR=2.0, **keys) == {
        "0.weight": (0.3, 0.1),
        "2.weight": (0.3, 0.1),
        "1.weight": (0.3, 0.2),
        **{f"{index}.bias": (0.6, 0.05) for index in range(3)},
    }


# The backbone's rates and decays.


def detector(network, neck=True):
    """What has the parts of a detector by name."""
    model = nn.Module()
    model.backbone = nn.Module() if neck else network
    if neck:
        model.backbone.bottom_up = network
        model.backbone.lateral = nn.Linear(4, 4)
    model.head = nn.Linear(4, 2)
    return model


def test_rates_of_the_backbone():
    """Of biases, too, where BIAS_LR_FACTOR comes on top."""
    keys = {"BASE_LR": 0.5, "WEIGHT_DECAY": 0.1, "WEIGHT_DECAY_NORM": 0.2, "WEIGHT_DECAY_BIAS": 0.05}
    found = settings_of(detector(small_model()), BACKBONE_LR_FACTOR=0.25, BIAS_LR_FACTOR=2.0, **keys)
    below = "backbone.bottom_up."
    assert found == {
        **{f"{below}{index}.weight": (0.125, 0.1) for index in (0, 2)},
        f"{below}1.weight": (0.125, 0.2),
        **{f"{below}{index}.bias": (0.25, 0.05) for index in range(3)},
        **{f"{name}.weight": (0.5, 0.1) for name in ("backbone.lateral", "head")},
        **{f"{name}.bias": (1.0, 0.05) for name in ("backbone.lateral", "head")},
    }
    found = settings_of(detector(small_model(), neck=False), BACKBONE_LR_FACTOR=0.25, BASE_LR=0.5)
    assert {name: rate for name, (rate, _) in found.items()} == {
        name: 0.5 if name.startswith("head") else 0.125 for name in found
    }


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_layer_decay_and_weight_decay_are_timms(name):
    """The neck has the place of timm's classifier; detectron2 decays biases as weights, timm does not."""
    timm, optim = (pytest.importorskip(module) for module in ("timm", "timm.optim"))
    network, whole = timm.create_model(name, num_classes=0), timm.create_model(name)
    keys = {"BASE_LR": 0.5, "WEIGHT_DECAY": 0.1, "WEIGHT_DECAY_NORM": 0.0, "WEIGHT_DECAY_BIAS": 0.0}
    found = settings_of(detector(network), LAYER_DECAY=0.7, BACKBONE_LR_FACTOR=0.25, **keys)
    exempt = whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()
    groups = optim.param_groups_layer_decay(whole, 0.1, exempt, layer_decay=0.7)
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {name: scales[id(p)] for name, p in whole.named_parameters()}
    names = [name for name, _ in network.named_parameters()]
    assert len({expected[name][0] for name in names}) > 4
    for name in names:
        scale, decay = expected[name]
        assert found[f"backbone.bottom_up.{name}"] == (pytest.approx(0.125 * scale), decay)
    (classifier,) = {expected[name][0] for name in expected if name not in names}
    assert found["head.weight"] == (0.5 * classifier, 0.1)


def test_layer_decay_of_detectron2s_vit():
    pytest.importorskip("timm")  # which it needs
    network = ViT(img_size=32, patch_size=16, embed_dim=8, depth=2, num_heads=2, pretrain_img_size=32)
    model = detector(network)
    model.backbone.net = model.backbone._modules.pop("bottom_up")  # as in its SimpleFeaturePyramid
    found = settings_of(model, LAYER_DECAY=0.5, BASE_LR=1.0, WEIGHT_DECAY=0.1)
    path, rates = "backbone.net.", {"patch_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5}
    for part, rate in rates.items():
        assert {v[0] for name, v in found.items() if name.startswith(path + part)} == {rate}
    assert found[f"{path}pos_embed"] == (0.125, 0.0) and found["backbone.lateral.weight"] == (1.0, 0.1)


def test_factors_that_reach_nothing():
    network = small_model()
    with pytest.raises(
        ValueError, match="LAYER_DECAY is 0.7, but the layers of 'backbone', a Sequential,"
    ):
        built(detector(network, neck=False), LAYER_DECAY=0.7)
    network.requires_grad_(False)
    with pytest.raises(
        ValueError, match="BACKBONE_LR_FACTOR is 0.1, but .* no parameter of 'backbone.bott"
    ):
        built(detector(network), BACKBONE_LR_FACTOR=0.1)


def test_what_is_not_trained_is_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = built(model, OPTIMIZER="Adam")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for module in model[1:] for p in module.parameters()}
    assert optimizer_signature(optimizer) == "Adam of 4 tensors"


@pytest.mark.parametrize(
    "name, arguments", [("Adam", {"betas": [0.8, 0.9]}), ("RMSprop", {"alpha": 0.5})]
)
def test_steps_equal_those_of_torch(name, arguments):
    models = [small_model()]
    models.append(copy.deepcopy(models[0]))
    keys = {"BASE_LR": 0.01, "WEIGHT_DECAY": 0.1, "WEIGHT_DECAY_NORM": 0.1}
    optimizers = [
        built(models[0], OPTIMIZER=name, OPTIMIZER_ARGS=arguments, **keys),
        getattr(torch.optim, name)(models[1].parameters(), lr=0.01, weight_decay=0.1, **arguments),
    ]
    for model, optimizer in zip(models, optimizers):
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
    assert_equal(*(model.state_dict() for model in models))


def test_sgd_has_its_own_keys_too():
    arguments = {"MOMENTUM": 0.7, "OPTIMIZER_ARGS": {"dampening": 0.2}}
    group = built(**arguments).param_groups[0]
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.7, False, 0.2)
    assert built(MOMENTUM=0.7, NESTEROV=True).param_groups[0]["nesterov"]
    assert built(OPTIMIZER_ARGS={"momentum": 0.1}).param_groups[0]["momentum"] == 0.1


# OPTIMIZER_ARGS in configs.


def arguments_of(cfg):
    return build_optimizer(cfg, small_model()).param_groups[0]


def test_arguments_in_a_yaml_file(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {OPTIMIZER: Adam, OPTIMIZER_ARGS: {eps: 0.001}}\n")
    (tmp_path / "config.yaml").write_text(
        "_BASE_: base.yaml\nSOLVER: {OPTIMIZER_ARGS: {betas: [0.8, 0.95], amsgrad: True}}\n"
    )
    group = arguments_of(load_config(str(tmp_path / "config.yaml")))
    assert (list(group["betas"]), group["eps"], group["amsgrad"]) == ([0.8, 0.95], 0.001, True)
    one = load_config(str(tmp_path / "config.yaml"), [f"{ARGUMENTS}.eps", "0.002"])
    assert (list(arguments_of(one)["betas"]), arguments_of(one)["eps"]) == ([0.8, 0.95], 0.002)


def test_arguments_on_the_command_line_beside_those_of_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text("SOLVER: {OPTIMIZER: Adam, OPTIMIZER_ARGS: {eps: 0.5}}\n")
    for text in ("{betas: [0.8, 0.9]}", "{'betas': (0.8, 0.9)}", "{betas: [0.8, 0.9], eps: 0.5}"):
        group = arguments_of(load_config(str(tmp_path / "config.yaml"), [ARGUMENTS, text]))
        assert (list(group["betas"]), group["eps"]) == ([0.8, 0.9], 0.5)


def test_any_node_on_the_command_line():
    """Keys that are left out stay as they were."""
    cfg = load_config("", ["MODEL.DISTILLER.PKD", "{WEIGHT: 2.5}", OPTIMIZER, "Adam"])
    assert (cfg.MODEL.DISTILLER.PKD.WEIGHT, cfg.MODEL.DISTILLER.PKD.START_ITER) == (2.5, 0)
    with pytest.raises(KeyError, match="WEIGT"):
        load_config("", ["MODEL.DISTILLER.PKD", "{WEIGT: 2.5}"])


NO_NODES = ["0.9", "[0.8, 0.9]", "betas", "", "{betas: [0.8", "{betas: !!python/name:os.system x}"]


@pytest.mark.parametrize("text", NO_NODES)
def test_something_else_than_a_node_on_the_command_line(text):
    with pytest.raises(ValueError) as caught:
        load_config("", [ARGUMENTS, text])
    assert f"{ARGUMENTS} is '{text}'; expected {{name: value, ...}}" in str(caught.value)


def test_a_loss_may_have_any_optimizer():
    keys = {"OPTIMIZER": "nadam", "OPTIMIZER_ARGS": CfgNode({"betas": [0.5, 0.6]}), "BASE_LR": 0.25}
    optimizer = solver_of(ProbeLoss(), **keys, WEIGHT_DECAY=0.125).optimizer
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.NAdam and list(group["betas"]) == [0.5, 0.6]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)


# Wrong input.


@pytest.mark.parametrize("name", ["LAMB", "LBFGS", "SparseAdam", "Rprop", "Optimizer", "optim", ""])
def test_names_that_do_not_do(name):
    """LBFGS runs the model itself, and SparseAdam needs sparse gradients."""
    with pytest.raises(ValueError) as caught:
        built(OPTIMIZER=name)
    message = str(caught.value)
    assert message.startswith(f"SOLVER.OPTIMIZER is '{name}'; expected one of ['ASGD', 'Ada")
    listed = message.partition("expected")[2]
    assert all(f"'{known}'" in listed for known in NAMES)
    assert not any(f"'{other}'" in listed for other in ("LBFGS", "SparseAdam", "Rprop", "Optimizer"))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("Adam", {"bets": [0.8, 0.9]}, "'bets'"),
        ("AdamW", {"momentum": 0.9}, "'momentum'"),
        ("Adam", {"betas": [0.8, 2.0]}, "2.0"),
        ("Adam", {"betas": 0.9}, "betas"),
        ("RMSprop", {"params": 1}, "'params'"),
        ("SGD", {"lr": 5}, "set SOLVER.BASE_LR and SOLVER.WEIGHT_DECAY instead"),
    ],
)
def test_arguments_that_do_not_do(name, arguments, message):
    with pytest.raises(ValueError) as caught:
        built(OPTIMIZER=name, OPTIMIZER_ARGS=arguments)
    text = str(caught.value)
    if "lr" not in arguments:
        start = (
            f"SOLVER: torch.optim.{name} cannot be made from BASE_LR, WEIGHT_DECAY and OPTIMIZER_ARGS "
        )
        assert text.startswith(start) and str(arguments) in text
    assert message in text


# In training.


@pytest.fixture
def ghnd(tmp_path):
    """A job that trains 25 tensors with Adam and saves after its first iteration."""
    job = Job(tmp_path, width=16, evaluate=False)
    use_ghnd(job.config)
    job.config.SOLVER.MAX_ITER = 2
    job.config.SOLVER.CHECKPOINT_PERIOD = 1
    return job


def test_resume_with_another_optimizer_or_other_tensors(ghnd):
    ghnd.run()
    rewind(ghnd.output, "model_0000000")
    for kind, options in {
        "RMSprop of 25 tensors": [OPTIMIZER, "RMSprop"],
        "Adam of 27 tensors": ["MODEL.DISTILLER.FREEZE", "['bottom_up.res[34]']"],
        "Adam of 24 tensors": ["MODEL.BACKBONE.FREEZE_AT", 1],
        "Adam of 45 tensors": ["MODEL.DISTILLER.TASK_LOSS_WEIGHT", 1.0],
    }.items():
        with pytest.raises(ValueError) as caught:
            ghnd.run("--resume", opts=options)
        message = f"--resume: the checkpoint's optimizer is Adam of 25 tensors, this run's is {kind} ("
        assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"groups of \[9, 16\] .* has \[9, 8, 8\] \(SOLVER.BACKBONE_LR"):
        ghnd.run("--resume", opts=["SOLVER.WEIGHT_DECAY_BIAS", 0.5])
    keys = ["SOLVER.OPTIMIZER", "MODEL.DISTILLER.FREEZE", "MODEL.BACKBONE.FREEZE_AT", "without --resume"]
    assert all(key in str(caught.value) for key in keys)
    assert (ghnd.output / "last_checkpoint").read_text() == "model_0000000.pth"
