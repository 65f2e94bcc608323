"""Chen et al.'s losses by plain loops in Python's float64; nothing of the
package. Rows are lists of numbers."""

from __future__ import annotations

import math


def softmax(logits, temperature=1.0):
    highest = max(logits)
    powers = [math.exp((z - highest) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def soft(student, teacher, weights, temperature=1.0):
    """The weighted cross entropy of one row, and its gradient; weights: of each class."""
    p, q = softmax(student, temperature), softmax(teacher, temperature)
    loss = -sum(w * b * math.log(a) for w, a, b in zip(weights, p, q))
    total = sum(w * b for w, b in zip(weights, q))
    return loss, [(a * total - w * b) / temperature for w, a, b in zip(weights, p, q)]


def soft_of_object(student, teacher, object_weight, background_weight, temperature=1.0):
    """Of one row of a sigmoid: as a softmax of it and 0."""
    return soft([student, 0.0], [teacher, 0.0], [object_weight, background_weight], temperature)[0]


def squared(boxes, truth):
    return sum((a - b) ** 2 for a, b in zip(boxes, truth))


def bound_per_box(student, teacher, truth, margin):
    """Of one row."""
    student_error = squared(student, truth)
    return student_error if student_error + margin > squared(teacher, truth) else 0.0


def bound_per_batch(student, teacher, truth, margin):
    """Of lists of rows."""
    count = 4 * max(len(truth), 1)
    student_error, teacher_error = (
        sum(map(squared, boxes, truth)) / count for boxes in (student, teacher)
    )
    return student_error if student_error + margin > teacher_error else 0.0
