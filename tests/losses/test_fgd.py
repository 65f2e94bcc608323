"""FGD by hand, and literally, with both refined maps, on batches of several images."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.losses.fgd import FGD
from distill_d2.testing.maps import view_of
from distill_d2.views import Batch


def batch_of(boxes, size=(64, 96)):
    truths = [Instances(size, gt_boxes=Boxes(b), gt_classes=torch.zeros(len(b)).long()) for b in boxes]
    return Batch([{"image": torch.zeros(3, *size), "instances": t} for t in truths], size, 0, 1)


def run(student, teacher, boxes, **keys):
    loss, views = FGD(**keys), (view_of(student, "student"), view_of(teacher, "teacher"))
    torch.manual_seed(1)
    loss.bind(*views)
    for parameter in loss.parameters():
        parameter.data.normal_()
    return loss, loss.level_terms(*views, batch_of(boxes))


def literal(loss, level, s, t, mask):
    """The attentions of the teacher, and the refined maps R(s), R(t), as in the formula."""
    spatial = 8 * 12 * (t.abs().mean(1) / 0.5).flatten(1).softmax(1).view(-1, 8, 12)
    channels = 4 * (t.abs().mean((2, 3)) / 0.5).softmax(1)
    weighted = spatial * ((s - t) ** 2 * channels[..., None, None]).sum(1)
    refined = (
        s + loss.of_student[level](s)[..., None, None],
        t + loss.of_teacher[level](t)[..., None, None],
    )
    return (mask * weighted).sum() / len(s), (refined[0] - refined[1]).square().sum() / len(s)


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 0)])
def test_literal_terms(counts):
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 8, 12), torch.randn(3, 4, 8, 12)
    boxes = [torch.tensor([[9.0, 9, 20, 20], [30, 5, 90, 60]])[:count] for count in counts]
    loss, terms = run({"p3": s}, {"p3": t}, boxes)
    foreground, background = loss.masks(batch_of(boxes), "p3", (8, 12))
    assert [int((mask > 0).sum()) for mask in foreground] == [{0: 0, 1: 9, 2: 78}[n] for n in counts]
    torch.testing.assert_close(background.sum((1, 2)), torch.ones(3))
    for name, mask in (("fg", foreground), ("bg", background)):
        expected, context = literal(loss, "p3", s, t, mask)
        torch.testing.assert_close(terms["p3"][name], expected)
    torch.testing.assert_close(terms["p3"]["global"], context)


def test_one_cell_and_equal_maps_are_finite():
    maps = {"p3": torch.randn(2, 4, 8, 12), "p7": torch.zeros(2, 4, 1, 1)}
    student = {name: value.clone().requires_grad_() for name, value in maps.items()}
    _, terms = run(student, maps, [torch.zeros(0, 4)] * 2)
    values = [value for level in terms.values() for value in level.values()]
    torch.stack(values).sum().backward()
    assert terms["p3"]["fg"] == 0 and terms["p3"]["at"] == 0
    assert all(feature.grad.isfinite().all() for feature in student.values())
