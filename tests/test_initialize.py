"""Starting a student from its teacher, and the losses from an earlier run."""

import pytest
import torch
from detectron2.modeling import build_model
from losses.naive_icd import random_weights

from distill_d2.distiller import Distiller
from distill_d2.initialize_losses import initialize_losses
from distill_d2.initialize_student import initialize_student
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.icd.loss import InstanceConditionalDistillation
from distill_d2.teacher import Teacher
from distill_d2.testing.tiny import tiny_config, use_ghnd

ICD = "InstanceConditionalDistillation"


def detector(family="retinanet", fpn_norm="", **sizes):
    cfg = tiny_config(family, **sizes)
    cfg.MODEL.FPN.NORM = fpn_norm
    model = build_model(cfg)
    with torch.no_grad():  # so that no two detectors have a tensor in common, biases of 0 included
        for tensor in model.state_dict().values():
            tensor.copy_(1000 * torch.rand(tensor.shape))
    return model


def copied(student, teacher, initialize=initialize_student, **what):
    """The names of the student's tensors that became the teacher's; all others must stay."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    count = initialize(student, teacher, **what)
    after, of_teacher = student.state_dict(), teacher.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert count in (None, len(changed))
    assert all(torch.equal(after[name], of_teacher[name]) for name in changed)
    return changed


FPN_234 = {
    f"backbone.fpn_{part}{level}.{kind}"
    for part in ("lateral", "output")
    for level in (2, 3, 4)
    for kind in ("weight", "bias")
}
RETINANET_HEAD = {
    f"head.{layer}.{kind}"
    for layer in ("cls_subnet.0", "bbox_subnet.0", "cls_score", "bbox_pred")
    for kind in ("weight", "bias")
}


BOTTOM_UP = "backbone.bottom_up."


def stage(name, norms=("conv1", "conv2", "shortcut")):
    """Names of the tensors of a stage of one block, its norms' statistics among them."""
    kinds = ["weight", *(f"norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var"))]
    kinds.append("norm.num_batches_tracked")
    return {f"{BOTTOM_UP}{name}.0.{layer}.{kind}" for layer in norms for kind in kinds}


@pytest.mark.parametrize(
    "teacher, what, names",
    [
        ("retinanet", {"fpn": True}, FPN_234),
        ("mask", {"fpn": True, "head": True}, FPN_234),
        ("retinanet", {"head": True}, RETINANET_HEAD),
        ("retinanet", {"head": True, "names": ["res3"]}, RETINANET_HEAD | stage("res3")),
        (
            *("retinanet", {"names": [r"bottom_up\.res3\.", "fpn_.*2"]}),
            stage("res3") | {n for n in FPN_234 if "2." in n},
        ),
        (
            *("retinanet", {"fpn": True, "names": ["fpn_lateral2", r"res3\.0\.conv1"]}),
            FPN_234 | stage("res3", ["conv1"]),
        ),
    ],
)
def test_what_is_copied(teacher, what, names):
    student, teacher = detector(), detector(teacher)
    assert copied(student, teacher, **what) == names
    assert all(p.requires_grad and p.is_leaf for p in student.parameters())
    memory = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not memory & {tensor.data_ptr() for tensor in student.state_dict().values()}


def test_head_of_a_mask_rcnn():
    names = copied(detector("mask"), detector("mask"), head=True)
    parts = {".".join(name.split(".")[:2]) for name in names}
    heads = {f"roi_heads.{part}" for part in ("box_head", "box_predictor", "mask_head")}
    assert parts == {"proposal_generator.rpn_head", *heads}


def test_mis_shaped_tensors_are_skipped_and_listed(caplog):
    # The wider teacher's laterals read wider stages.
    with caplog.at_level("INFO"):
        names = copied(detector(width=8), detector(width=16), fpn=True, head=False)
    assert names == {name for name in FPN_234 if "output" in name or "bias" in name}
    assert "Copied 9 tensors" in caplog.text
    line = "  backbone.fpn_lateral2.weight: teacher (16, 16, 1, 1), student (16, 8, 1, 1)"
    skipped = caplog.text.split("Skipped, of another shape:\n")[1].splitlines()
    assert line in skipped and len(skipped) == 3


NOTHING = "PRELOAD_FPN / PRELOAD_HEAD / PRELOAD_NAMES: no tensor .* set the first two to False"


@pytest.mark.parametrize(
    "what, message",
    [
        ({"fpn": True}, NOTHING),
        ({"names": ["^head.cls_subnet.0.weight"]}, NOTHING),
        ({"names": ["res3", "res7"]}, "PRELOAD_NAMES: 'res7' matches no name"),
        ({"names": ["res[3"]}, r"PRELOAD_NAMES: 'res\[3' is not a valid regular expression"),
    ],
)
def test_nothing_fits(what, message):
    student, teacher = detector(channels=16), detector(channels=24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=f"MODEL.DISTILLER.{message}"):
        initialize_student(student, teacher, **what)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_tensors_that_the_teacher_lacks_stay(caplog):
    cfg = tiny_config()
    use_ghnd(cfg)  # another first stage
    student, teacher = build_model(cfg), detector()
    with caplog.at_level("INFO"):
        names = copied(student, teacher, names=["."])
    own = {name for name in student.state_dict() if name.startswith(f"{BOTTOM_UP}res2.")}
    assert len(own) == 48 and names == set(student.state_dict()) - own
    line = f"Not in the teacher, left as they were: {BOTTOM_UP}res2 (48)."
    assert line in caplog.text.splitlines()
    assert "Copied 62 tensors of the teacher into the student: " in caplog.text
    assert f"{BOTTOM_UP}res3 (18)" in caplog.text and "Skipped" not in caplog.text


def test_distiller_preloads_what_it_is_told():
    student, teacher = detector(), detector()
    model = Distiller(
        student=student,
        teacher=Teacher(teacher),
        losses=[FeatureMimic()],
        preload_head=True,
        preload_names=["res3"],
    )
    model.teacher.observe([torch.zeros(3, 64, 96)], (64, 96))  # a prepared copy has other weights
    names = copied(student, teacher, lambda *_: model.preload_student())
    assert names == RETINANET_HEAD | stage("res3")


# The losses' own parameters, from an earlier run.


class Losses:
    """ICD, bound to a student and a teacher of 16 channels, beside a loss with an adapter; and checkpoints."""

    def __init__(self, folder, width=8, **settings):
        settings = {"hidden_dim": 16, "att_heads": 4, "input_feats": ["p2", "p3"], **settings}
        model = Distiller(
            student=build_model(tiny_config(width=width)),
            teacher=Teacher(build_model(tiny_config(width=16))),
            losses=[InstanceConditionalDistillation(**settings), FeatureMimic(in_features=["res3"])],
        )
        self.losses, self.path = model.losses, str(folder / "earlier.pth")

    def state(self):
        return {name: value.clone() for name, value in self.losses.state_dict().items()}

    def save(self, entry="distiller", prefix="", **more):
        """A checkpoint of these losses, of random values; what it holds, by our names."""
        values = {name: torch.rand(value.shape) for name, value in self.losses.state_dict().items()}
        torch.save({entry: {prefix + n: v for n, v in values.items()}, **more}, self.path)
        return values

    def load(self, part):
        """The names of the parameters that changed."""
        before = self.state()
        count = initialize_losses(self.losses, self.path, part)
        after = self.losses.state_dict()
        names = {name for name in after if not torch.equal(after[name], before[name])}
        assert len(names) == count
        return names


@pytest.fixture
def losses(tmp_path):
    return Losses(tmp_path)


MIMIC = {f"FeatureMimic.pairs.adapters.res3.{kind}" for kind in ("weight", "bias")}
VALUES = {f"{ICD}.student.0.values.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "part, of_icd_alone, others",
    [("all", False, {"model": {}}), ("all", True, {}), ("teacher_only", False, {})],
)
def test_losses_of_an_earlier_run(losses, part, of_icd_alone, others):
    saved = losses.save(**others)
    if of_icd_alone:
        saved = {name: value for name, value in saved.items() if name.startswith(ICD)}
        torch.save({"distiller": saved}, losses.path)
    assert losses.load(part) == set(saved) - (VALUES if part == "teacher_only" else set())
    assert part != "all" or all(torch.equal(value, losses.state()[n]) for n, value in saved.items())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("others", [{}, {"model": {}, "iteration": 1}])
def test_checkpoint_of_the_reference(losses, prefix, others):
    """It has nothing for the other loss."""
    sizes = {"hidden_dim": 16, "heads": 4, "layers": 1, "classes": 3}
    weights = random_weights(torch.Generator().manual_seed(0), **sizes)
    torch.save({"teacher": {prefix + n: v for n, v in weights.items()}, **others}, losses.path)
    assert losses.load("all") == set(losses.state()) - MIMIC
    values = weights["distillers.0.attention_module.matt.0.matt.in_proj_weight"][32:]
    assert torch.equal(losses.state()[f"{ICD}.student.0.values.weight"], values)


@pytest.mark.parametrize(
    "saved, own, message",
    [
        ({"hidden_dim": 32}, {}, r"from '.*earlier.pth': .*of another shape: .*\(32,"),
        ({"att_layers": 2}, {}, r".*\d+ unknown: \['decoder.1.in_proj_bias'"),
        ({}, {"att_layers": 2}, r".*\d+ missing: \['decoder.1.in_proj_bias'"),
    ],
)
def test_earlier_run_with_other_settings(tmp_path, saved, own, message):
    Losses(tmp_path, **saved).save()
    nothing_changes(Losses(tmp_path, **own), rf"PRELOAD_TEACHER does not fit {ICD}, {message}")


NOTHING_FOR_THEM = rf"PRELOAD_TEACHER '.*' holds no parameters of \['{ICD}', 'FeatureMimic'\].* It has "


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model": {}}, NOTHING_FOR_THEM + r"\['model'"),
        ({"model": {}, "distiller": {}}, NOTHING_FOR_THEM + r"\['distiller', 'model'"),
        ({"distiller": {"PKD.x": torch.zeros(1)}}, NOTHING_FOR_THEM + r"\['distiller'"),
        ([torch.zeros(1)], "earlier.pth': it holds a list"),
    ],
)
def test_checkpoint_with_nothing_for_them(losses, entries, message):
    torch.save(entries, losses.path)
    nothing_changes(losses, message)


def nothing_changes(losses, message):
    before = losses.state()
    with pytest.raises(ValueError, match=message):
        initialize_losses(losses.losses, losses.path, "all")
    assert all(torch.equal(value, before[name]) for name, value in losses.state().items())
