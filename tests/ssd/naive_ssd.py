"""SSD by plain loops in Python's float64, from the paper's formulas; nothing of the package."""

from __future__ import annotations

import math

import numpy as np


def priors(widths, strides, lows, highs, ratios, size):
    """(R, 4) center, width and height, relative to the image."""
    rows = []
    for width, stride, low, high, level in zip(widths, strides, lows, highs, ratios):
        sides = [(low, low), (math.sqrt(low * high), math.sqrt(low * high))]
        for ratio in level:
            root = math.sqrt(ratio)
            sides.append((low * root, low / root))
            sides.append((low / root, low * root))
        for y in range(width):
            for x in range(width):
                for w, h in sides:
                    row = ((x + 0.5) * stride, (y + 0.5) * stride, w, h)
                    rows.append([min(max(number / size, 0.0), 1.0) for number in row])
    return np.array(rows)


def corners(boxes):
    """XYXY of center, width, height."""
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def match(overlaps, threshold):
    """Of objects x prior boxes, which object each prior box is; None: background."""
    found = []
    for prior in range(overlaps.shape[1]):
        best = max(range(len(overlaps)), key=lambda k: overlaps[k, prior])
        found.append(best if overlaps[best, prior] >= threshold else None)
    for k in range(len(overlaps)):  # the last of them wins
        found[max(range(overlaps.shape[1]), key=lambda prior: overlaps[k, prior])] = k
    return found


def encode(box, prior):
    """Deltas of XYXY boxes."""

    def split(b):
        return (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]

    (x, y, w, h), (px, py, pw, ph) = split(box), split(prior)
    return [
        *((x - px) / pw / 0.1, (y - py) / ph / 0.1),
        *(math.log(w / pw) / 0.2, math.log(h / ph) / 0.2),
    ]


def decode(delta, prior):
    """XYXY."""
    pw, ph = prior[2] - prior[0], prior[3] - prior[1]
    x = (prior[0] + prior[2]) / 2 + 0.1 * delta[0] * pw
    y = (prior[1] + prior[3]) / 2 + 0.1 * delta[1] * ph
    w, h = pw * math.exp(0.2 * delta[2]), ph * math.exp(0.2 * delta[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def cross_entropy(logits, label):
    highest = max(logits)
    return highest + math.log(sum(math.exp(z - highest) for z in logits)) - logits[label]


def hard_negatives(losses, positive, ratio):
    """Rows of one image."""
    ranked = sorted(
        range(len(losses)), key=lambda row: 0.0 if positive[row] else losses[row], reverse=True
    )
    most = min(ratio * sum(positive), len(losses) - 1)
    return {row for rank, row in enumerate(ranked) if rank < most and not positive[row]}


def multibox(logits, deltas, labels, target_deltas, background, ratio):
    """The two losses of a batch (N, R, ...), and the rows that count in the first."""
    count = sum(label != background for image in labels for label in image)
    classes = boxes = 0.0
    selected = []
    for i, image in enumerate(labels):
        losses = [cross_entropy(row, label) for row, label in zip(logits[i], image)]
        positive = [label != background for label in image]
        rows = hard_negatives(losses, positive, ratio) | {r for r, p in enumerate(positive) if p}
        selected.append(rows)
        classes += sum(losses[row] for row in rows)
        for row, is_object in enumerate(positive):
            for delta, target in zip(deltas[i][row], target_deltas[i][row]) if is_object else ():
                distance = abs(delta - target)
                boxes += distance**2 / 2 if distance < 1 else distance - 0.5
    return classes / max(count, 1), boxes / max(count, 1), selected


def detect(scores, boxes, threshold, topk, overlap, most):
    """(class, row) of one image's detections, from scores (R, K) and boxes (R, 4), by falling score."""
    kept = []
    for k in range(scores.shape[1]):
        ranked = sorted(range(len(scores)), key=lambda row: -scores[row, k])[:topk]
        chosen = []
        for row in ranked:
            if scores[row, k] > threshold and all(iou(boxes[row], boxes[r]) <= overlap for r in chosen):
                chosen.append(row)
        kept += [(k, row) for row in chosen]
    return sorted(kept, key=lambda pair: -scores[pair[1], pair[0]])[:most]
