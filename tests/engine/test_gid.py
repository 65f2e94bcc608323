"""GID as a user trains with it."""

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import Job, checkpoint, last_losses

from distill_d2.testing import tiny_batch, tiny_config, tiny_detector

TERMS = {f"loss_gid_{name}" for name in ("feature", "relation", "response_cls", "response_reg")}


def gid_job(folder, family="retinanet", **keys):
    """A job that distills by GID, with these keys of its node, and does not evaluate."""
    job = Job(folder, family, types=["GID"], evaluate=False)
    # Random detectors, the two-stage ones above all, disagree on small boxes that lie close together.
    job.node.GID.GI_MIN_SIDE, job.node.GID.GI_NMS_THRESH = 1.0, 0.7
    for key, value in keys.items():
        job.node.GID[key] = value
    return job


def test_teacher_of_another_kind_for_ground_truth_alone(tmp_path):
    """If no head is compared, the teacher may be of any kind, with other classes."""
    job = gid_job(tmp_path, GI_MODE="gt", RESPONSE_CLS_WEIGHT=0.0, RESPONSE_REG_WEIGHT=0.0)
    teacher = tiny_config("mask", width=16)
    teacher.MODEL.ROI_HEADS.NUM_CLASSES = 7
    job.use_teacher(teacher)
    job.run(opts=["SOLVER.MAX_ITER", 2])
    assert set(last_losses(job.output)) & TERMS == {"loss_gid_feature", "loss_gid_relation"}


def test_no_proposals_at_all(tmp_path):
    """Where the student's RPN proposes nothing, detectron2's own losses are finite, too."""
    job = gid_job(tmp_path, "faster")
    job.config.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = False
    model = build_model(job.config).train()
    model.student.proposal_generator.register_forward_hook(
        lambda _, __, output: ([proposals[:0] for proposals in output[0]], output[1])
    )
    with EventStorage(0):
        losses = model(tiny_batch())
    sum(losses.values()).backward()
    assert all(losses[name] == 0 for name in TERMS)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.losses.parameters())


# LazyConfigs.

FCOS_CONFIG = """
from distill_d2.testing.tiny import tiny_detector
model = L(tiny_detector)(family="fcos", width={width}, channels={channels})
"""
FCOS_TEACHER = f"""
from detectron2.config import LazyCall as L
{FCOS_CONFIG}
train = dict(init_checkpoint="{{weights}}")
"""
FCOS_KEYS = "TYPES=['GID'], GID=dict(RESPONSE_MASK='inside', RESPONSE_REG_MODE='GIoU')"


def test_fcos_of_lazy_configs(lazy_job):
    """A student, and a teacher of more channels, which is itself a LazyConfig beside the student's."""
    model = tiny_detector("fcos", 16)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)  # strides: untrained boxes are too small
    weights = lazy_job.folder / "fcos.pth"
    torch.save({"model": model.state_dict()}, weights)
    teacher = FCOS_TEACHER.format(width=16, channels=16, weights=weights)
    (lazy_job.folder / "fcos_teacher.py").write_text(teacher)
    lazy_job.replace('TYPES=["PKD"]', FCOS_KEYS)
    lazy_job.replace(lazy_job.teacher, "fcos_teacher.py")
    lazy_job.text += FCOS_CONFIG.format(width=8, channels=8)

    assert "AP" in lazy_job.run("train.max_iter=2")["bbox"]
    logged = last_losses(lazy_job.output)
    assert TERMS | {"loss_fcos_ctr"} < set(logged) and all(0 < logged[name] < 1e3 for name in TERMS)
    saved = checkpoint(lazy_job.output)
    assert saved["distiller"].keys() == {f"GID.pairs.adapters.shared.{k}" for k in ("weight", "bias")}
    plain = instantiate(LazyConfig.load(str(lazy_job.folder / "config.py")).model)
    plain.load_state_dict(saved["model"], strict=True)
    lazy_job.run("--resume", "train.max_iter=3")
    assert checkpoint(lazy_job.output)["trainer"]["iteration"] == 2

    nowhere = "distiller.MODEL_DISTILLER_CONFIG=nowhere.py"
    weights = f"train.init_checkpoint={lazy_job.output}/model_final.pth"
    assert "AP" in lazy_job.run("--eval-only", weights, nowhere)["bbox"]
