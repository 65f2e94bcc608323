"""Fixtures of GID: scores, instances, pooled features, masks, losses and gradients of a RetinaNet.

Every prefix of "gi_count" is a scenario: the images that it names, or all. Losses are those of the
authors' code, whose score is "max_first"; "paper_gi_*" are selections by the paper's.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances

from distill_d2.losses.gid import GID, GeneralInstances
from distill_d2.losses.gid.pooling import level_of
from distill_d2.testing.maps import view_of
from distill_d2.views import Batch, DetectorView, Predictions
from distill_d2.views.matching import batched_iou, match_by_iou
from distill_d2.views.predictions import decoder_of

from . import Fixture, golden_kind

# By the name of a term in the fixture: the name of the loss term, and the argument of its weight.
_TERMS = {
    "feature": ("loss_gid_feature", "feature_weight"),
    "relation": ("loss_gid_relation", "relation_weight"),
    "cls_logits": ("loss_gid_response_cls", "response_cls_weight"),
    "reg_deltas": ("loss_gid_response_reg", "response_reg_weight"),
}
# By the term's name in "mode_<term>_<mode>_b<beta>".
_MODES = {"feature": "feature", "cls": "cls_logits", "reg": "reg_deltas"}
_GRADIENT = {"rtol": 1e-4, "atol": 1e-6}
_RELATION = {"rtol": 1e-4, "atol": 1e-7}


@golden_kind(holds=["*_gi_count", "teacher_logits", "student_deltas"], rtol=1e-5, atol=1e-5)
def gid(fixture: Fixture) -> None:
    _compare_rows(fixture)
    for name in fixture.names("*gi_count"):
        prefix = name[: -len("gi_count")]
        if prefix.endswith("paper_"):
            _compare_paper(fixture, prefix)
            continue
        _compare_selection(fixture, prefix)
        _compare_losses(fixture, prefix)
        _compare_modes(fixture, prefix)
        if f"adapter_{prefix}pooled_student" in fixture.arrays:
            _compare_adapter(fixture, prefix)


class _Run:
    """The loss on some of the fixture's images."""

    def __init__(self, fixture: Fixture, prefix: str = "", adapter: bool = False, **settings: Any):
        self.fixture = fixture
        name = f"{prefix}images"
        everything = np.arange(len(fixture["image_sizes"]))
        self.images = fixture[name] if name in fixture.arrays else everything
        narrow = adapter and fixture.names("student_narrow_feat_*")
        self.inputs: dict[str, torch.Tensor] = {}
        self.teacher = self._maps("teacher_feat_")
        self.student = self._maps("student_narrow_feat_" if narrow else "student_feat_", "student_feat_")
        self.batch = _batch(fixture, self.images)
        self.loss = GID(**{**_settings(fixture), "adapter": adapter, **settings})

    def _maps(self, prefix: str, name: str = "") -> dict[str, torch.Tensor]:
        levels = [full[len(prefix) :] for full in self.fixture.names(f"{prefix}*")]
        return {level: self._input(f"{prefix}{level}", f"{name}{level}", bool(name)) for level in levels}

    def _input(self, array: str, name: str, requires_grad: bool) -> torch.Tensor:
        tensor = self.fixture.tensor(array)[self.images].requires_grad_(requires_grad)
        if requires_grad:
            self.inputs[name] = tensor
        return tensor

    def views(self) -> tuple[DetectorView, DetectorView]:
        """The views of student and teacher, to which the loss is bound."""
        strides = dict(zip(self.teacher, self.fixture["strides"].tolist()))
        student, teacher = (
            view_of(maps, role, strides, self._predictions(role, role == "student"))
            for role, maps in (("student", self.student), ("teacher", self.teacher))
        )
        self.loss.bind(student, teacher)
        if self.loss.settings.pools:
            _load_adapter(self.fixture, self.loss)
        return student, teacher

    def forward(self) -> dict[str, torch.Tensor]:
        return self.loss(*self.views(), self.batch)

    def predictions(self) -> tuple[Predictions, Predictions]:
        return self.loss.predictions(*self.views())

    def instances(self) -> GeneralInstances:
        return self.loss.instances(self.predictions(), self.batch)

    def _predictions(self, role: str, requires_grad: bool) -> Predictions:
        fixture = self.fixture
        anchors = fixture.tensor("anchors")
        logits, deltas = (
            self._input(f"{role}_{part}", f"{role}_{part}", requires_grad)
            for part in ("logits", "deltas")
        )
        matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        return Predictions(
            logit_levels=_levels(fixture, logits),
            delta_levels=_levels(fixture, deltas),
            anchors=anchors,
            decode=decoder_of(Box2BoxTransform((1.0, 1.0, 1.0, 1.0))),
            match=lambda boxes, valid: match_by_iou(matcher, boxes, valid, anchors),
        )

    def compare_gradients(self, prefix: str, total: torch.Tensor) -> None:
        """The gradients of ``total`` with all arrays "<prefix>__<input>"."""
        names = self.fixture.names(f"{prefix}__*")
        if not names:
            return
        parameters = {f"adapter_{name}": p for name, p in self._adapter().items()}
        tensors = {**self.inputs, **parameters}
        inputs = [name[len(prefix) + 2 :].replace("_narrow", "") for name in names]
        leaves = [tensors[name] for name in inputs]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        for name, tensor, gradient in zip(names, leaves, gradients):
            actual = torch.zeros_like(tensor) if gradient is None else gradient
            self.fixture.compare(name, actual, **_GRADIENT)

    def _adapter(self) -> dict[str, torch.Tensor]:
        adapters = list(self.loss.pairs.adapters.values()) if self.loss.settings.pools else []
        return dict(adapters[0].named_parameters()) if adapters else {}


def _settings(fixture: Fixture) -> dict[str, Any]:
    cfg = json.loads(str(fixture["cfg_json"]))
    return {
        "gi_score": "max_first",
        "gi_nms_thresh": cfg["nms"],
        "gi_pre_nms_topk": cfg["pre"],
        "gi_post_nms_topk": cfg["post"],
        "pooler_resolution": cfg["res"],
        "pooler_sampling_ratio": cfg["sr"],
        "feature_weight": cfg["wf"],
        "relation_weight": cfg["wr"],
        "response_cls_weight": cfg["wc"],
        "response_reg_weight": cfg["wb"],
        "response_reg_smooth_l1_beta": cfg["rbeta"],
    }


def _alone(term: str) -> dict[str, float]:
    """The weights that leave one term, unweighted."""
    return {weight: float(name == term) for name, (_, weight) in _TERMS.items()}


def _batch(fixture: Fixture, images: np.ndarray) -> Batch:
    sizes = fixture["image_sizes"].tolist()
    boxes, classes = fixture.tensor("gt_boxes"), fixture.tensor("gt_classes")
    inputs = []
    for image in images.tolist():
        of_image = torch.from_numpy(fixture["gt_image"] == image)
        instances = Instances(tuple(sizes[image]))
        instances.gt_boxes, instances.gt_classes = Boxes(boxes[of_image]), classes[of_image]
        inputs.append({"image": torch.empty(3, *sizes[image]), "instances": instances})
    return Batch(inputs, tuple(fixture["padded_size"].tolist()), iteration=0, max_iter=1)


def _levels(fixture: Fixture, rows: torch.Tensor) -> list[torch.Tensor]:
    """(N, R, K) to the levels (N, P, A, K)."""
    positions = fixture["level_shapes"].prod(axis=1).tolist()
    parts = rows.split(fixture["anchors_per_level"].tolist(), dim=1)
    return [part.unflatten(1, (count, -1)) for part, count in zip(parts, positions)]


def _load_adapter(fixture: Fixture, loss: GID) -> None:
    for adapter in loss.pairs.adapters.values():
        state = {name: fixture.tensor(f"adapter_{name}") for name in ("weight", "bias")}
        adapter.load_state_dict(state)


def _compare_rows(fixture: Fixture) -> None:
    """What is known of every row: signed score, box, and label."""
    run = _Run(fixture)
    student, teacher = run.predictions()
    scores, from_teacher = run.loss.select.gaps(teacher, student)
    fixture.compare("gi_diff_all", torch.where(from_teacher, scores, -scores))
    boxes = torch.where(from_teacher[..., None], teacher.boxes(), student.boxes())
    fixture.compare("gi_box_all", boxes, atol=1e-4)
    truth, valid = run.batch.truth.boxes, run.batch.truth.valid
    labels = student.match(truth, valid)
    nearest = batched_iou(truth, student.anchors).where(valid[..., None], -1.0).argmax(dim=1)
    classes = torch.zeros(valid.shape, dtype=torch.int64)
    classes[valid] = torch.cat([item["instances"].gt_classes for item in run.batch.inputs])
    named = torch.where(labels == 1, classes.gather(1, nearest), int(fixture["num_classes"]))
    fixture.compare("gt_labels", torch.where(labels == -1, -1, named))


def _compare_selection(fixture: Fixture, prefix: str) -> None:
    run = _Run(fixture, prefix)
    instances = run.instances()
    valid = instances.valid
    fixture.compare(f"{prefix}gi_count", valid.sum(dim=1))
    _compare_images(fixture, prefix, run.images, valid)
    fixture.compare(f"{prefix}gi_boxes", instances.boxes[valid], atol=1e-4)
    fixture.compare(f"{prefix}gi_scores", instances.scores[valid])
    fixture.compare(f"{prefix}gi_index", instances.rows[valid], rtol=0, atol=0)
    fixture.compare(f"{prefix}gi_from_teacher", instances.from_teacher[valid], rtol=0, atol=0)
    strides = fixture["strides"].tolist()
    first = int(np.log2(strides[0]))
    fixture.compare(
        f"{prefix}gi_level", level_of(instances.boxes[valid], strides) + first, rtol=0, atol=0
    )
    student, teacher = run.views()
    masks = run.loss.response_masks(student.dense(), instances, run.batch)
    pooled = run.loss.pooled(student, teacher, instances)
    fixture.compare(f"{prefix}response_mask", masks[0], rtol=0, atol=0)
    for role, features in zip(("student", "teacher"), pooled):
        fixture.compare(f"{prefix}pooled_{role}", features[valid])


def _compare_images(fixture: Fixture, prefix: str, images: np.ndarray, valid: torch.Tensor) -> None:
    """The image of each instance: its number in the scenario, or in the file."""
    actual = valid.nonzero()[:, 0].numpy()
    expected = np.repeat(np.arange(len(images)), fixture[f"{prefix}gi_count"])
    if np.array_equal(fixture[f"{prefix}gi_image"], images[expected]):
        actual = images[actual]
    fixture.compare(f"{prefix}gi_image", actual, rtol=0, atol=0)


def _compare_losses(fixture: Fixture, prefix: str) -> None:
    run = _Run(fixture, prefix)
    terms = run.forward()
    for name, (own_name, _) in _TERMS.items():
        fixture.compare(f"{prefix}loss_weighted_{name}", terms[own_name], **_tolerance(name))
        _compare_alone(fixture, prefix, name)
    run.compare_gradients(f"{prefix}grad_weighted_total", sum(terms.values()))
    exact = f"{prefix}loss_raw_relation_f64"
    if exact in fixture.arrays:
        term = _Run(fixture, prefix, **_alone("relation")).forward()["loss_gid_relation"]
        fixture.compare(exact, term, **_tolerance("relation"))


def _compare_alone(fixture: Fixture, prefix: str, name: str, **settings: Any) -> None:
    """One term alone, unweighted, and its gradients."""
    run = _Run(fixture, prefix, **_alone(name), **settings)
    (term,) = run.forward().values()
    start = "adapter_" if run.loss.settings.adapter else ""
    fixture.compare(f"{start}{prefix}loss_raw_{name}", term, **_tolerance(name))
    run.compare_gradients(f"{start}{prefix}grad_{name}", term)


def _compare_modes(fixture: Fixture, prefix: str) -> None:
    for name in fixture.names(f"{prefix}mode_*"):
        part, mode, beta = _parse_mode(name[len(f"{prefix}mode_") :])
        argument = _TERMS[_MODES[part]][1][: -len("weight")]
        settings = {f"{argument}mode": mode}
        if beta is not None:
            settings[f"{argument}smooth_l1_beta"] = beta
        (term,) = _Run(fixture, prefix, **{**_alone(_MODES[part]), **settings}).forward().values()
        fixture.compare(name, term)


def _parse_mode(text: str) -> tuple[str, str, float | None]:
    """ "feature_L1_b0.5" to ("feature", "L1", 0.5)."""
    part, mode, *rest = text.split("_")
    return part, mode, float(rest[0][1:]) if rest else None


def _compare_paper(fixture: Fixture, prefix: str) -> None:
    run = _Run(fixture, prefix[: -len("paper_")], gi_score="classwise")
    student, teacher = run.predictions()
    fixture.compare(f"{prefix}gi_score_all", run.loss.select.gaps(teacher, student)[0])
    instances = run.instances()
    fixture.compare(f"{prefix}gi_count", instances.valid.sum(dim=1))
    fixture.compare(f"{prefix}gi_boxes", instances.boxes[instances.valid], atol=1e-4)
    fixture.compare(f"{prefix}gi_scores", instances.scores[instances.valid])


def _compare_adapter(fixture: Fixture, prefix: str) -> None:
    run = _Run(fixture, prefix, adapter=True)
    student, teacher = run.views()
    instances = run.loss.instances(run.loss.predictions(student, teacher), run.batch)
    features, _ = run.loss.pooled(student, teacher, instances)
    fixture.compare(f"adapter_{prefix}pooled_student", features[instances.valid])
    for name in ("feature", "relation"):
        _compare_alone(fixture, prefix, name, adapter=True)


def _tolerance(name: str) -> dict[str, float]:
    """Relations are of the order of 1e-3: an absolute tolerance of 1e-5 says little."""
    return _RELATION if name == "relation" else {}
