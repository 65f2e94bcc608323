"""The feature term, on features pooled at the instances, and the relation term, on their distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEATURE_MODES = ("L2", "L1", "norm")
SCOPES = ("batch", "image")
_EPS = 1e-12


def feature_term(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
    *,
    mode: str = "L2",
    beta: float = 0.0,
) -> torch.Tensor:
    """The distance of the student's features of the instances from the teacher's.

    With M valid instances and features s, t of (C, H, W), the sum over all of (s - t)^2 ("L2") or of
    the smooth L1 of s - t ("L1") over M H W, or the mean of |s - t|, the Euclidean norm ("norm").

    Args:
        student, teacher: (N, K, C, H, W).
        valid: (N, K) bool.
        beta: of "L1"; 0: plain L1.

    Returns:
        a scalar; 0 without instances.
    """
    count = valid.sum().clamp(min=1)
    mask = valid[..., None, None, None]
    if mode == "norm":
        return torch.linalg.vector_norm((student - teacher) * mask, dim=(2, 3, 4)).sum() / count
    if mode == "L2":
        distances = F.mse_loss(student, teacher, reduction="none")
    else:
        distances = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta)
    return (distances * mask).sum() / (count * student.shape[-2] * student.shape[-1])


def relation_term(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
    *,
    beta: float = 1.0,
    scope: str = "batch",
) -> torch.Tensor:
    """The difference of the student's and the teacher's distances between instances.

    Euclidean distances between the features of all pairs, divided by their mean, are compared by smooth
    L1; the mean over ordered pairs of two instances.

    Args:
        student, teacher: (N, K, C, H, W).
        valid: (N, K) bool.
        scope: "batch": pairs of instances of all images; "image": each image alone, and the mean of
            those with three instances or more.

    Returns:
        a scalar; 0 with fewer than three instances.
    """
    student, teacher, valid = (
        _groups(part, scope) for part in (student.flatten(2), teacher.flatten(2), valid)
    )
    other = ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    pairs = valid[:, :, None] & valid[:, None] & other
    distances = F.smooth_l1_loss(
        _relative_distances(student, pairs),
        _relative_distances(teacher, pairs),
        reduction="none",
        beta=beta,
    )
    enough = valid.sum(dim=1) >= 3
    per_group = (distances * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
    return (per_group * enough).sum() / enough.sum().clamp(min=1)


def _groups(values: torch.Tensor, scope: str) -> torch.Tensor:
    """(N, K, ...) to the groups inside which instances are compared: (1, N K, ...) or as it is."""
    return values.flatten(0, 1).unsqueeze(0) if scope == "batch" else values


def _relative_distances(features: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Distances (G, P, P) between features (G, P, D), over their mean over the given pairs."""
    squares = features.square().sum(dim=-1)
    products = features @ features.transpose(1, 2)
    distances = squares[:, :, None] + squares[:, None] - 2 * products
    distances = distances.clamp(min=_EPS).sqrt() * pairs
    mean = distances.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
    return distances / mean.clamp(min=_EPS)[:, None, None]
