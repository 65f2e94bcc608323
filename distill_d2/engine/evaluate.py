"""What --eval-only does: evaluate a student, and on request its teacher."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..data import end_workers
from ..data.classes import classes_in
from ..run_files import TEACHER_FOLDER
from ..teacher import Teacher, teacher_of
from ..views import build_view
from .classes import check_checkpoint, check_number, check_tested_teacher
from .notes import note_evaluation
from .run_summary import log_results, log_student
from .settings import RunSettings, in_subfolder

logger = logging.getLogger(__name__)


def evaluate(
    cfg: Any, trainer: type[DefaultTrainer], resume: bool = False, *, with_teacher: bool = False
) -> dict[str, Any]:
    """Evaluate the student of MODEL.WEIGHTS, or with ``resume`` of OUTPUT_DIR's last checkpoint; the results go to
    OUTPUT_DIR's EVALUATIONS, too.

    Args:
        with_teacher: follow MODEL.DISTILLER.EVAL_TEACHER; otherwise no teacher is built.

    Returns:
        the student's results; those of the teacher, if it was evaluated, under "teacher".

    Raises:
        ValueError: there are no weights, or they do not fill the model; the teacher's classes differ.
    """
    settings = RunSettings.from_config(cfg)
    if isinstance(cfg, CfgNode) and not cfg.DATASETS.TEST:
        raise ValueError("--eval-only: DATASETS.TEST is empty; name at least one dataset")
    model = trainer.build_model(cfg)
    weights = _load(settings, model, resume)
    log_student(model, settings, weights=weights)
    teacher_results = None
    try:
        if with_teacher and settings.distiller.EVAL_TEACHER:
            teacher = teacher_of(settings.distiller, settings.device)
            teacher_results = evaluate_teacher(cfg, trainer, teacher, model)
        results = trainer.test(cfg, model)
    finally:
        end_workers()
    note_evaluation(settings.output_dir, results, weights)
    log_results(results, settings)
    if comm.is_main_process() and settings.verify_results:
        verify_results(cfg, results)
    return results if teacher_results is None else {**results, "teacher": teacher_results}


def evaluate_teacher(
    cfg: Any, trainer: type[DefaultTrainer], teacher: Teacher, student: nn.Module
) -> dict[str, Any]:
    """Evaluate a teacher on the student's test images; its detections and results go to OUTPUT_DIR/teacher.

    Raises:
        ValueError: its classes are not those of the student.
    """
    classes, teacher_classes = build_view(student, "student").num_classes, teacher.view.num_classes
    if None not in (classes, teacher_classes) and classes != teacher_classes:
        raise ValueError(
            f"MODEL.DISTILLER.EVAL_TEACHER is True, but the teacher has {teacher_classes} classes and the "
            f"student {classes}; set it to False"
        )
    settings = RunSettings.from_config(cfg)
    if settings.check_data:
        check_tested_teacher(teacher, settings.test_datasets)
    logger.info(f"Evaluation of the teacher ({teacher.source}); that of the student follows")
    model = teacher.predictor(settings.channel_order(student))
    results = trainer.test(in_subfolder(cfg, TEACHER_FOLDER), model)
    note_evaluation(os.path.join(settings.output_dir, TEACHER_FOLDER), results, teacher.source)
    return results


def _load(settings: RunSettings, model: nn.Module, resume: bool) -> str:
    """Load the weights. Returns their path or address."""
    checkpointer = SafeCheckpointer(model, save_dir=settings.output_dir)
    resumed = resume and checkpointer.has_checkpoint()
    if not settings.weights and not resumed:
        raise ValueError("--eval-only needs weights: set MODEL.WEIGHTS, or --resume with OUTPUT_DIR")
    loaded = checkpointer.resume_or_load(settings.weights, resume=resume, with_losses=False)
    keys = checkpointer.incompatible
    missing = keys.missing_keys + [name for name, _, _ in keys.incorrect_shapes]
    if missing:
        raise ValueError(
            f"--eval-only: the weights do not fill the model; {len(missing)} of its tensors are "
            f"missing or of another shape: {sorted(set(missing))[:10]}"
        )
    if settings.check_data:
        path = settings.output_dir if resume else settings.weights
        advice = "Evaluate on datasets with the checkpoint's classes"
        check_checkpoint(path, classes_in(loaded), settings.test_datasets, advice)
        check_number(model, settings.test_datasets)
    return checkpointer.get_checkpoint_file() if resumed else settings.weights
