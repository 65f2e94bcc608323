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
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.gid import GID
from distill_d2.losses.icd.loss import InstanceConditionalDistillation
from distill_d2.losses.pkd import PKD
from distill_d2.teacher import Teacher, load_teacher_weights
from distill_d2.testing.tiny import tiny_batch
from distill_d2.views import build_view

OWN = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "loss_mask"}


def batch(count=2, objects=2):
    return tiny_batch(count, objects=objects, masks=True)


def as_bitmasks(inputs):
    for item in inputs:
        masks = item["instances"].gt_masks
        height, width = item["image"].shape[1:]
        bits = BitMasks.from_polygon_masks(masks, height, width)
        item["instances"].gt_masks = bits
    return inputs


def step(model, inputs):
    """The terms of a step; afterwards there are gradients, of all that is trained."""
    model.zero_grad()
    terms = model(inputs)
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    return terms


# Training


@pytest.mark.parametrize("semantic", [False, True])
def test_a_step_trains_everything(semantic):
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=semantic).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen = []
    for _ in range(5):
        terms = step(model, batch())
        assert set(terms) == OWN | ({"loss_sem"} if semantic else set())
        assert all(term > 0 for term in terms.values())
        optimizer.step()
        seen.append(sum(terms.values()).item())
    assert seen[-1] < seen[0] and model.mask_head._iter == 5


def test_mask_loss_by_loops():
    """From the recorded outputs of the parts."""
    model, inputs, seen = condinst(MASK_OUT_STRIDE=4).train(), batch(2, 3), {}
    for name in ("mask_branch", "proposal_generator"):
        module = getattr(model, name)
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
    found = model(inputs)["loss_mask"]
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
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_bit_masks_are_as_polygons():
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True).train()
    first, second = model(batch()), model(as_bitmasks(batch()))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_objects_without_masks_have_no_mask_loss():
    """All else is learned of them, with the centers of their boxes."""
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True).train()
    inputs = batch()
    seen = []
    positives = model.positives
    model.positives = lambda *arguments: seen.append(positives(*arguments)) or seen[-1]
    step(model, inputs)
    inputs[0]["instances"].remove("gt_masks")
    terms = step(model, inputs)
    assert seen[0].counts[0] > 0 and seen[1].counts == [0, seen[0].counts[1]]
    assert terms["loss_mask"] > 0 and terms["loss_sem"] > 0
    for item in inputs:
        if item["instances"].has("gt_masks"):
            item["instances"].remove("gt_masks")
    terms = step(model, inputs)
    assert terms["loss_mask"] == terms["loss_sem"] == 0 and terms["loss_fcos_loc"] > 0


@pytest.mark.parametrize("fields", ["polygons", "nothing"])
def test_images_without_objects(fields):
    model = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True).train()
    empty = without_objects(batch())
    if fields == "nothing":  # detectron2's mapper leaves them out
        for item in empty:
            item["instances"].remove("gt_masks")
    terms = step(model, [*batch(1), empty[1]])
    assert terms["loss_mask"] > 0
    terms = step(model, empty)
    assert terms["loss_mask"] == terms["loss_fcos_loc"] == 0 and terms["loss_sem"] > 0


def test_annotations_are_not_changed():
    model, inputs = condinst().train(), batch()
    model(inputs)
    assert set(inputs[0]["instances"].get_fields()) == {"gt_boxes", "gt_classes", "gt_masks"}


def test_centers_are_those_of_masks():
    inputs = batch(1, 1)
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


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_at_most_so_many_proposals(most):
    model, seen = condinst(MAX_PROPOSALS=most).train(), []
    positives = model.positives
    model.positives = lambda *arguments: seen.append(positives(*arguments)) or seen[-1]
    step(model, batch(2, 3))
    every = condinst().train()
    count = len(seen[0].objects)
    assert count == sum(seen[0].counts) == (most if most < 1000 else count) and count <= most
    assert every.max_proposals == -1


def test_the_best_proposals_of_each_object():
    model, seen = condinst(TOPK_PROPOSALS_PER_IM=4).train(), []
    positives = model.positives
    model.positives = lambda *arguments: seen.extend([positives(*arguments), arguments[0]]) or seen[0]
    step(model, batch(2, 2))
    found, extras = seen
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
        assert term.dtype == torch.float32 and term.isfinite()
        torch.testing.assert_close(term, exact[name], rtol=0.1, atol=0.1)
    sum(terms.values()).backward()


# Inference


def detect(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(inputs)]


def test_a_batch_of_images_of_different_sizes():
    """Each as if it were alone, on the same padding."""
    model, inputs = condinst(), batch(3)
    inputs[2].update(height=96, width=30)
    together = detect(model, inputs)
    for found, item in zip(together, inputs):
        # What the network sees is 0 on the padding, so the mean color.
        canvas = model.pixel_mean.expand(3, 64, 80).clone()
        height, width = item["image"].shape[1:]
        canvas[:, :height, :width] = item["image"]
        (alone,) = detect(model, [{"image": canvas, "height": 64, "width": 80}])
        size = (item["height"], item["width"])
        assert found.image_size == size and found.pred_masks.shape == (len(found), *size)
        assert found.pred_masks.dtype == torch.bool and len(found) > 5
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        boxes = (alone.pred_boxes.tensor * scale).clamp(min=0)
        boxes = boxes.minimum(torch.tensor([size[1], size[0]] * 2).float())
        # Detections of the padding alone are outside, and have no area.
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
        count = min(len(found), len(boxes))
        torch.testing.assert_close(found.pred_boxes.tensor[:count], boxes[:count], rtol=1e-3, atol=1e-2)


def test_masks_by_loops():
    model, inputs = condinst(POST_NMS_TOPK_TEST=6), batch(2)
    inputs[1].update(height=112, width=50)
    seen = {}
    model.mask_branch.register_forward_hook(lambda *call: seen.update(features=call[2][0]))
    for image, found in enumerate(detect(model, inputs)):
        height, width = inputs[image]["image"].shape[1:]
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


def test_images_alone():
    model = condinst()
    images = [{"image": item["image"]} for item in batch()]
    assert len(detect(model, images)[0]) > 0
    with pytest.raises(ValueError, match="trained without annotations: an input has no 'instances'"):
        model.train()(images)


# In the Distiller


LOSSES = {
    "PKD": (PKD, {"pkd"}),
    "GID": (GID, {"gid_feature", "gid_relation", "gid_response_cls", "gid_response_reg"}),
    "DeFeat": (DeFeat, {"defeat_neck", "defeat_neck_back"}),
    "FGFI": (FGFI, {"fgfi"}),
    "ICD": (InstanceConditionalDistillation, {"icd_conf_0", "icd_reg_0", "icd_value"}),
}


def distiller(*losses, teacher=None, **options):
    teacher = teacher or condinst(width=16, MASK_BRANCH__SEMANTIC_LOSS_ON=True)
    return Distiller(
        student=condinst(), teacher=Teacher(teacher), losses=losses, max_iter=10, **options
    ).train()


def test_view():
    """FCOS' one; what the controller returns is none of its predictions."""
    model = condinst().train()
    view = build_view(model, "student")
    assert type(view) is OneStageDetectorView and view.offers == ("dense", "anchors")
    view.require("dense")
    with view.recording():
        model(batch())
        found = view.dense()
    assert len(found.centerness_levels) == 3 and found.logits.shape[-1] == 3


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["condinst", "fcos"])
def test_losses_that_work(name, kind):
    teacher = None if kind == "condinst" else fcos(width=16)
    model = distiller(LOSSES[name][0](), teacher=teacher)
    terms = step(model, batch())
    assert set(terms) == OWN | {f"loss_{term}" for term in LOSSES[name][1]}
    step(model, without_objects(batch()))


def test_the_teacher_does_not_change():
    """Its mask branch has batch norms, which must not move."""
    model = distiller(GID())
    before = {name: tensor.clone() for name, tensor in model.teacher.model.state_dict().items()}
    step(model, batch())
    step(model, batch())
    after = model.teacher.model.state_dict()
    changed = [n for n in after if n not in before or not torch.equal(after[n], before[n])]
    # Folding of norms, before the first step, is of the backbone.
    assert all(name.startswith("backbone.") for name in changed)
    assert "mask_branch.tower.0.1.running_mean" in before


def test_a_teacher_that_pads_further():
    """Ground truth follows the student's features."""
    model = distiller(PKD())
    model.teacher.model.backbone._size_divisibility = 96
    terms = step(model, batch())
    plain = step(distiller(PKD(), teacher=model.teacher.model), batch())
    assert terms["loss_mask"] > 0 and set(terms) == set(plain)


def test_the_student_may_start_from_the_teachers_heads():
    model = distiller(PKD(), preload_fpn=True, preload_head=True)
    model.preload_student()
    theirs = model.teacher.model.state_dict()
    ours = model.student.state_dict()
    heads = [name for name in ours if not name.startswith("backbone.bottom_up.")]
    assert {"controller.weight", "mask_branch.refine.1.0.weight"} < set(heads)
    different = [name for name in heads if not torch.equal(ours[name], theirs[name])]
    # Laterals read other widths.
    assert all(name.startswith("backbone.fpn_lateral") for name in different)


def test_a_released_teacher_is_whole(tmp_path):
    """Those of 2020 have no counter, and pixel_mean; a segmentation that the config has not stops it."""
    source = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True)
    state = {**source.state_dict(), "pixel_mean": torch.zeros(3, 1, 1)}
    del state["mask_head._iter"]
    torch.save(state, tmp_path / "released.pth")
    teacher = condinst(MASK_BRANCH__SEMANTIC_LOSS_ON=True)
    load_teacher_weights(teacher, str(tmp_path / "released.pth"))
    assert torch.equal(teacher.controller.weight, source.controller.weight)
    with pytest.raises(ValueError, match="12 keys not in the model: mask_branch.seg_head.0.0.weight"):
        load_teacher_weights(condinst(), str(tmp_path / "released.pth"))


def test_the_weights_load_into_a_plain_one():
    model = distiller(PKD())
    state = model.student.state_dict()
    build_model(condinst_config()).load_state_dict(state)  # strict


# What is refused


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"MASK_OUT_STRIDE": 8}, "MASK_OUT_STRIDE is 8; expected a divisor of .* stride, 4"),
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
