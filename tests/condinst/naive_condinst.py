"""CondInst's formulas written with loops, independently of projects/CondInst."""

from __future__ import annotations

import numpy as np


def upsample(x: np.ndarray, factor: int) -> np.ndarray:
    """(H, W) to (factor H, factor W): output i is input (i - factor // 2) / factor, interpolated."""
    height, width = x.shape
    out = np.zeros((factor * height, factor * width))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            y, z = (max((k - factor // 2) / factor, 0.0) for k in (i, j))
            a, b = int(y), int(z)
            c, d = min(a + 1, height - 1), min(b + 1, width - 1)
            u, v = y - a, z - b
            upper, lower = ((1 - v) * row[b] + v * row[d] for row in (x[a], x[c]))
            out[i, j] = (1 - u) * upper + u * lower
    return out


def mask_logits(features, params, location, size, stride, channels, layers, relative) -> np.ndarray:
    """(H, W) of one instance, from features (C, H, W)."""
    count, height, width = features.shape
    inputs = count + (2 if relative else 0)
    shapes = [(channels if k < layers - 1 else 1, inputs if k == 0 else channels) for k in range(layers)]
    weights, position = [], 0
    for out, into in shapes:
        weights.append(params[position : position + out * into].reshape(out, into))
        position += out * into
    biases = []
    for out, _ in shapes:
        biases.append(params[position : position + out])
        position += out
    assert position == len(params)
    found = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            x = list(features[:, i, j])
            if relative:
                at = (j * stride + stride // 2, i * stride + stride // 2)
                x = [(location[0] - at[0]) / size, (location[1] - at[1]) / size, *x]
            for k, (weight, bias) in enumerate(zip(weights, biases)):
                x = [sum(w * value for w, value in zip(row, x)) + b for row, b in zip(weight, bias)]
                if k < layers - 1:
                    x = [max(value, 0.0) for value in x]
            found[i, j] = x[0]
    return found


def dice(p: np.ndarray, g: np.ndarray) -> float:
    return 1 - 2 * (p * g).sum() / ((p**2).sum() + (g**2).sum() + 1e-5)


def center(mask: np.ndarray):
    total, x, y = max(mask.sum(), 1e-6), 0.0, 0.0
    for i, j in zip(*mask.nonzero()):
        x, y = x + j, y + i
    return x / total, y / total


def classes(masks, kinds, background, stride):
    """The class of the smallest mask at each sampled pixel."""
    height, width = masks.shape[1:]
    start = stride // 2
    found = []
    for i in range(start, height, stride):
        row = []
        for j in range(start, width, stride):
            over = [(mask.sum(), k) for k, mask in enumerate(masks) if mask[i, j]]
            row.append(int(kinds[min(over)[1]]) if over else background)
        found.append(row)
    return np.array(found)


def best(images, objects, scores, per_image):
    """Indices of the best instances of each object."""
    chosen = []
    for image in sorted(set(images)):
        rows = [i for i in range(len(images)) if images[i] == image]
        kinds = sorted({objects[i] for i in rows})
        allowed = max(per_image // len(kinds), 1)
        for kind in kinds:
            own = sorted((i for i in rows if objects[i] == kind), key=lambda i: -scores[i])
            chosen += own[:allowed]
    return sorted(chosen)
