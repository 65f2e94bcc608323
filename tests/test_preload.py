"""Starting a student from its teacher."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import tiny_config

from distill_d2.preload import preload


def detector(family="retinanet", fpn_norm="", **sizes):
    cfg = tiny_config(family, **sizes)
    cfg.MODEL.FPN.NORM = fpn_norm
    model = build_model(cfg)
    with torch.no_grad():  # so that no two detectors have a tensor in common, biases of 0 included
        for tensor in model.state_dict().values():
            tensor.copy_(1000 * torch.rand(tensor.shape))
    return model


def copied(student, teacher, **what):
    """The names of the student's tensors that became the teacher's; all others must stay."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    count = preload(student, teacher, **what)
    after, theirs = student.state_dict(), teacher.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == count
    assert all(torch.equal(after[name], theirs[name]) for name in changed)
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


def test_fpn_alone():
    assert copied(detector(), detector(), fpn=True, head=False) == FPN_234


def test_head_alone():
    assert copied(detector(), detector(), fpn=False, head=True) == RETINANET_HEAD


def test_both():
    assert copied(detector(), detector(), fpn=True, head=True) == FPN_234 | RETINANET_HEAD


def test_head_of_a_mask_rcnn():
    names = copied(detector("mask"), detector("mask"), fpn=False, head=True)
    assert {name.split(".")[0] for name in names} == {"proposal_generator", "roi_heads"}
    assert {name.split(".")[1] for name in names} == {
        "rpn_head", "box_head", "box_predictor", "mask_head"
    }  # fmt: skip


def test_mis_shaped_tensors_are_skipped_and_listed(caplog):
    # The wider teacher's laterals read wider stages.
    with caplog.at_level("INFO"):
        names = copied(detector(width=8), detector(width=16), fpn=True, head=False)
    assert names == {name for name in FPN_234 if "output" in name or "bias" in name}
    assert "Copied 9 tensors" in caplog.text
    line = "  backbone.fpn_lateral2.weight: teacher (16, 16, 1, 1), student (16, 8, 1, 1)"
    skipped = caplog.text.split("Skipped, of another shape:\n")[1].splitlines()
    assert line in skipped and len(skipped) == 3


def test_nothing_is_listed_when_all_fits(caplog):
    with caplog.at_level("INFO"):
        preload(detector(), detector(), fpn=True, head=True)
    assert "Copied 20 tensors" in caplog.text and "Skipped" not in caplog.text


def test_nothing_fits():
    student, teacher = detector(channels=16), detector(channels=24)
    with pytest.raises(ValueError, match="PRELOAD_FPN / PRELOAD_HEAD: no tensor .* set both to False"):
        preload(student, teacher, fpn=True, head=False)


def test_buffers_are_copied_too():
    names = copied(detector(fpn_norm="BN"), detector(fpn_norm="BN"), fpn=True, head=False)
    assert {"backbone.fpn_lateral2.norm.running_mean", "backbone.fpn_output4.norm.running_var"} <= names


def test_mask_rcnn_teacher_of_a_retinanet_student():
    assert copied(detector("retinanet"), detector("mask"), fpn=True, head=True) == FPN_234


def test_student_and_teacher_share_no_memory():
    student, teacher = detector(), detector()
    preload(student, teacher, fpn=True, head=True)
    with torch.no_grad():
        student.head.cls_score.bias.add_(1)
    assert not torch.equal(student.head.cls_score.bias, teacher.head.cls_score.bias)


def test_gradients_stay_possible():
    student = detector()
    preload(student, detector(), fpn=True, head=True)
    assert all(p.requires_grad and p.is_leaf for p in student.head.parameters())
