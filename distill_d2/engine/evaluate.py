"""What --eval-only does: evaluate a student, and on request its teacher."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..data import end_workers
from ..teacher import Teacher
from ..views import build_view

logger = logging.getLogger(__name__)


def evaluate(
    cfg: Any, trainer: type, resume: bool = False, *, with_teacher: bool = False
) -> dict[str, Any]:
    """Evaluate the student of MODEL.WEIGHTS, or with ``resume`` of OUTPUT_DIR's last checkpoint.

    Args:
        with_teacher: heed MODEL.DISTILLER.EVAL_TEACHER; otherwise no teacher is built.

    Returns:
        the student's results; those of the teacher, if it was evaluated, under "teacher".

    Raises:
        ValueError: there are no weights, or they do not fill the model; the teacher's classes differ.
    """
    model = trainer.build_model(cfg)
    _load(cfg, trainer, model, resume)
    teacher = trainer.teacher_to_evaluate(cfg) if with_teacher else None
    try:
        of_teacher = evaluate_teacher(cfg, trainer, teacher, model) if teacher else None
        results = trainer.test(cfg, model)
    finally:
        end_workers()
    if comm.is_main_process() and hasattr(cfg, "TEST"):
        verify_results(cfg, results)
    return results if of_teacher is None else {**results, "teacher": of_teacher}


def evaluate_teacher(cfg: Any, trainer: type, teacher: Teacher, student: nn.Module) -> dict[str, Any]:
    """Evaluate a teacher on the images that ``student`` is evaluated on, before it is; its detections
    are written to OUTPUT_DIR/teacher.

    Raises:
        ValueError: its classes are not those of the student.
    """
    ours, theirs = build_view(student, "student").num_classes, teacher.view.num_classes
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"MODEL.DISTILLER.EVAL_TEACHER is True, but the teacher has {theirs} classes and the student "
            f"{ours}; set it to False"
        )
    logger.info(f"Evaluation of the teacher ({teacher.source}); that of the student follows")
    model = teacher.predictor(trainer.input_format(cfg, student))
    return trainer.test(trainer.with_output_dir(cfg, "teacher"), model)


def _load(cfg: Any, trainer: type, model: nn.Module, resume: bool) -> None:
    checkpointer = SafeCheckpointer(model, save_dir=trainer._output_dir(cfg))
    weights = trainer._weights(cfg)
    if not weights and not (resume and checkpointer.has_checkpoint()):
        raise ValueError("--eval-only needs weights: set MODEL.WEIGHTS, or --resume with OUTPUT_DIR")
    checkpointer.resume_or_load(weights, resume=resume, with_losses=False)
    keys = checkpointer.incompatible
    missing = keys.missing_keys + [name for name, _, _ in keys.incorrect_shapes]
    if missing:
        raise ValueError(
            f"--eval-only: the weights do not fill the model; {len(missing)} of its tensors are "
            f"missing or of another shape: {sorted(set(missing))[:10]}"
        )
