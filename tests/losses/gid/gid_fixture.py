"""A golden fixture of GID in another configuration, from the naive version; nothing of the package.

Three images: one of many tiny boxes, one whose boxes are all too small, one with two clusters of boxes.
Nine anchors per cell, odd map sizes, a student with fewer channels for the adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from naive_gid import (
    CANONICAL_LEVEL,
    CANONICAL_SIZE,
    Box,
    Instance,
    adapt,
    area,
    boxes_of,
    category,
    clip,
    decode_rows,
    feature_loss,
    iou,
    level_of,
    match,
    matcher_mask,
    numbers,
    pool,
    relation_loss,
    response_loss,
    select,
    sigmoid_probabilities,
)
from torch import Tensor

Arrays = dict[str, np.ndarray]

SCENARIOS = {"all_": (0, 1, 2), "empty_": (1,), "two_": (2,), "empty_two_": (1, 2)}
WITHOUT_GRADIENTS = ("two_",)
CONFIG = {
    "nms": 0.3,
    "pre": 3000,
    "post": 10,
    "res": 10,
    "sr": 2,
    "wf": 0.0005,
    "wr": 40.0,
    "wc": 0.1,
    "wb": 1.0,
    "rbeta": 0.1,
}
WEIGHT_KEYS = {"feature": "wf", "relation": "wr", "cls_logits": "wc", "reg_deltas": "wb"}
MODES = {
    "feature_L1_b0": ("L1", 0.0),
    "feature_L1_b0.5": ("L1", 0.5),
    "cls_L2": ("L2", 0.0),
    "cls_L1_b0.3": ("L1", 0.3),
    "reg_L1_b0.1": ("L1", 0.1),
    "reg_L2": ("L2", 0.0),
    "reg_BCE": ("BCE", 0.0),
}
MIN_SIDE, THRESHOLDS, LABELS = 10.0, (0.4, 0.5), (0, -1, 1)
LEVELS = (3, 4, 5, 6, 7)

CLASSES, CHANNELS, NARROW_CHANNELS = 5, 8, 6
SIZES, PADDED = [(240, 320), (256, 290), (250, 300)], (256, 320)
STRIDES = [2**level for level in LEVELS]
RATIOS, OCTAVES, ANCHOR_SCALE = (0.5, 1.0, 2.0), (0, 1 / 3, 2 / 3), 4
GT = {
    0: [((20, 15, 95, 80), 1), ((110, 40, 310, 200), 3), ((60, 150, 90, 190), 0)],
    2: [((30, 50, 120, 150), 4), ((160, 90, 280, 230), 2)],
}
CLUSTERS = ((30, 50, 120, 150), (160, 90, 280, 230))  # of image 2


def make_fixture(seed: int = 1) -> Arrays:
    """All arrays by name, those of gid.md. Not every seed keeps its distance from all ties; 1 does."""
    arrays = _inputs(seed)
    arrays.update(outputs(arrays, SCENARIOS, narrow="student_narrow_feat"))
    return arrays


# -------------------------------------------------------------------------------------------- outputs


class _Selected(NamedTuple):
    """What was decided for all images of a fixture."""

    probabilities: dict[str, list[list[list]]]  # of both models
    boxes: dict[str, list[list[list]]]  # decoded, of both models
    instances: list[list[Instance]]  # by the authors' score
    paper_instances: list[list[Instance]]
    masks: list[list[bool]]


def outputs(arrays: Arrays, scenarios: dict[str, Sequence[int]], narrow: str) -> Arrays:
    """Everything that a fixture records of its inputs. The first scenario is of all images, it gets the
    other modes, the paper's score and the adapter, for the maps called `narrow`."""
    selected = _select(arrays)
    result = _common(arrays, selected)
    for prefix, images in scenarios.items():
        found = _scenario(arrays, images, selected, prefix not in WITHOUT_GRADIENTS)
        result.update({prefix + name: array for name, array in found.items()})
    first, images = next(iter(scenarios.items()))
    pooled = [
        _pool(arrays, _maps(_inputs_of(arrays, model, images)), selected.instances)
        for model in ("teacher", "student")
    ]
    for name, array in {**_modes(arrays, selected, pooled), **_paper(selected)}.items():
        result[first + name] = array
    for name, array in _adapter(arrays, selected, pooled[0], narrow).items():
        result[f"adapter_{first}{name}"] = array
    return result


def config_of(arrays: Arrays) -> dict:
    return json.loads(str(arrays["cfg_json"]))


def _select(arrays: Arrays) -> _Selected:
    config, anchors = config_of(arrays), torch.from_numpy(arrays["anchors"])
    probabilities, boxes = {}, {}
    for model in ("teacher", "student"):
        logits, deltas = (torch.from_numpy(arrays[f"{model}_{kind}"]) for kind in ("logits", "deltas"))
        probabilities[model] = [sigmoid_probabilities(rows) for rows in logits]
        boxes[model] = [decode_rows(anchors, rows) for rows in deltas]
    sizes = [tuple(size) for size in arrays["image_sizes"].tolist()]
    options = {"nms_thresh": config["nms"], "pre_nms_topk": config["pre"]}
    options.update(post_nms_topk=config["post"], min_side=MIN_SIDE)
    both = [*probabilities.values(), *boxes.values()]
    instances = select(*both, sizes, score="max_first", **options)
    paper_instances = select(*both, sizes, score="classwise", **options)
    rows = numbers(anchors)
    masks = [matcher_mask(rows, found, THRESHOLDS, LABELS) for found in boxes_of(instances)]
    return _Selected(probabilities, boxes, instances, paper_instances, masks)


def _common(arrays: Arrays, selected: _Selected) -> Arrays:
    differences, boxes = [], []
    both = (selected.probabilities[m] for m in ("teacher", "student")), selected.boxes.values()
    for teacher, student, *decoded in zip(*both[0], *both[1]):
        found = [max(t) - max(s) for t, s in zip(teacher, student)]
        differences.append(found)
        boxes.append([t if d > 0 else s for d, t, s in zip(found, *decoded)])
    labels = [_gt_labels(arrays, image) for image in range(len(arrays["image_sizes"]))]
    return {
        "gi_diff_all": np.array(differences, np.float32),
        "gi_box_all": np.array(boxes, np.float32),
        "gt_labels": np.array(labels, np.int64),
        "ref_stats_json": np.array(json.dumps(_counts(arrays, selected, labels))),
        "margins_json": np.array(json.dumps(_margins(arrays, selected))),
    }


def _scenario(arrays: Arrays, images: Sequence[int], selected: _Selected, gradients: bool) -> Arrays:
    images, strides, config = list(images), arrays["strides"].tolist(), config_of(arrays)
    instances = [selected.instances[image] for image in images]
    flat = [instance for image in instances for instance in image]
    of_image = [position for position, image in enumerate(instances) for _ in image]
    masks = [selected.masks[image] for image in images]
    teacher, student = _inputs_of(arrays, "teacher", images), _inputs_of(arrays, "student", images)
    for tensor in student.values():
        tensor.requires_grad_()
    pooled = [_pool(arrays, _maps(inputs), instances) for inputs in (teacher, student)]
    raw = {
        "feature": feature_loss(*pooled),
        "relation": relation_loss(*pooled, of_image),
        "cls_logits": response_loss(teacher["logits"], student["logits"], masks, "BCE"),
        "reg_deltas": response_loss(
            *(inputs["deltas"] for inputs in (teacher, student)), masks, "L1", config["rbeta"]
        ),
    }
    found = {
        "images": np.array(images),
        "gi_count": np.array([len(image) for image in instances]),
        "gi_boxes": _boxes_array(flat),
        "gi_scores": _scores_array(flat),
        "gi_index": np.array([instance.row for instance in flat], np.int64),
        "gi_image": np.array(of_image, np.int64),
        "gi_from_teacher": np.array([instance.from_teacher for instance in flat], np.uint8),
        "gi_level": np.array([level_of(instance.box, strides) for instance in flat], np.int64),
        "response_mask": np.array(masks, np.uint8),
        "pooled_teacher": _array(pooled[0]),
        "pooled_student": _array(pooled[1]),
        "loss_raw_relation_f64": raw["relation"].detach().numpy(),
    }
    for name, loss in raw.items():
        found[f"loss_raw_{name}"] = _array(loss)
        found[f"loss_weighted_{name}"] = _array(config[WEIGHT_KEYS[name]] * loss)
    if gradients:
        found.update(_gradients(raw, student, config))
    return found


def _gradients(raw: dict[str, Tensor], student: dict[str, Tensor], config: dict) -> Arrays:
    of_term = {name: _differentiate(loss, student) for name, loss in raw.items()}
    total = {}
    for name, tensor in student.items():
        total[name] = torch.zeros_like(tensor)
        for term, gradients in of_term.items():
            total[name] += config[WEIGHT_KEYS[term]] * gradients[name]
    of_term["weighted_total"] = total
    found = {}
    for term, gradients in of_term.items():
        for name, gradient in gradients.items():
            mine = name == {"cls_logits": "logits", "reg_deltas": "deltas"}.get(term, name)
            if mine and (name[:4] == "feat" or term not in ("feature", "relation")):
                found[f"grad_{term}__student_{name}"] = _array(gradient)
    return found


def _modes(arrays: Arrays, selected: _Selected, pooled: Sequence[Tensor]) -> Arrays:
    images = range(len(selected.instances))
    teacher, student = (_inputs_of(arrays, model, images) for model in ("teacher", "student"))
    found = {}
    for name, (mode, beta) in MODES.items():
        if name.startswith("feature"):
            loss = feature_loss(*pooled, mode, beta)
        else:
            kind = {"cls": "logits", "reg": "deltas"}[name[:3]]
            loss = response_loss(teacher[kind], student[kind], selected.masks, mode, beta)
        found[f"mode_{name}"] = _array(loss)
    return found


def _paper(selected: _Selected) -> Arrays:
    scores = []
    for teacher, student in zip(*(selected.probabilities[m] for m in ("teacher", "student"))):
        rows = zip(teacher, student)
        scores.append([max(abs(a - b) for a, b in zip(t, s)) for t, s in rows])
    flat = [instance for image in selected.paper_instances for instance in image]
    counts = [len(image) for image in selected.paper_instances]
    return {
        "paper_gi_score_all": np.array(scores, np.float32),
        "paper_gi_count": np.array(counts, np.int64),
        "paper_gi_boxes": _boxes_array(flat),
        "paper_gi_scores": _scores_array(flat),
    }


def _adapter(arrays: Arrays, selected: _Selected, teacher: Tensor, narrow: str) -> Arrays:
    names = {f"student_feat_p{level}": f"{narrow}_p{level}" for level in LEVELS}
    names.update(adapter_weight="adapter_weight", adapter_bias="adapter_bias")
    leaves = {name: torch.from_numpy(arrays[n]).double().requires_grad_() for name, n in names.items()}
    *maps, weight, bias = leaves.values()
    maps = adapt(maps, [weight] * len(maps), [bias] * len(maps))
    student = _pool(arrays, maps, selected.instances)
    of_image = [image for image, found in enumerate(selected.instances) for _ in found]
    losses = {
        "feature": feature_loss(teacher, student),
        "relation": relation_loss(teacher, student, of_image),
    }
    found = {"pooled_student": _array(student)}
    for term, loss in losses.items():
        found[f"loss_raw_{term}"] = _array(loss)
        for name, gradient in _differentiate(loss, leaves).items():
            found[f"grad_{term}__{name}"] = _array(gradient)
    return found


def _inputs_of(arrays: Arrays, model: str, images: Sequence[int]) -> dict[str, Tensor]:
    """Logits, deltas and maps of some images, in float64."""
    names = ["logits", "deltas", *(f"feat_p{level}" for level in LEVELS)]
    return {name: torch.from_numpy(arrays[f"{model}_{name}"][list(images)]).double() for name in names}


def _maps(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[f"feat_p{level}"] for level in LEVELS]


def _pool(arrays: Arrays, maps: Sequence[Tensor], instances: Sequence[Sequence[Instance]]) -> Tensor:
    config = config_of(arrays)
    return pool(maps, arrays["strides"].tolist(), boxes_of(instances), config["res"], config["sr"])


def _differentiate(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; zeros where the loss does not depend on a leaf."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    pairs = zip(leaves.items(), gradients)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def _boxes_array(instances: Sequence[Instance]) -> np.ndarray:
    return np.array([instance.box for instance in instances], np.float32).reshape(-1, 4)


def _scores_array(instances: Sequence[Instance]) -> np.ndarray:
    return np.array([instance.score for instance in instances], np.float32)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float32)


# -------------------------------------------------------------------------------- labels and margins


def _gt(arrays: Arrays, image: int):
    mine = arrays["gt_image"] == image
    return [list(box) for box in arrays["gt_boxes"][mine]], arrays["gt_classes"][mine].tolist()


def _gt_labels(arrays: Arrays, image: int) -> list[int]:
    """Each anchor's class, `num_classes` for background, -1 to be ignored."""
    (boxes, classes), background = _gt(arrays, image), int(arrays["num_classes"])
    anchors = numbers(torch.from_numpy(arrays["anchors"]))
    meaning = {1: lambda index: classes[index], 0: lambda _: background, -1: lambda _: -1}
    matches = match(anchors, boxes, THRESHOLDS, LABELS, True)
    return [meaning[label](index) for index, label in matches]


def _counts(arrays: Arrays, selected: _Selected, labels: list[list[int]]) -> dict[str, int]:
    found = []
    for image, instances in enumerate(selected.instances):
        for instance in instances:
            label = labels[image][instance.row]
            boxes, classes = _gt(arrays, image)[0], int(arrays["num_classes"])
            found.append(category(instance.box, label, boxes, classes, THRESHOLDS))
    return {f"Num_{name}": found.count(name) for name in ("pos", "semi_pos", "neg")}


def _margins(arrays: Arrays, selected: _Selected) -> dict:
    """How far each discrete decision is from the other outcome; rounding must not flip one."""
    anchors = numbers(torch.from_numpy(arrays["anchors"]))
    of_iou, gaps, of_level = [], [], []
    for image in selected.instances:
        quality = [[iou(instance.box, anchor) for anchor in anchors] for instance in image]
        best = [max(column) for column in zip(*quality)]
        of_iou += [abs(value - limit) for value in best for limit in THRESHOLDS]
        for row in quality:
            first, second = sorted(row)[:-3:-1]
            gaps += [first - second] if first > second else []
        for instance in image:
            exact = CANONICAL_LEVEL + math.log2(math.sqrt(area(instance.box)) / CANONICAL_SIZE)
            of_level += [abs(exact - level) for level in LEVELS[1:]]
    whole = {"anchor_iou_margin": of_iou, "level_margin": of_level, "lowq_top2_gap_nonzero": gaps}
    per_image = [_nms_margins(arrays, selected, i) for i in range(len(selected.instances))]
    return {"margins": {name: _smallest(found) for name, found in whole.items()}, "nms": per_image}


def _nms_margins(arrays: Arrays, selected: _Selected, image: int) -> dict:
    """Of one image: IoUs from the threshold, sides from the limit, scores from those they suppress."""
    config, size = config_of(arrays), tuple(arrays["image_sizes"][image].tolist())
    teacher, student = (selected.probabilities[m][image] for m in ("teacher", "student"))
    scores = [abs(max(t) - max(s)) for t, s in zip(teacher, student)]
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    kept, instances = [], selected.instances[image]
    last = order.index(instances[-1].row) if len(instances) == config["post"] else config["pre"]
    ious, sides, gaps = [], [], []
    for row in order[: min(last + 1, config["pre"])]:
        model = "teacher" if max(teacher[row]) > max(student[row]) else "student"
        box = clip(selected.boxes[model][image][row], size)
        width, height = box[2] - box[0], box[3] - box[1]
        sides.append(abs(min(width, height) - MIN_SIDE))
        if min(width, height) <= MIN_SIDE:
            continue
        overlaps = [iou(box, other.box) for other in kept]
        ious += [abs(overlap - config["nms"]) for overlap in overlaps]
        gaps += [other.score - scores[row] for other in kept]
        kept += [instance for instance in instances if instance.row == row]
    signs = [max(teacher[i.row]) - max(student[i.row]) for i in instances]
    margins = {"nms_margin": ious, "size_margin": sides, "score_gap": gaps, "sub_sign_margin": signs}
    return {"kept": len(kept), **{n: _smallest(map(abs, found)) for n, found in margins.items()}}


def _smallest(values) -> float | None:
    return min(map(float, values), default=None)


# --------------------------------------------------------------------------------------------- inputs


def _inputs(seed: int) -> Arrays:
    random = np.random.RandomState(seed)
    shapes = [tuple(math.ceil(side / stride) for side in PADDED) for stride in STRIDES]
    anchors = _anchors(shapes)
    arrays = {
        "seed": np.array(seed),
        "num_classes": np.array(CLASSES),
        "image_sizes": np.array(SIZES),
        "padded_size": np.array(PADDED),
        "strides": np.array(STRIDES),
        "level_shapes": np.array(shapes),
        "anchors_per_level": np.array([h * w * len(RATIOS) * len(OCTAVES) for h, w in shapes]),
        "anchors": anchors,
        "cfg_json": np.array(json.dumps(CONFIG)),
        **_ground_truth(),
        **_predictions(random, anchors),
    }
    for level, (height, width) in zip(LEVELS, shapes):
        shape = (len(SIZES), CHANNELS, height, width)
        teacher, student = random.normal(0, 0.5, shape), random.normal(0, 0.4, shape)
        narrow = random.normal(0, 0.5, (len(SIZES), NARROW_CHANNELS, height, width))
        arrays[f"teacher_feat_p{level}"] = teacher.astype(np.float32)
        arrays[f"student_feat_p{level}"] = (0.6 * teacher + student).astype(np.float32)
        arrays[f"student_narrow_feat_p{level}"] = narrow.astype(np.float32)
    bound = (NARROW_CHANNELS * 9) ** -0.5
    weight = random.uniform(-bound, bound, (CHANNELS, NARROW_CHANNELS, 3, 3))
    arrays["adapter_weight"] = weight.astype(np.float32)
    arrays["adapter_bias"] = random.uniform(-bound, bound, CHANNELS).astype(np.float32)
    return arrays


def _anchors(shapes) -> np.ndarray:
    """Around the middles of cells, in the order (level, y, x, octave, ratio)."""
    boxes: list[Box] = []
    for stride, (height, width) in zip(STRIDES, shapes):
        sides = []
        for octave in OCTAVES:
            for ratio in RATIOS:
                side = ANCHOR_SCALE * stride * 2**octave
                sides.append((side / ratio**0.5 / 2, side * ratio**0.5 / 2))
        for row in range(height):
            for column in range(width):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                boxes += [(x - w, y - h, x + w, y + h) for w, h in sides]
    return np.array(boxes, np.float32)


def _ground_truth() -> Arrays:
    rows = [(box, label, image) for image, found in GT.items() for box, label in found]
    boxes, labels, images = zip(*rows)
    return {
        "gt_boxes": np.array(boxes, np.float32),
        "gt_classes": np.array(labels),
        "gt_image": np.array(images),
    }


def _predictions(random: np.random.RandomState, anchors: np.ndarray) -> Arrays:
    teacher = random.normal(-4, 0.7, (len(SIZES), len(anchors), CLASSES))
    student = teacher + random.normal(0, 0.4, teacher.shape)
    large = np.flatnonzero((anchors[:, 2:] - anchors[:, :2]).min(1) > 220)
    for logits in (teacher, student):  # each model is sure of a few boxes, large ones among them
        for image in range(len(SIZES)):
            rows = [*random.choice(large, 12), *random.choice(len(anchors), 12)]
            for row in rows:
                logits[image, row, random.randint(CLASSES)] += random.uniform(3, 6)
    arrays = {"teacher_logits": teacher, "student_logits": student}
    for model in ("teacher", "student"):
        deltas = random.normal(0, 0.15, (len(SIZES), len(anchors), 4))
        _make_tiny(random, deltas[0], anchors, 8, random.uniform(size=len(anchors)) < 0.3)
        _make_tiny(random, deltas[1], anchors, 6, np.ones(len(anchors), bool))
        _make_clusters(random, deltas[2], anchors)
        arrays[f"{model}_deltas"] = deltas
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _make_tiny(random, deltas: np.ndarray, anchors: np.ndarray, side: float, rows: np.ndarray) -> None:
    sides = anchors[:, 2:] - anchors[:, :2]
    noise = random.uniform(-0.1, 0.1, sides.shape)
    deltas[rows, 2:] = (np.log(side / sides) + noise)[rows]


def _make_clusters(random, deltas: np.ndarray, anchors: np.ndarray) -> None:
    """Every box becomes one of a few, not quite."""
    boxes = np.array(CLUSTERS, float)[random.randint(len(CLUSTERS), size=len(anchors))]
    boxes += random.uniform(-6, 6, boxes.shape)
    sides, centres = anchors[:, 2:] - anchors[:, :2], (anchors[:, 2:] + anchors[:, :2]) / 2
    deltas[:, :2] = ((boxes[:, 2:] + boxes[:, :2]) / 2 - centres) / sides
    deltas[:, 2:] = np.log((boxes[:, 2:] - boxes[:, :2]) / sides)
