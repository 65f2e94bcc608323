"""GID as its paper and its authors' code define it, plainly: an oracle for the package's version.

Nothing here is shared with the package, with detectron2 or with torchvision. Loops run over images,
rows, instances, pairs, bins and sampling points. What needs no gradient is computed on single numbers
(NumPy's scalars, of the tensors' own precision: whether two anchors fit a box equally well depends on
it); the losses are made of tensors, so that autograd differentiates them.

Shapes: N images, R rows (anchors, points or proposals), K classes, C channels, M instances of the batch.
A box is four numbers, absolute XYXY pixels; sizes of images are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_CLAMP = math.log(1000 / 16)  # of the deltas of width and height
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # a box of this side is pooled from this level

Box = Sequence[float]


def numbers(matrix: Tensor) -> list[list]:
    """The rows (R, X) of a tensor as lists of NumPy scalars."""
    return [list(row) for row in matrix.detach().cpu().numpy()]


# -------------------------------------------------------------------------------------- probabilities


def sigmoid(x):
    if x >= 0:
        return 1 / (1 + np.exp(-x))
    return np.exp(x) / (1 + np.exp(x))


def sigmoid_probabilities(logits: Tensor, centerness: Tensor | None = None) -> list[list]:
    """Class probabilities of one image's logits (R, K), times those of its centerness logits (R,)."""
    rows = [[sigmoid(x) for x in row] for row in numbers(logits)]
    if centerness is None:
        return rows
    factors = [sigmoid(x) for (x,) in numbers(centerness[:, None])]
    return [[p * factor for p in row] for row, factor in zip(rows, factors)]


def softmax_probabilities(logits: Tensor) -> list[list]:
    """Probabilities (R, K) of the classes of logits (R, K + 1), whose last is the background."""
    rows = []
    for row in numbers(logits):
        exponentials = [np.exp(x - max(row)) for x in row]
        rows.append([e / sum(exponentials) for e in exponentials[:-1]])
    return rows


def highest_class(probabilities: Sequence[float]) -> int:
    return max(range(len(probabilities)), key=lambda c: probabilities[c])


def gi_score(teacher: Sequence[float], student: Sequence[float], score: str) -> float:
    """How much two models disagree about one row's K class probabilities."""
    if score == "classwise":
        return max(abs(t - s) for t, s in zip(teacher, student))
    if score == "max_first":
        return abs(max(teacher) - max(student))
    raise ValueError(f"score is {score!r}; expected 'classwise' or 'max_first'")


# ---------------------------------------------------------------------------------------------- boxes


def exponential(x):
    return x.exp() if isinstance(x, Tensor) else np.exp(x)


def decode_deltas(anchor: Box, deltas: Sequence, weights: Sequence[float] = (1, 1, 1, 1)) -> list:
    """The box of deltas (dx, dy, dw, dh), numbers or 0-dim tensors."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2, anchor[1] + height / 2
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas, weights))
    dw, dh = (delta if delta < SCALE_CLAMP else 0 * delta + SCALE_CLAMP for delta in (dw, dh))
    x, y = x + dx * width, y + dy * height
    width, height = width * exponential(dw), height * exponential(dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def decode_ltrb(anchor: Box, deltas: Sequence) -> list:
    """The box of distances (left, top, right, bottom) to the anchor's centre, in units of its size."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2, anchor[1] + height / 2
    left, top, right, bottom = (delta if delta > 0 else 0 * delta for delta in deltas)
    return [x - left * width, y - top * height, x + right * width, y + bottom * height]


def decode_rows(anchors: Tensor, deltas: Tensor, decode: Callable = decode_deltas) -> list[list]:
    """Boxes of one image's rows; anchors and deltas (R, 4)."""
    return [decode(anchor, row) for anchor, row in zip(numbers(anchors), numbers(deltas))]


def deltas_of_classes(deltas: Tensor, classes: Sequence[int]) -> Tensor:
    """Each row's deltas (R, 4) of its class among (R, K * 4), or the only ones there are."""
    if deltas.shape[1] == 4:
        return deltas
    return torch.stack([row[4 * c : 4 * c + 4] for row, c in zip(deltas, classes)])


def clip(box: Box, image_size: tuple[int, int]) -> list:
    height, width = image_size
    return [min(max(side, 0), limit) for side, limit in zip(box, (width, height, width, height))]


def area(box: Box):
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(a: Box, b: Box):
    if a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]:
        return 0.0
    return (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))


def iou(a: Box, b: Box):
    overlap = intersection(a, b)
    return overlap / (area(a) + area(b) - overlap) if overlap > 0 else 0.0


def giou(a: Box, b: Box):
    """Generalised IoU of two boxes that are not empty, in [-1, 1]."""
    overlap = intersection(a, b)
    union = area(a) + area(b) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def contains(box: Box, x, y) -> bool:
    return box[0] < x < box[2] and box[1] < y < box[3]


# ------------------------------------------------------------------------------------------ selection


class Instance(NamedTuple):
    box: list
    score: float
    row: int
    from_teacher: bool


def nms(candidates: Sequence[Instance], threshold: float, limit: int) -> list[Instance]:
    """The first that are left of candidates, best first, whatever their class or level."""
    kept: list[Instance] = []
    for candidate in candidates:
        if len(kept) < limit and all(iou(candidate.box, better.box) <= threshold for better in kept):
            kept.append(candidate)
    return kept


def select_image(
    teacher: list[list],
    student: list[list],
    teacher_boxes: list[list],
    student_boxes: list[list],
    image_size: tuple[int, int],
    *,
    score: str = "classwise",
    nms_thresh: float = 0.3,
    pre_nms_topk: int = 3000,
    post_nms_topk: int = 10,
    min_side: float = 10.0,
) -> list[Instance]:
    """One image's general instances, best first, from both models' probabilities (R, K) and boxes."""
    candidates = []
    for row, (t, s) in enumerate(zip(teacher, student)):
        from_teacher = bool(max(t) > max(s))
        box = teacher_boxes[row] if from_teacher else student_boxes[row]
        candidates.append(Instance(box, gi_score(t, s, score), row, from_teacher))
    candidates.sort(key=lambda candidate: -candidate.score)
    surviving = []
    for candidate in candidates[:pre_nms_topk]:
        box = clip(candidate.box, image_size)
        large = box[2] - box[0] > min_side and box[3] - box[1] > min_side
        if large and candidate.score > 0:
            surviving.append(candidate._replace(box=box))
    return nms(surviving, nms_thresh, post_nms_topk)


def select(
    teacher, student, teacher_boxes, student_boxes, image_sizes, **options
) -> list[list[Instance]]:
    """`select_image` for each image of a batch."""
    batch = zip(teacher, student, teacher_boxes, student_boxes, image_sizes)
    return [select_image(*image, **options) for image in batch]


def boxes_of(instances: Sequence[Sequence[Instance]]) -> list[list[list]]:
    return [[instance.box for instance in image] for image in instances]


def category(
    box: Box,
    label: int,
    gt_boxes: Sequence[Box],
    num_classes: int,
    thresholds: tuple[float, float] = (0.4, 0.5),
) -> str:
    """pos, semi_pos, neg or none of an instance; `label` is its row's, K or -1 are no object's."""
    if 0 <= label < num_classes:
        return "pos"
    covered = max([intersection(box, gt) / area(box) for gt in gt_boxes], default=0.0)
    if covered >= thresholds[1]:
        return "semi_pos"
    return "neg" if covered < thresholds[0] else "none"


# -------------------------------------------------------------------------------------------- pooling


def adapt(maps: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Each level (N, C, H, W) through its convolution (C', C, k, k), k odd."""
    levels = zip(maps, weights, biases)
    return [F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2) for x, weight, bias in levels]


def level_of(box: Box, strides: Sequence[int]) -> int:
    """The level's power of two, 3 for a stride of 8."""
    level = math.floor(CANONICAL_LEVEL + math.log2(math.sqrt(area(box)) / CANONICAL_SIZE + 1e-8))
    return int(min(max(level, math.log2(strides[0])), math.log2(strides[-1])))


def bilinear(cells: Sequence[Sequence[Tensor]], y, x) -> Tensor | None:
    """The value at (y, x) of a grid (H, W) of vectors (C,); None, for zeros, off the map."""
    height, width = len(cells), len(cells[0])
    if y < -1 or y > height or x < -1 or x > width:
        return None
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    below, after = float(y - top), float(x - left)
    upper = cells[top][left] * (1 - after) + cells[top][right] * after
    lower = cells[bottom][left] * (1 - after) + cells[bottom][right] * after
    return upper * (1 - below) + lower * below


def roi_align(feature: Tensor, box: Box, scale: float, resolution: int, sampling_ratio: int) -> Tensor:
    """ROIAlign's second version, half a pixel to the left: a box on a map (C, H, W) to (C, res, res)."""
    cells = [row.unbind(1) for row in feature.unbind(1)]
    x0, y0, x1, y1 = (side * scale - 0.5 for side in box)
    bin_width, bin_height = (x1 - x0) / resolution, (y1 - y0) / resolution
    across, down = sampling_ratio, sampling_ratio
    if sampling_ratio <= 0:
        across, down = math.ceil(bin_width), math.ceil(bin_height)
    nothing = feature.new_zeros(len(feature))
    bins = []
    for row in range(resolution):
        for column in range(resolution):
            total = nothing
            for i in range(down):
                for j in range(across):
                    y = y0 + row * bin_height + (i + 0.5) * bin_height / down
                    x = x0 + column * bin_width + (j + 0.5) * bin_width / across
                    value = bilinear(cells, y, x)
                    total = total if value is None else total + value
            bins.append(total / max(1, down * across))
    return torch.stack(bins, dim=1).reshape(len(feature), resolution, resolution)


def pool(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Sequence[Sequence[Box]],
    resolution: int,
    sampling_ratio: int,
) -> Tensor:
    """Every box of every image from its level's map: (M, C, resolution, resolution)."""
    pooled = []
    for image, image_boxes in enumerate(boxes):
        for box in image_boxes:
            stride = 2 ** level_of(box, strides)
            feature = maps[list(strides).index(stride)][image]
            pooled.append(roi_align(feature, box, 1 / stride, resolution, sampling_ratio))
    if not pooled:
        return maps[0].new_zeros(0, maps[0].shape[1], resolution, resolution)
    return torch.stack(pooled)


# --------------------------------------------------------------------------- feature and relation loss


def smooth_l1(difference: Tensor, beta: float) -> Tensor:
    size = difference.abs()
    if beta < 1e-5:
        return size
    return torch.where(size < beta, size * size / (2 * beta), size - beta / 2)


def feature_loss(teacher: Tensor, student: Tensor, mode: str = "L2", beta: float = 0.0) -> Tensor:
    """Of pooled features (M, C, H, W); summed over channels, the mean over instances (and cells)."""
    total = 0 * student.sum()
    for t, s in zip(teacher, student):
        if mode == "L2":
            total = total + ((t - s) * (t - s)).sum()
        elif mode == "L1":
            total = total + smooth_l1(t - s, beta).sum()
        elif mode == "norm":
            total = total + ((t - s) * (t - s)).sum().sqrt()
        else:
            raise ValueError(f"mode is {mode!r}; expected 'L2', 'L1' or 'norm'")
    cells = 1 if mode == "norm" else student.shape[-1] * student.shape[-2]
    return total / max(1, len(student) * cells)


def relative_distances(instances: Tensor) -> list[Tensor]:
    """Distances of all ordered pairs of different instances (M, ...), in units of their mean."""
    distances = []
    for i, a in enumerate(instances):
        for j, b in enumerate(instances):
            if i != j:
                squared = ((a - b) * (a - b)).sum()
                distances.append(squared.clamp(min=1e-12).sqrt())
    mean = sum(distances) / len(distances)
    return [distance / mean for distance in distances]


def relation_of(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    if len(student) < 3:
        return 0 * student.sum()
    pairs = list(zip(relative_distances(teacher), relative_distances(student)))
    return sum(smooth_l1(t - s, beta) for t, s in pairs) / len(pairs)


def relation_loss(
    teacher: Tensor, student: Tensor, images: Sequence[int], beta: float = 1.0, scope: str = "batch"
) -> Tensor:
    """Of pooled features (M, C, H, W) and the image of each instance; precise in float64."""
    if scope == "batch":
        return relation_of(teacher, student, beta)
    if scope != "image":
        raise ValueError(f"scope is {scope!r}; expected 'batch' or 'image'")
    losses = []
    for image in sorted(set(images)):
        mine = [m for m, other in enumerate(images) if other == image]
        if len(mine) >= 3:
            losses.append(relation_of(teacher[mine], student[mine], beta))
    return sum(losses) / len(losses) if losses else 0 * student.sum()


# ------------------------------------------------------------------------------------- response masks


def match(
    anchors: Sequence[Box],
    boxes: Sequence[Box],
    thresholds: Sequence[float],
    labels: Sequence[int],
    allow_low_quality: bool,
) -> list[tuple[int, int]]:
    """For each anchor the box that it overlaps most and the label of that IoU.

    A label is of the IoUs from the threshold before it to below the one after it. With
    `allow_low_quality` the anchors that fit a box best, all of them if several do equally, get label 1
    (for a box that touches no anchor these are all anchors).
    """
    if not boxes:
        return [(0, labels[0]) for _ in anchors]
    quality = [[iou(box, anchor) for anchor in anchors] for box in boxes]
    highest = [max(row) for row in quality]
    matches = []
    for anchor in range(len(anchors)):
        column = [row[anchor] for row in quality]
        best = max(range(len(boxes)), key=lambda box: column[box])
        label = labels[sum(bool(column[best] >= threshold) for threshold in thresholds)]
        if allow_low_quality and any(value == top for value, top in zip(column, highest)):
            label = 1
        matches.append((best, label))
    return matches


def matcher_mask(
    anchors: Sequence[Box],
    boxes: Sequence[Box],
    thresholds: Sequence[float] = (0.4, 0.5),
    labels: Sequence[int] = (0, -1, 1),
    allow_low_quality: bool = True,
) -> list[bool]:
    """The rows of one image that a matcher finds positive for its general instances."""
    return [label > 0 for _, label in match(anchors, boxes, thresholds, labels, allow_low_quality)]


def inside_mask(anchors: Sequence[Box], boxes: Sequence[Box]) -> list[bool]:
    """The rows of one image whose anchor's centre lies inside an instance."""
    mask = []
    for x0, y0, x1, y1 in anchors:
        x, y = x0 + (x1 - x0) / 2, y0 + (y1 - y0) / 2
        mask.append(any(contains(box, x, y) for box in boxes))
    return mask


# ------------------------------------------------------------------------------------- response loss


def softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + (1 + (-x.abs()).exp()).log()


def binary_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Of logits; the target is the teacher's probability. p log s + (1 - p) log(1 - s), negated."""
    p = 1 / (1 + (-teacher).exp())
    return p * softplus(-student) + (1 - p) * softplus(student)


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Of a row of logits (K + 1,), summed."""
    p = (teacher - teacher.max()).exp() / (teacher - teacher.max()).exp().sum()
    log_s = student - student.max() - (student - student.max()).exp().sum().log()
    return -(p * log_s).sum()


def difference(teacher: Tensor, student: Tensor, mode: str, beta: float) -> Tensor:
    """Of one row's logits or deltas, summed."""
    if mode == "BCE":
        return binary_cross_entropy(teacher, student).sum()
    if mode == "CE":
        return cross_entropy(teacher, student)
    if mode == "L1":
        return smooth_l1(teacher - student, beta).sum()
    if mode == "L2":
        return ((teacher - student) * (teacher - student)).sum()
    raise ValueError(f"mode is {mode!r}; expected 'BCE', 'CE', 'L1' or 'L2'")


def response_loss(
    teacher: Tensor, student: Tensor, mask: Sequence[Sequence[bool]], mode: str, beta: float = 0.0
) -> Tensor:
    """Of logits (N, R, K) or deltas (N, R, 4), for the rows of the mask (N, R) and by their number.

    Modes are "BCE", "L1", "L2" and, for logits of a softmax with background, "CE".
    """
    total, count = 0 * student.sum(), 0
    for image, flags in enumerate(mask):
        for row, flag in enumerate(flags):
            if flag:
                total = total + difference(teacher[image, row], student[image, row], mode, beta)
                count += 1
    return total / max(1, count)


def response_giou_loss(
    teacher: Tensor,
    student: Tensor,
    mask: Sequence[Sequence[bool]],
    anchors: Sequence[Sequence[Box]],
    decode: Callable = decode_deltas,
) -> Tensor:
    """1 - GIoU of both models' boxes: deltas (N, R, 4), each image's anchors (N, R, 4)."""
    total, count = 0 * student.sum(), 0
    for image, flags in enumerate(mask):
        for row, flag in enumerate(flags):
            if flag:
                anchor = [float(side) for side in anchors[image][row]]
                boxes = (decode(anchor, deltas[image, row].unbind(0)) for deltas in (teacher, student))
                total = total + 1 - giou(*boxes)
                count += 1
    return total / max(1, count)
