"""Fixtures of ICD: sampling, description, decoder, losses and gradients, and variants of the settings.

"fix/" is compared with the loss as it is, "ref/" and "var/" with the reference's bugs switched on;
an array that "fix/" lacks equals that of "ref/". The random numbers are the fixture's.
"""

from __future__ import annotations

import json
from ast import literal_eval
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.losses.icd import InstanceConditionalDistillation
from distill_d2.losses.icd.descriptor import describe
from distill_d2.losses.icd.mimic import layer_norm
from distill_d2.losses.icd.projection import split_levels
from distill_d2.losses.icd.reference import from_reference
from distill_d2.losses.icd.sampling import Draws, SlotSampler
from distill_d2.losses.icd.settings import ICDSettings
from distill_d2.losses.settings import keys_of
from distill_d2.testing.maps import view_of
from distill_d2.views import Batch

from . import Fixture, golden_kind

_GRADIENT = {"rtol": 1e-4, "atol": 1e-6}
# The loss's terms by their names in the fixture; layers are counted.
_LAYER_TERMS = {"tea.{}.prop_conf": "loss_icd_conf_{}", "tea.{}.prop_reg": "loss_icd_reg_{}"}


@golden_kind(holds=["in/tea_feat/*", "w/teacher.ins_encoder.*", "rng/jitter_u/*"], rtol=1e-5, atol=1e-5)
def icd_decoder(fixture: Fixture) -> None:
    meta = json.loads(str(fixture["meta_json"]))
    for folder in ("ref/", "fix/"):
        run = _Run(fixture, meta, meta["iteration"], reference_bugs=folder == "ref/")
        if folder == "ref/":
            _compare_sampling(fixture, run)
            _compare_geometry(fixture, run)
        _compare_outcome(fixture, run, folder)
        _compare_parameters(fixture, run, folder)
        _compare_intermediates(fixture, run, folder)
    for name, variant in meta["variants"].items():
        settings = _overrides(variant["overrides"])
        bugs = variant["descriptor"] == "ref"
        run = _Run(fixture, meta, variant["iteration"], reference_bugs=bugs, **settings)
        _compare_outcome(fixture, run, f"var/{name}/")


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """The loss's arguments from KEY VALUE pairs."""
    return {key.rpartition(".")[2].lower(): _literal(v) for key, v in zip(pairs[::2], pairs[1::2])}


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class _RecordedSampler(SlotSampler):
    """Draws what the fixture recorded."""

    recorded: Draws

    def draw(self, count: int, random: np.random.Generator) -> Draws:
        return self.recorded


class _Run:
    """The loss on the fixture's inputs: one forward and backward, and what led to it."""

    def __init__(self, fixture: Fixture, meta: dict[str, Any], iteration: int, **settings: Any):
        self.levels: list[str] = meta["keys"]
        self.loss = _build_loss(fixture, meta, settings)
        teacher = {name: fixture.tensor(f"in/tea_feat/{name}") for name in self.levels}
        self.student = {
            name: fixture.tensor(f"in/stu_feat/{name}").requires_grad_() for name in self.levels
        }
        strides = dict(zip(self.levels, meta["strides"]))
        self.batch = _batch(fixture, iteration, meta["MAX_ITER"])
        views = view_of(self.student, "student", strides), view_of(teacher, "teacher", strides)
        self.loss.use_statistics(lambda: _statistics(fixture))
        self.loss.bind(*views)
        _record(self.loss, fixture)
        _load(self.loss, fixture)
        self.terms = self.loss(*views, self.batch)
        self.maps, self.queries, self.geometry = self.loss.read(views[1], self.batch)
        self.total = sum(self.terms.values())
        self.total.backward()


def _build_loss(
    fixture: Fixture, meta: dict[str, Any], settings: dict[str, Any]
) -> InstanceConditionalDistillation:
    given = {**meta, **meta["INS"], **meta["INS_ATT_MIMIC"]}
    arguments = {name.lower(): value for name, value in given.items()}
    arguments = {name: arguments[name] for name in keys_of(ICDSettings) if name in arguments}
    return InstanceConditionalDistillation(**{**arguments, **settings})


def _batch(fixture: Fixture, iteration: int, max_iter: int) -> Batch:
    inputs = []
    for index, (height, width) in enumerate(fixture["in/image_sizes_hw"].tolist()):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(fixture.tensor(f"in/gt_boxes/{index}"))
        instances.gt_classes = fixture.tensor(f"in/gt_classes/{index}")
        inputs.append({"image": torch.empty(3, height, width), "instances": instances})
    return Batch(inputs, tuple(fixture["in/padded_hw"].tolist()), iteration, max_iter)


def _statistics(fixture: Fixture) -> SimpleNamespace:
    mean, std = fixture["prior/ref_mean_std"][..., 2:].transpose(1, 0, 2)
    return SimpleNamespace(counts=fixture["prior/ref_class_prob"], mean=mean, std=std)


def _record(loss: InstanceConditionalDistillation, fixture: Fixture) -> None:
    """Replace the random numbers of the loss by the fixture's."""
    images = range(len(fixture["in/image_sizes_hw"]))

    def recorded(name: str) -> np.ndarray:
        return np.concatenate([fixture[f"rng/{name}/{index}"] for index in images])

    sizes = recorded("normal_draw")[:, 2:]
    draws = Draws(recorded("class_draw"), sizes, recorded("rand_xy"), recorded("jitter_u"))
    loss.queries.sampler.__class__ = _RecordedSampler
    loss.queries.sampler.recorded = draws


def _load(loss: InstanceConditionalDistillation, fixture: Fixture) -> None:
    """The fixture's weights; those of more layers than the loss has are left out."""
    weights = {name[2:]: fixture.tensor(name) for name in fixture.names("w/*")}
    own = loss.state_dict()
    loss.load_state_dict({k: v for k, v in from_reference(weights).items() if k in own})


def _compare_sampling(fixture: Fixture, run: _Run) -> None:
    sampler = run.loss.queries.sampler
    images = run.loss.queries.ground_truth(run.batch)
    slots = sampler.place(images, sampler.recorded)
    fixture.compare("enc/classes", slots.classes)
    fixture.compare("enc/boxes_norm", slots.boxes)
    fixture.compare("enc/jittered_xy", slots.points)
    fixture.compare("enc/ltrb_target", slots.ltrb)
    fixture.compare("enc/is_real", slots.is_real)
    fixture.compare("enc/pad_mask", slots.is_padding)


def _compare_geometry(fixture: Fixture, run: _Run) -> None:
    geometry = run.geometry
    shape = fixture["geo/pad_mask"].shape
    padding = torch.zeros(shape, dtype=torch.bool) if geometry.padding is None else geometry.padding
    fixture.compare("geo/pad_mask", padding)
    heights, widths = zip(*geometry.level_sizes)
    parts = zip(geometry.rows.split(heights, dim=1), geometry.columns.split(widths, dim=1))
    per_level = split_levels(padding, geometry.level_sizes)
    dense = []
    for name, part, size, (rows, columns) in zip(run.levels, per_level, geometry.level_sizes, parts):
        fixture.compare(f"geo/pad_mask/{name}", part[:, None].unflatten(-1, size))
        grid = torch.broadcast_tensors(rows[:, :, None], columns[:, None])
        dense.append(torch.cat(grid, dim=-1).flatten(1, 2))
    # Nothing attends to padding; distill_d2 leaves there the embedding of the image's border.
    expected = fixture.tensor("geo/pos_emb")
    actual = torch.cat(dense, dim=1).transpose(0, 1)
    fixture.compare("geo/pos_emb", torch.where(padding.t()[..., None], expected, actual))


def _compare_outcome(fixture: Fixture, run: _Run, folder: str) -> None:
    """Terms, their sum, and the student's gradients."""
    losses = {"distill.0.matt.value": run.terms["loss_icd_value"], "total": run.total}
    for layer in range(len(run.loss.decoder)):
        for name_in_fixture, term in _LAYER_TERMS.items():
            losses[name_in_fixture.format(layer)] = run.terms[term.format(layer)]
    if "loss_icd_temperature" in run.terms:
        losses["distill.0.temp.value"] = run.terms["loss_icd_temperature"]
    for name, value in losses.items():
        fixture.compare(_known(fixture, folder, f"loss/{name}"), value)
    missing = [run.student[name].grad is None for name in run.levels]
    fixture.compare(_known(fixture, folder, "grad/stu_feat_is_none"), missing)
    for name in run.levels:
        level = run.student[name]
        grad = torch.zeros_like(level) if level.grad is None else level.grad
        fixture.compare(_known(fixture, folder, f"grad/stu_feat/{name}"), grad, **_GRADIENT)


def _compare_parameters(fixture: Fixture, run: _Run, folder: str) -> None:
    """The gradients of all parameters, converted to the reference's shape."""
    prefix = f"{folder}grad/param/"
    parameters = dict(run.loss.named_parameters())
    for name in fixture.names(f"{prefix}*"):
        converted = from_reference({name[len(prefix) :]: fixture.tensor(name)})
        ((path, part),) = converted.items()
        actual = parameters[path].grad
        if actual.shape != fixture[name].shape:  # values only; the other rows have no gradient
            actual = torch.cat([torch.zeros_like(part), torch.zeros_like(part), actual])
        fixture.compare(name, actual, **_GRADIENT)


def _compare_intermediates(fixture: Fixture, run: _Run, folder: str) -> None:
    loss, queries, geometry = run.loss, run.queries, run.geometry
    with torch.no_grad():
        descriptor = describe(queries, loss.queries.classes, loss.settings.add_scale_indicator)
        decoded = loss.decode(run.maps, queries, geometry, run.batch.iteration)
        encoded = loss.queries(queries)
    arrays = {"enc/descriptor": _slots_first(descriptor), "enc/ins_feat": _slots_first(encoded)}
    for index, layer in enumerate(decoded):
        images = range(len(layer.features))
        logits = torch.stack([layer.logits(image, slice(None)) for image in images])
        student_values = loss.student[index].project(list(run.student.values()), geometry)
        arrays.update(
            {
                f"dec/{index}/attn_logits": logits,
                f"dec/{index}/attn_softmax": logits.softmax(-1),
                f"dec/{index}/value_mask": layer.attention_mass(queries.real, 1.0)[:, :, None],
                f"dec/{index}/feat": _slots_first(layer.features),
                f"dec/{index}/pred": _slots_first(loss.auxiliary.predictor(layer.features)),
            }
        )
        for side, values in (("tea", layer.values), ("stu", student_values)):
            heads = _slots_first(values).unflatten(-1, (loss.settings.att_heads, -1))
            arrays[f"dec/{index}/{side}_value"] = heads
            arrays[f"dec/{index}/{side}_value_normed"] = layer_norm(heads)
    for name, value in arrays.items():
        fixture.compare(_known(fixture, folder, name), value)


def _slots_first(values: torch.Tensor) -> torch.Tensor:
    """(N, K, ...) to the fixture's (K, N, ...)."""
    return values.transpose(0, 1)


def _known(fixture: Fixture, folder: str, name: str) -> str:
    """The array's full name; that of "ref/" where the folder leaves it out."""
    return folder + name if folder + name in fixture.arrays else f"ref/{name}"
