"""A loss with two parameters and a solver of its own, which sends no gradient to the student."""

import torch
from detectron2.config import CfgNode
from torch import nn

from distill_d2.engine.solvers import LossSolver
from distill_d2.losses import TrainedLoss


class ProbeLoss(TrainedLoss):
    """(query value)^2 + value; pretraining is query^2 alone."""

    NODE = "PROBE"
    has_solver = True
    stop_after = None

    def __init__(self, **keys):
        super().__init__(**keys)
        self.query = nn.Parameter(torch.ones(1))
        self.value = nn.Parameter(torch.ones(1))

    @classmethod
    def from_config(cls, distiller):
        loss = super().from_config(distiller)
        loss.solver = distiller.SOLVER if cls.has_solver else None
        return loss

    def forward(self, student, teacher, batch):
        assert all(feature.isfinite().all() for feature in teacher.features.values())
        return {"loss_probe": ((self.query * self.value) ** 2 + self.value).sum()}

    def pretrain(self, teacher, batch):
        assert all(feature.isfinite().all() for feature in teacher.features.values())
        return {"loss_probe_pretrain": (self.query**2).sum(), "loss_probe_other": self.query.sum()}

    def solver_advances(self, iteration):
        return self.stop_after is None or iteration < self.stop_after + 1

    def frozen_parameters(self, iteration):
        if iteration < 0:
            return [self.value]
        return [] if self.solver_advances(iteration) else [self.query]


def solver_of(loss, max_iter=4, steps=(2,), **keys):
    loss.solver = CfgNode(keys)
    return LossSolver(loss, max_iter, steps)


LAZY_PROBE = """
distiller["SOLVER"] = dict(OPTIMIZER="SGD", BASE_LR=0.5, WARMUP_ITERS=0)
distiller["PRETRAIN_TEACHER_ITERS"] = 2
"""
