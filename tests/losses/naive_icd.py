"""ICD's loss as its paper's code computes it, plainly: an oracle for the package's version, and the
other side of its benchmark.

Nothing here is shared with the package, nothing is fused, cached or left out: what the original computes
and never uses is computed here too. B3, B14 and the like are the original's known faults and costs.

Shapes: N images, K query slots, S cells of all levels, C channels, h heads of d channels, D descriptor
length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEACHER, STUDENT = "teacher.attention_module.", "distillers.0.attention_module."
ENCODER, PREDICTOR = "teacher.ins_encoder.encoder.", "teacher.ins_encoder.predictor."
POSITION_CHANNELS = 128  # of one coordinate of a query, whatever the hidden size
SCALE_BINS = 5
UNIFORM_MEAN_STD = 0.2  # of a fake's box where there are no statistics


# ------------------------------------------------------------------------------------------ queries


@dataclass
class NaiveQueries:
    """Slots of a batch, padded to the longest image; a padded slot is zero but for `is_padding`."""

    classes: Tensor  # (N, K) int64
    boxes: Tensor  # (N, K, 4) float32, XYXY / (W, H, W, H)
    points: Tensor  # (N, K, 2) float32, jittered x', y'
    ltrb: Tensor  # (N, K, 4) float32, the point's distances to the box's sides
    is_real: Tensor  # (N, K) float32
    is_padding: Tensor  # (N, K) bool

    def to(self, device) -> "NaiveQueries":
        return NaiveQueries(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass
class Slots:
    """What was drawn for the k slots of one image, real ones included."""

    classes: np.ndarray  # (k,)
    normal: np.ndarray  # (k, 4) cx, cy, w, h before clipping
    xy: np.ndarray  # (k, 2) in [0, 1)
    jitter: np.ndarray  # (k, 2) in [0, 1)


def slot_count(n: int, ins: dict) -> int:
    """Slots of an image with n instances."""
    if ins["SAMPLE_RULE"] == "fixed":
        return max(ins["NUM_LABELS"], n)
    return min(max(1, int(n * (ins["NUM_NEG_POS_RATIO"] + 1))), max(ins["MAX_LABELS"], n))


def draw_slots(rng: np.random.RandomState, k: int, class_prob, mean_std) -> Slots:
    """Random slots of one image; `mean_std` (classes, 2, 4), `class_prob` (classes,)."""
    classes = rng.choice(len(class_prob), size=k, p=class_prob)
    normal = np.stack([rng.normal(mean_std[c, 0], mean_std[c, 1]) for c in classes])
    return Slots(classes, normal, rng.uniform(size=(k, 2)), rng.uniform(size=(k, 2)))


def fake_boxes(slots: Slots, mean_std: np.ndarray) -> Tensor:
    """Boxes (k, 4) XYXY in [0, 1] of the drawn sizes and centers."""
    mean, std = mean_std[slots.classes, 0], mean_std[slots.classes, 1]
    size = np.clip(slots.normal, mean - 2 * std, mean + 2 * std)[:, 2:]
    size = np.clip(size, 2e-3, 0.7)
    center = np.clip(slots.xy, 0.03, 0.97)
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    return torch.from_numpy(np.clip(boxes, 0, 1)).float()


def jittered(boxes: Tensor, jitter: np.ndarray, sample_range: float) -> tuple[Tensor, Tensor]:
    """A point inside each box (k, 2) and its distances to the left, top, right and bottom (k, 4)."""
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    points = center + (2 * torch.from_numpy(jitter).float() - 1) * sample_range * size
    return points, torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], dim=1)


def image_queries(slots, gt_boxes, gt_classes, image_size, mean_std, sample_range) -> tuple[Tensor, ...]:
    """classes, boxes, points, ltrb, is_real of one image: drawn slots, the first n made real."""
    height, width = image_size
    n = len(gt_classes)
    classes, boxes = torch.from_numpy(np.asarray(slots.classes)).long(), fake_boxes(slots, mean_std)
    classes[:n] = torch.as_tensor(gt_classes)
    boxes[:n] = torch.as_tensor(gt_boxes).reshape(-1, 4) / torch.tensor([width, height, width, height])
    points, ltrb = jittered(boxes, slots.jitter, sample_range)
    is_real = torch.zeros(len(classes))
    is_real[:n] = 1
    return classes, boxes, points, ltrb, is_real


def padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Tensors (k_i, ...) as one (N, length, ...), zeros behind."""
    result = rows[0].new_zeros((len(rows), length) + rows[0].shape[1:])
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


def queries_from_slots(
    slots: Sequence[Slots],
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    mean_std: np.ndarray,
    sample_range: float,
) -> NaiveQueries:
    """The batch's queries from its draws; `gt_boxes` absolute XYXY per image, `image_sizes` (h, w)."""
    batch = zip(slots, gt_boxes, gt_classes, image_sizes)
    images = [image_queries(*image, mean_std, sample_range) for image in batch]
    length = max(len(image[0]) for image in images)
    columns = [padded(rows, length) for rows in zip(*images)]
    is_padding = torch.ones(len(images), length, dtype=torch.bool)
    for i, image in enumerate(images):
        is_padding[i, : len(image[0])] = False
    return NaiveQueries(*columns, is_padding)


def draw_queries(
    rng: np.random.RandomState,
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    ins: dict,
    mimic: dict,
    *,
    mean_std: Optional[np.ndarray] = None,
    class_prob: Optional[np.ndarray] = None,
) -> NaiveQueries:
    """Queries of a batch with new draws, image by image.

    `mean_std` (classes, 2, 4) and `class_prob` (classes,); without them, or if `ins` says so, uniform.
    """
    classes = ins["NUM_CLASSES"]
    if class_prob is None or ins.get("UNIFORM_SAMPLE_CLASS"):
        class_prob = np.full(classes, 1 / classes)
    if mean_std is None or ins.get("UNIFORM_SAMPLE_BOX"):
        mean_std = np.full((classes, 2, 4), UNIFORM_MEAN_STD)
    slots = [draw_slots(rng, slot_count(len(real), ins), class_prob, mean_std) for real in gt_classes]
    return queries_from_slots(
        slots, gt_boxes, gt_classes, image_sizes, mean_std=mean_std, sample_range=mimic["SAMPLE_RANGE"]
    )


# --------------------------------------------------------------------------------------- descriptor


def encoded(values: Tensor) -> Tensor:
    """Positional code (K, 128) of scalars (K,): even channels' sines, then odd channels' cosines."""
    channel = torch.arange(POSITION_CHANNELS, dtype=values.dtype, device=values.device)
    period = 10000 ** (2 * torch.floor(channel / 2) / POSITION_CHANNELS)
    angle = values[:, None] * 2 * math.pi / period
    return torch.cat([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=1)


def scale_one_hot(pixels: Tensor) -> Tensor:
    """Coarse size (K, 5) of lengths in pixels (K,)."""
    scale = torch.floor(torch.clamp(1.44 * torch.log(pixels) - 5, 0, SCALE_BINS - 1))
    return F.one_hot(scale.long(), SCALE_BINS).to(pixels.dtype)


# ----------------------------------------------------------------------------------------- geometry


def padding_masks(shapes: dict[str, tuple], image_sizes, padded_size, device) -> dict[str, Tensor]:
    """True on padding, (N, 1, H, W) per level."""
    masks = {}
    for name, (height, width) in shapes.items():
        stride = (padded_size[0] / height + padded_size[1] / width) / 2
        mask = torch.ones(len(image_sizes), 1, height, width, dtype=torch.bool, device=device)
        for i, (h, w) in enumerate(image_sizes):
            mask[i, :, : math.ceil(h / stride), : math.ceil(w / stride)] = False
        masks[name] = mask
    return masks


def sines(values: Tensor, channels: int) -> Tensor:
    """(N, H, W) -> (N, H, W, channels), sines and cosines interleaved."""
    channel = torch.arange(channels, dtype=values.dtype, device=values.device)
    angle = values[..., None] / 10000 ** (2 * torch.floor(channel / 2) / channels)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


@torch.no_grad()
def position_embedding(mask: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """DETR's normalized sine embedding (N, C, H, W) of a padding mask (N, 1, H, W)."""
    valid = (~mask[:, 0]).to(dtype)
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sines(y, channels // 2), sines(x, channels // 2)], dim=-1).permute(0, 3, 1, 2)


def sequence(levels: dict[str, Tensor]) -> Tensor:
    """Maps (N, C, H, W) of all levels -> (S, N, C)."""
    return torch.cat([level.flatten(2).permute(2, 0, 1) for level in levels.values()])


# --------------------------------------------------------------------------------------------- loss


def batch_wise(form: str, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The error of values (S, N, h, d) under a mask (N, h, 1, S), averaged over the batch at once."""
    if form == "l1":
        error = F.l1_loss(student, teacher, reduction="none")
    elif form == "smoothL1":
        error = F.smooth_l1_loss(student, teacher, reduction="none", beta=1.0)
    else:
        error = F.mse_loss(student, teacher, reduction="none")
    weight = mask.squeeze(2).permute(2, 0, 1)
    loss = (weight * error.mean(-1)).sum() / weight.sum().clamp(min=1e-6)
    return loss.sqrt() if form in ("L2", "l2") else loss


def value_loss(form: str, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The loss of one layer: values (S, N, h, d), mask (N, h, 1, S)."""
    if form in ("l1", "smoothL1", "L2", "l2"):
        return batch_wise(form, student, teacher, mask)
    if form not in ("mse", "MSE"):
        raise ValueError(f"unknown LOSS_FORM {form!r}")  # B9
    student, teacher = student.permute(1, 2, 3, 0), teacher.permute(1, 2, 3, 0)
    error = F.mse_loss(student, teacher, reduction="none") * mask  # (N, h, d, S)
    return (error.sum(-1) / mask.sum(-1).clamp(min=1e-6)).mean()


class NaiveICD:
    """ICD's training loss with weights of the original's names."""

    def __init__(self, weights: dict[str, Tensor], ins: dict, mimic: dict, reference_bugs: bool = False):
        """`ins`, `mimic`: the settings INS and INS_ATT_MIMIC. `reference_bugs`: with B3 and B8."""
        self.weights = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
        self.ins, self.mimic, self.reference_bugs = ins, mimic, reference_bugs
        self.heads, self.channels = ins["ATT_HEADS"], ins["HIDDEN_DIM"]
        self.layers = max(1, ins["ATT_LAYERS"])

    # -- small parts

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, (self.channels,), weight, bias, 1e-5)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        """Three linear layers with ReLU between."""
        x = F.relu(self._linear(x, name + "layers.0"))
        x = F.relu(self._linear(x, name + "layers.1"))
        return self._linear(x, name + "layers.2")

    def _names(self, side: str, layer: int) -> tuple[str, str]:
        """Where a layer's attention and its other weights are; without layers there is no index."""
        if self.ins["ATT_LAYERS"] == 0 and f"{side}matt.in_proj_weight" in self.weights:
            return f"{side}matt.", side
        return f"{side}matt.{layer}.matt.", f"{side}matt.{layer}."

    # -- queries

    @torch.no_grad()
    def descriptor(self, queries: NaiveQueries, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(N, K, D): one-hot class, codes of x' and y', one-hot sizes."""
        if self.reference_bugs:  # B3
            image_sizes = [image_sizes[-1]] * len(image_sizes)
        images = [self._image_descriptor(queries, i, size) for i, size in enumerate(image_sizes)]
        return torch.stack(images)

    def _image_descriptor(self, queries: NaiveQueries, i: int, image_size: tuple[int, int]) -> Tensor:
        """(K, D) of image i; a padded slot is of class 0, at the origin and of no size."""
        height, width = image_size
        boxes, filled = queries.boxes[i], ~queries.is_padding[i, :, None]
        parts = [F.one_hot(queries.classes[i], self.ins["NUM_CLASSES"])]
        parts += [encoded(queries.points[i, :, 0]), encoded(queries.points[i, :, 1])]
        if self.ins["ADD_SCALE_INDICATOR"]:
            parts.append(scale_one_hot((boxes[:, 2] - boxes[:, 0]) * width) * filled)
            parts.append(scale_one_hot((boxes[:, 3] - boxes[:, 1]) * height) * filled)
        return torch.cat([part.to(boxes.dtype) for part in parts], dim=1)

    # -- decoder

    def _keys_and_values(self, memory: Tensor, position: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """What keys and values are projected from, (S, N, C) each."""
        if not self.ins["USE_POS_EMBEDDING"]:
            return memory, memory
        if self.ins["PROJECT_POS"]:
            position = self._linear(position, name + "pos_projector")
        placed = memory + position
        return placed, placed if self.ins["DECODER_POSEMB_ON_V"] else memory

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, name: str) -> tuple[Tensor, ...]:
        """Scaled q (K, N, C), k and v (S, N, C)."""
        weight, bias = self.weights[name + "in_proj_weight"], self.weights[name + "in_proj_bias"]
        c = self.channels
        q = F.linear(query, weight[:c], bias[:c]) / math.sqrt(c // self.heads)
        if torch.equal(key, value):  # B12
            k, v = F.linear(key, weight[c:], bias[c:]).chunk(2, dim=-1)
            return q, k, v
        k = F.linear(key, weight[c : 2 * c], bias[c : 2 * c])
        return q, k, F.linear(value, weight[2 * c :], bias[2 * c :])

    def _by_head(self, x: Tensor) -> Tensor:
        """(L, N, C) -> (N h, L, d)."""
        length, images, channels = x.shape
        x = x.contiguous().view(length, images * self.heads, channels // self.heads)
        return x.transpose(0, 1)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        """Attention before its output projection (K, N, C), logits and softmax (N, h, K, S)."""
        slots, images, channels = q.shape
        logits = torch.bmm(self._by_head(q), self._by_head(k).transpose(1, 2))
        logits = logits.view(images, self.heads, slots, -1)
        logits = logits.masked_fill(padding[:, None, None, :], float("-inf"))
        attention = logits.softmax(-1)
        dropped = F.dropout(attention, self.ins.get("DROPOUT", 0.0))
        result = torch.bmm(dropped.view(images * self.heads, slots, -1), self._by_head(v))
        return result.transpose(0, 1).reshape(slots, images, channels), logits, attention

    def _rest_of_layer(self, query: Tensor, name: str) -> Tensor:
        """Both norms and the feed-forward network, (K, N, C)."""
        x = self._norm(query, name + "norm1")
        hidden = F.relu(self._linear(x, name + "linear_in"))
        return self._norm(x + self._linear(hidden, name + "linear_out"), name + "norm2")

    def _teacher_layer(self, l: int, query, memory, position, padding) -> tuple[Tensor, ...]:
        """Decoded queries (K, N, C), logits and attention (N, h, K, S), values (S, N, h, d)."""
        attention_name, name = self._names(TEACHER, l)
        key, value = self._keys_and_values(memory, position, name)
        q, k, v = self._projected(query, key, value, attention_name)
        out, logits, attention = self._attended(q, k, v, padding)
        out = self._linear(out, attention_name + "out_proj")
        if self.ins["ATT_LAYERS"] > 0:
            out = self._rest_of_layer(query + out, name)
        return out, logits, attention, v.unflatten(-1, (self.heads, -1))

    def _student_layer(self, l: int, query, memory, position) -> tuple[Tensor, Tensor]:
        """A query nobody reads (K, N, C), values (S, N, h, d): a layer without its attention (B14)."""
        attention_name, name = self._names(STUDENT, l)
        key, value = self._keys_and_values(memory, position, name)
        _, _, v = self._projected(query, key, value, attention_name)
        if self.ins["ATT_LAYERS"] > 0:
            query = self._rest_of_layer(query, name)
        return query, v.unflatten(-1, (self.heads, -1))

    # -- losses

    def _auxiliary(self, prediction: Tensor, queries: NaiveQueries) -> tuple[Tensor, Tensor]:
        """Existence and localization losses of predictions (K, N, 5)."""
        prediction = prediction.transpose(0, 1)
        is_real = queries.is_real.to(prediction.dtype)
        filled = (~queries.is_padding).to(prediction.dtype)
        error = F.binary_cross_entropy_with_logits(prediction[..., 0], is_real, reduction="none")
        confidence = (error * filled).sum() / filled.sum().clamp(min=1e-6)

        left, top, right, bottom = queries.ltrb.unbind(-1)
        size = torch.stack([left + right, top + bottom, left + right, top + bottom], -1)
        error = (prediction[..., 1:].sigmoid() - queries.ltrb).abs() / size.clamp(min=1e-7)
        regression = (error.sum(-1) * is_real).sum() / is_real.sum().clamp(min=1e-6)
        return self.ins["CONFIDENCE_LOSS_WEIGHT"] * confidence, regression

    def _temperature(self, iteration: int, max_iter: int) -> float:
        value = self.mimic["TEMP_VALUE"]
        if value < 0:
            return min(max(1.0, 0.1), 8.0)  # meant to be learned; it never is (B8)
        if self.mimic["TEMP_DECAY"]:
            ratio = iteration / max_iter
            return ratio * self.mimic["TEMP_DECAY_TO"] + (1 - ratio) * value
        return value

    @torch.no_grad()
    def _value_mask(self, logits: Tensor, queries: NaiveQueries, temperature: float) -> Tensor:
        """(N, h, 1, S): the attention of the real slots, summed."""
        chosen = ~queries.is_padding if self.mimic["DISTILL_NEGATIVE"] else queries.is_real
        attention = (logits / temperature).softmax(-1)
        return (attention * chosen.to(logits.dtype)[:, None, :, None]).sum(2, keepdim=True)

    def _normed(self, values: Tensor, norms: Sequence[str]) -> Tensor:
        """Values (S, N, h, d), normalized over d if the setting is one of `norms`."""
        if self.ins["DISTILL_NORM"] not in norms:
            return values
        return F.layer_norm(values, values.shape[-1:], eps=1e-5)

    def _geometry(self, feats: dict[str, Tensor], image_sizes, padded_size) -> dict[str, Tensor]:
        """Padding masks per level and of all cells (N, S), position embedding (S, N, C)."""
        some = next(iter(feats.values()))
        shapes = {name: tuple(level.shape[-2:]) for name, level in feats.items()}
        masks = padding_masks(shapes, image_sizes, padded_size, some.device)
        positions = {n: position_embedding(mask, self.channels, some.dtype) for n, mask in masks.items()}
        result = {f"geo/pad_mask/{name}": mask for name, mask in masks.items()}
        result["geo/pad_mask"] = torch.cat([mask.flatten(1) for mask in masks.values()], dim=1)
        result["geo/pos_emb"] = sequence(positions)
        return result

    # -- the step

    def _encode(self, queries: NaiveQueries, image_sizes, descriptor, like: Tensor) -> dict[str, Tensor]:
        """Queries' arrays, their descriptor (K, N, D) and features (K, N, C)."""
        if descriptor is None:
            descriptor = self.descriptor(queries, image_sizes)
        descriptor = descriptor.transpose(0, 1).to(like.dtype)
        return {
            "enc/classes": queries.classes,
            "enc/boxes_norm": queries.boxes,
            "enc/jittered_xy": queries.points,
            "enc/ltrb_target": queries.ltrb,
            "enc/is_real": queries.is_real,
            "enc/pad_mask": queries.is_padding,
            "enc/descriptor": descriptor,
            "enc/ins_feat": self._mlp(descriptor, ENCODER),
        }

    def _teacher_side(self, out: dict, memory: Tensor, queries: NaiveQueries) -> dict[str, Tensor]:
        """Decodes the queries, layer after layer; puts the arrays into `out`, returns the losses."""
        losses, reconstruction = {}, []
        query = out["enc/ins_feat"]
        for l in range(self.layers):
            layer = self._teacher_layer(l, query, memory, out["geo/pos_emb"], out["geo/pad_mask"])
            query, _, _, values = layer
            prediction = self._mlp(query, PREDICTOR)
            names = ("feat", "attn_logits", "attn_softmax", "tea_value", "pred")
            out.update(zip((f"dec/{l}/{name}" for name in names), (*layer, prediction)))
            confidence, regression = self._auxiliary(prediction, queries)
            losses[f"tea.{l}.prop_conf"], losses[f"tea.{l}.prop_reg"] = confidence, regression
            if self.ins.get("VALUE_RECONST", -1) > 0:
                restored = self._linear(values.flatten(2), f"teacher.reconst_projector.{l}")
                reconstruction.append(F.mse_loss(restored, memory.detach()))
        if reconstruction:
            losses["loss_reconst"] = torch.stack(reconstruction).mean()
        return losses

    def _student_side(self, out: dict, memory, position, queries: NaiveQueries, temperature) -> Tensor:
        """Distillation loss from the layers' arrays in `out`; puts the student's beside them."""
        losses = []
        query = out["enc/ins_feat"]
        for l in range(self.layers):
            query, values = self._student_layer(l, query, memory, position)
            student = self._normed(values, ["ln"])
            teacher = self._normed(out[f"dec/{l}/tea_value"], ["ln", "tln"]).detach()
            mask = self._value_mask(out[f"dec/{l}/attn_logits"], queries, temperature)
            names = ("stu_value", "stu_value_normed", "tea_value_normed", "value_mask")
            out.update(zip((f"dec/{l}/{name}" for name in names), (values, student, teacher, mask)))
            losses.append(value_loss(self.mimic["LOSS_FORM"], student, teacher, mask))
        return torch.stack(losses).mean() * self.mimic["WEIGHT_VALUE"]

    def forward(
        self,
        tea_feats: dict[str, Tensor],
        stu_feats: dict[str, Tensor],
        queries: NaiveQueries,
        image_sizes: list[tuple[int, int]],
        padded_size: tuple[int, int],
        *,
        iteration: int,
        max_iter: int,
        distil: bool = True,
        descriptor: Optional[Tensor] = None,
    ) -> dict:
        """Losses of one step, and what they were computed from.

        tea_feats, stu_feats: (N, C, H, W) by level, finest first; image_sizes, padded_size: (h, w).
        distil: False keeps the loss from the student. descriptor: (N, K, D) instead of the queries' own.
        Returns "losses" and the arrays of the steps, as "enc/...", "geo/...", "dec/{layer}/...". They
        hold memory: a benchmark should take the losses and let go of the rest.
        """
        tea_feats = {name: level.detach() for name, level in tea_feats.items()}
        if not distil:
            stu_feats = {name: level.detach() for name, level in stu_feats.items()}
        teacher, student = sequence(tea_feats), sequence(stu_feats)
        out = self._encode(queries, image_sizes, descriptor, teacher)
        out.update(self._geometry(tea_feats, image_sizes, padded_size))
        out["losses"] = losses = self._teacher_side(out, teacher, queries)

        losses["distill.0.matt.value"] = student.new_zeros(())
        if self.mimic["WEIGHT_VALUE"] > 0:
            position = self._geometry(stu_feats, image_sizes, padded_size)["geo/pos_emb"]  # again (B13)
            temperature = self._temperature(iteration, max_iter)
            value = self._student_side(out, student, position, queries, temperature)
            losses["distill.0.matt.value"] = value
            if self.reference_bugs and self.mimic["TEMP_VALUE"] < 0:  # B8
                losses["distill.0.temp.value"] = student.new_tensor(temperature)
        return out


# ------------------------------------------------------------------------------------------ weights


def linear_shapes(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {name + ".weight": (outputs, inputs), name + ".bias": (outputs,)}


def mlp_shapes(name: str, inputs: int, hidden: int, outputs: int) -> dict[str, tuple[int, ...]]:
    shapes = linear_shapes(name + "layers.0", hidden, inputs)
    shapes.update(linear_shapes(name + "layers.1", hidden, hidden))
    shapes.update(linear_shapes(name + "layers.2", outputs, hidden))
    return shapes


def attention_shapes(attention_name: str, name: str, c: int) -> dict[str, tuple[int, ...]]:
    shapes = {attention_name + "in_proj_weight": (3 * c, c), attention_name + "in_proj_bias": (3 * c,)}
    shapes.update(linear_shapes(attention_name + "out_proj", c, c))
    shapes.update(linear_shapes(name + "pos_projector", c, c))
    return shapes


def layer_shapes(name: str, c: int) -> dict[str, tuple[int, ...]]:
    shapes = attention_shapes(name + "matt.", name, c)
    shapes.update(linear_shapes(name + "linear_in", 4 * c, c))
    shapes.update(linear_shapes(name + "linear_out", c, 4 * c))
    for norm in ("norm1", "norm2"):
        shapes.update({f"{name}{norm}.weight": (c,), f"{name}{norm}.bias": (c,)})
    return shapes


def weight_shapes(hidden_dim: int, layers: int, classes: int, add_scale: bool, reconst: bool) -> dict:
    inputs = classes + 2 * POSITION_CHANNELS + (2 * SCALE_BINS if add_scale else 0)
    shapes = mlp_shapes(ENCODER, inputs, hidden_dim, hidden_dim)
    shapes.update(mlp_shapes(PREDICTOR, hidden_dim, hidden_dim, 5))
    shapes.update(mlp_shapes("distillers.0.predictor.", hidden_dim, hidden_dim, 1))  # of no use (B14)
    for side in (TEACHER, STUDENT):
        if layers == 0:
            shapes.update(attention_shapes(f"{side}matt.", side, hidden_dim))
        for l in range(layers):
            shapes.update(layer_shapes(f"{side}matt.{l}.", hidden_dim))
    for l in range(max(1, layers) if reconst else 0):
        shapes.update(linear_shapes(f"teacher.reconst_projector.{l}", hidden_dim, hidden_dim))
    return shapes


def random_weights(
    generator: torch.Generator,
    *,
    hidden_dim: int,
    heads: int,
    layers: int,
    classes: int,
    add_scale: bool = True,
    reconst: bool = False,
) -> dict[str, Tensor]:
    """Weights of all names, none of them trivial, for an attention that is not uniform.

    `heads` only has to divide `hidden_dim`. `reconst`: VALUE_RECONST's as well.
    """
    if hidden_dim % heads:
        raise ValueError(f"{heads} heads cannot share {hidden_dim} channels")
    weights = {}
    for name, shape in weight_shapes(hidden_dim, layers, classes, add_scale, reconst).items():
        values = torch.randn(shape, generator=generator, device=generator.device)
        weights[name] = values / math.sqrt(shape[-1]) if len(shape) == 2 else 0.1 * values
        if ".norm" in name and name.endswith(".weight"):
            weights[name] += 1
        if name.endswith("in_proj_weight"):
            weights[name][: 2 * hidden_dim] *= 3
    return weights
