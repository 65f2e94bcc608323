"""POTO by plain loops in Python's float64, from the paper's formulas, independent of projects/POTO."""

from __future__ import annotations

import itertools
import math

import numpy as np
from naive_fcos import box_iou
from naive_maps import interpolate


def center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def giou(a, b):
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = (area(a) + area(b)) / (1 + box_iou(a, b))
    return box_iou(a, b) - (hull - union) / hull


def decode(delta, anchor):
    """The box of distances in strides, none of them below 0."""
    x, y = center(anchor)
    left, top, right, bottom = (max(d, 0) * (anchor[2] - anchor[0]) for d in delta)
    return [x - left, y - top, x + right, y + bottom]


def is_inside(box, anchor):
    x, y = center(anchor)
    return box[0] < x < box[2] and box[1] < y < box[3]


def is_near(box, anchor, radius):
    """In the square around the center, cut by the box."""
    (x, y), reach = center(box), radius * (anchor[2] - anchor[0])
    square = [x - reach, y - reach, x + reach, y + reach]
    return is_inside(box, anchor) and is_inside(square, anchor)


def qualities(scores, predicted, boxes, classes, alpha):
    """(G, R) of one image, from probabilities (R, K)."""
    return np.array(
        [
            [p[k] ** (1 - alpha) * box_iou(box, found) ** alpha for p, found in zip(scores, predicted)]
            for box, k in zip(boxes, classes)
        ]
    )


def best_sum(values):
    """The largest sum of an assignment of rows (G) to different columns (R), all of the fewer ones."""
    values = np.asarray(values)
    if values.shape[0] > values.shape[1]:
        values = values.T
    rows = range(values.shape[0])
    return max(
        sum(values[i, j] for i, j in zip(rows, columns))
        for columns in itertools.permutations(range(values.shape[1]), values.shape[0])
    )


def auxiliary(values, allowed, sizes, topk):
    """The object of each location; None: none."""
    objects, locations = values.shape
    wanted = [[] for _ in range(locations)]
    for g in range(objects):
        candidates, first = [], 0
        for size in sizes:
            level = sorted(range(first, first + size), key=lambda r: values[g, r], reverse=True)
            candidates += level[:topk]
            first += size
        found = [values[g, r] for r in candidates]
        mean = sum(found) / len(found)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in found) / (len(found) - 1))
        for r in candidates:
            if values[g, r] >= mean + deviation and allowed[g, r]:
                wanted[r].append(g)
    return [
        max(some, key=lambda g, r=r: values[g, r]) if some else None for r, some in enumerate(wanted)
    ]


def max_filter(hidden, features, kernel, tau):
    """Of single-channel levels: the largest hidden value in the window, plus the feature, at least 0."""
    outputs = []
    for level, feature in enumerate(features):
        height, width = feature.shape
        out = np.zeros_like(feature)
        for y in range(height):
            for x in range(width):
                highest = -math.inf
                for other in range(level - tau // 2, level + tau // 2 + 1):
                    if not 0 <= other < len(hidden):
                        continue
                    near = interpolate(hidden[other], height, width)
                    for v in range(y - kernel // 2, y + kernel // 2 + 1):
                        for u in range(x - kernel // 2, x + kernel // 2 + 1):
                            if 0 <= v < height and 0 <= u < width:
                                highest = max(highest, near[v, u])
                out[y, x] = max(highest + feature[y, x], 0)
        outputs.append(out)
    return outputs


def detect(levels, threshold, topk, most):
    """(score, level, row, class) of the best, from probabilities (P, K) of each level."""
    kept = []
    for index, scores in enumerate(levels):
        found = [
            (p, index, row, k)
            for row, classes in enumerate(scores)
            for k, p in enumerate(classes)
            if p > threshold
        ]
        kept += sorted(found, reverse=True)[:topk]
    return sorted(kept, reverse=True)[:most]
