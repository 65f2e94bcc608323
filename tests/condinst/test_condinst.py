"""CondInst itself: training, inference, in the Distiller, what it refuses."""

import naive_condinst as naive
import naive_fcos
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from condinst_case import condinst, condinst_config
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from distill_d2.projects.fcos import OneStageDetectorView
from fcos_case import fcos, without_objects

from distill_d2.distiller import Distiller
from distill_d2.losses.gid import GID
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher, load_teacher_weights
from distill_d2.testing import polygons as batch
from distill_d2.views import build_view


def step(model, inputs):
    """The terms of a step; everything that is trained has a gradient afterwards."""
    model.zero_grad()
    terms = model(inputs)
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    return terms


def recorded(model):
    """A list of the results of ``model.positives`` and its arguments, call by call."""
    seen, positives = [], model.positives
    model.positives = lambda *arguments: seen.append((positives(*arguments), arguments)) or seen[-1][0]
    return seen


# Training


@pytest.mark.parametrize("most", [-1, 1])
def test_mask_loss_by_loops(most):
    """From the recorded outputs of the parts."""
    model = condinst(MASK_OUT_STRIDE=4, MAX_PROPOSALS=most).train()
    inputs, seen = batch(2, objects=2), {}
    for name in ("mask_branch", "proposal_generator"):
        module = getattr(model, name)
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
    found = model(inputs)["loss_mask"].item()
    extras, _ = seen["proposal_generator"]
    features, targets, points = seen["mask_branch"][0], extras["targets"], extras["points"]
    losses = []
    for image, row in targets.positive.nonzero().tolist():
        logits = naive.mask_logits(
            *(x.detach().double().numpy() for x in (features[image], extras["top"][image, :, row])),
            *(points.centers[row].tolist(), [16, 32, 64][points.levels[row]], 4, 8, 3),
            relative=True,
        )
        mask = inputs[image]["instances"].gt_masks[targets.objects[image, row].item()]
        full = BitMasks.from_polygon_masks(mask, 64, 80).tensor[0].double().numpy()
        losses.append(naive.dice(1 / (1 + np.exp(-logits)), full[2::4, 2::4]))
    assert len(losses) > 10
    expected = np.mean(losses) if most == -1 else min(losses, key=lambda each: abs(each - found))
    assert found == pytest.approx(expected, rel=1e-4)


def test_objects_without_masks_have_no_mask_loss():
    """All other losses remain; centers are those of the boxes."""
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True).train()
    inputs, seen = batch(), recorded(model)
    step(model, inputs)
    assert set(inputs[0]["instances"].get_fields()) == {"gt_boxes", "gt_classes", "gt_masks"}
    inputs[0]["instances"].remove("gt_masks")
    terms = step(model, inputs)
    counts = [found.counts for found, _ in seen]
    assert counts[0][0] > 0 and counts[1] == [0, counts[0][1]]
    assert terms["loss_mask"] > 0 and terms["loss_sem"] > 0
    inputs[1]["instances"].remove("gt_masks")
    terms = step(model, inputs)
    assert terms["loss_mask"] == terms["loss_sem"] == 0 and terms["loss_fcos_loc"] > 0


def test_images_without_objects():
    """detectron2's mapper leaves their masks out."""
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True).train()
    empty = without_objects(batch())
    for item in empty:
        item["instances"].remove("gt_masks")
    assert step(model, [*batch(1), empty[1]])["loss_mask"] > 0
    terms = step(model, empty)
    assert terms["loss_mask"] == terms["loss_fcos_loc"] == 0 and terms["loss_sem"] > 0


def test_centers_are_those_of_masks():
    inputs = batch(1, objects=1)
    mask = torch.zeros(1, 48, 80, dtype=torch.bool)
    mask[0, 4:10, 6:12] = True
    box = [4.0, 4.0, 28.0, 24.0]
    inputs[0]["instances"].gt_boxes.tensor[:] = torch.tensor(box)
    inputs[0]["instances"].gt_masks = BitMasks(mask)
    model, seen = condinst().train(), []
    model.proposal_generator.register_forward_hook(lambda *call: seen.append(call[2][0]))
    model(inputs)
    points = [
        (x, y, stride, level)
        for level, stride in enumerate((4, 8, 16))
        for x, y in naive_fcos.locations(48 // stride, 80 // stride, stride)
    ]
    bounds = [(-1, 16), (16, 32), (32, 1e8)]
    of_mask, of_box = (
        [found is not None for found in naive_fcos.assign(points, [box], bounds, 1.5, centers)]
        for centers in ([(8.5, 6.5)], None)
    )
    assert seen[0]["targets"].positive[0].tolist() == of_mask != of_box and any(of_mask)


@pytest.mark.parametrize("most", [5, 1000])
def test_limit_of_proposals(most):
    model = condinst(MAX_PROPOSALS=most).train()
    seen = recorded(model)
    step(model, batch(2, objects=3))
    ((found, (extras, _)),) = seen
    positive = int(extras["targets"].positive.sum())
    assert len(found.objects) == sum(found.counts) == min(most, positive) and positive > 5


def test_the_best_proposals_of_each_object():
    model = condinst(TOPK_PROPOSALS_PER_IM=4).train()
    seen = recorded(model)
    step(model, batch())
    ((found, (extras, _)),) = seen
    targets = extras["targets"]
    images, rows = targets.positive.nonzero(as_tuple=True)
    best = extras["logits"][images, :, rows].amax(dim=1).sigmoid()
    best = best * extras["quality"][images, rows].sigmoid()
    objects = targets.objects[images, rows]
    expected = naive.best(images.tolist(), objects.tolist(), best.tolist(), 4)
    assert found.objects.tolist() == objects[expected].tolist() and 0 < len(expected) < len(images)
    assert torch.equal(found.locations, extras["points"].centers[rows[expected]])


def test_losses_are_float32_under_autocast():
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True).train()
    exact = model(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model(batch())
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name], rtol=0.1, atol=0.1)


# Inference


def detect(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(inputs)]


def test_masks_by_loops():
    model, inputs = condinst(POST_NMS_TOPK_TEST=6), batch()
    inputs[1].update(height=112, width=50)
    seen = {}
    model.mask_branch.register_forward_hook(lambda *call: seen.update(features=call[2][0]))
    for image, found in enumerate(detect(model, inputs)):
        height, width = inputs[image]["image"].shape[1:]
        assert found.image_size == (inputs[image]["height"], inputs[image]["width"])
        assert 0 < len(found) <= 6
        for k in range(len(found)):
            logits = naive.mask_logits(
                *(seen["features"][image].double().numpy(), found.top_feat[k].double().numpy()),
                *(found.locations[k].tolist(), [16, 32, 64][found.fpn_levels[k]], 4, 8, 3),
                relative=True,
            )
            p = 1 / (1 + np.exp(-naive.upsample(logits, 2)))
            p = torch.tensor(naive.upsample(p, 2))[None, None, :height, :width]
            p = F.interpolate(p, size=found.image_size, mode="bilinear", align_corners=False)[0, 0]
            certain = (p - 0.5).abs() > 1e-4
            assert torch.equal(found.pred_masks[k][certain], (p > 0.5)[certain])
            assert certain.float().mean() > 0.9


@pytest.mark.parametrize("most", [1, 7])
def test_masks_in_several_passes(most):
    model = condinst()
    first = detect(model, batch())
    model.max_instances_per_pass = most
    for found, expected in zip(detect(model, batch()), first):
        assert len(found) > 7 and (found.pred_masks != expected.pred_masks).sum() <= 2


def test_no_detections():
    for found in detect(condinst(INFERENCE_TH_TEST=1.0), batch()):
        assert len(found) == 0 and found.pred_masks.dtype == torch.bool
        assert found.pred_masks.shape == (0, *found.image_size)


# In the Distiller


def test_view():
    """The same as FCOS's; the controller's outputs are not among its predictions."""
    model = condinst().train()
    view = build_view(model, "student")
    assert type(view) is OneStageDetectorView and view.offers == ("dense", "anchors")
    view.require("dense")
    with view.recording():
        model(batch())
        found = view.dense()
    assert len(found.centerness_levels) == 3 and found.logits.shape[-1] == 3


@pytest.mark.parametrize("kind", ["FCOS", "larger padding"])
def test_other_teachers(kind):
    """Masks follow the student's padding."""
    teacher = fcos(width=16) if kind == "FCOS" else condinst(width=16)
    if kind == "larger padding":
        teacher.backbone._size_divisibility = 96
    losses = [GID(), PKD()]
    model = Distiller(student=condinst(), teacher=Teacher(teacher), losses=losses, max_iter=9).train()
    terms = step(model, batch())
    assert terms["loss_mask"] > 0 and {"loss_gid_response_cls", "loss_pkd"} < set(terms)


def test_a_released_teacher_is_whole(tmp_path):
    """Those of 2020 have no counter, and pixel_mean; a segmentation that the config lacks is an error."""
    source = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True)
    state = {**source.state_dict(), "pixel_mean": torch.zeros(3, 1, 1)}
    del state["mask_head._iter"]
    torch.save(state, tmp_path / "released.pth")
    teacher = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True)
    load_teacher_weights(teacher, str(tmp_path / "released.pth"))
    assert torch.equal(teacher.controller.weight, source.controller.weight)
    with pytest.raises(ValueError, match="12 keys not in the model: mask_branch.seg_head.0.0.weight"):
        load_teacher_weights(condinst(), str(tmp_path / "released.pth"))


# What is refused


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"MASK_OUT_STRIDE": 8}, "MASK_OUT_STRIDE is 8; expected a divisor of .* stride, 4"),
        ({"MASK_OUT_STRIDE": 3}, "MASK_OUT_STRIDE is 3; expected a divisor"),
        ({"MASK_OUT_STRIDE": 0}, "MASK_OUT_STRIDE is 0; expected a divisor"),
        (
            {"MAX_PROPOSALS": 5, "TOPK_PROPOSALS_PER_IM": 5},
            r"'MAX_PROPOSALS': 5, 'TOPK_PROPOSALS_PER_IM': 5}; expected at most one of them above 0",
        ),
        ({"MAX_PROPOSALS": 0}, "'MAX_PROPOSALS': 0"),
        ({"MASK_HEAD__MAX_INSTANCES_PER_PASS": 0}, "MAX_INSTANCES_PER_PASS is 0; expected 1 or more"),
        (
            {"MASK_BRANCH__IN_FEATURES": ["p2", "p9"]},
            r"MASK_BRANCH.IN_FEATURES is \['p2', 'p9'\], but the backbone has the levels \['p2', 'p3'",
        ),
    ],
)
def test_wrong_values(keys, message):
    with pytest.raises(ValueError, match=message):
        condinst(**keys)


def test_another_proposal_generator():
    cfg = condinst_config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32]]
    with pytest.raises(ValueError, match="PROPOSAL_GENERATOR.NAME is 'RPN'; CondInst needs 'FCOS'"):
        build_model(cfg)


def test_training_without_annotations():
    model = condinst()
    images = [{"image": item["image"]} for item in batch()]
    assert len(detect(model, images)[0]) > 0
    with pytest.raises(ValueError, match="trained without annotations: an input has no 'instances'"):
        model.train()(images)
