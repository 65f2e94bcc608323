"""DistillTrainer: detectron2's DefaultTrainer for students with or without a teacher."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import inference_on_dataset, print_csv_format, verify_results
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..data import (
    NamedReadErrors,
    ShieldedLoader,
    batched_test_loader,
    build_mapper,
    end_workers,
    train_loader_of_config,
)
from ..data.classes import classes_in, classes_of
from ..distiller import Distiller
from ..evaluation import build_evaluator, with_model_evaluators
from ..kernels import FastKernels, follow_layout
from ..random_state import random_state, set_random_state
from ..rules import assertions_told
from . import classes
from .acting import check_acting
from .best import BestCheckpoint, EndedEarly
from .distributed import distributed
from .ema import AveragedWeights
from .evaluate import evaluate_teacher
from .exact import exact_torchscript
from .gradient_log import GradientLog
from .gradient_ratios import GradientRatios, ratios_in_step
from .hooks import (
    BoundedHistories,
    Checkpoints,
    EvalHook,
    ExpectedDuration,
    LRScheduler,
    MeasuredWeights,
    PreciseBN,
    ProgressBar,
    StopOnRequest,
    Writers,
)
from .interrupt import Interrupted, StopRequest, stop_request
from .last_step import LastStep
from .loss_training import LossTraining
from .metrics import Events, MetricsFile
from .optimizer import build_optimizer, optimizer_signature
from .resume_checks import all_have_checkpoint, check_length, check_optimizer, check_trainer
from .run_state import RunState
from .run_summary import log_schedule, log_student
from .settings import RunSettings, micro_batch
from .step import TrainStep
from .teacher_cache import use_teacher_cache
from .trackers import build_trackers

logger = logging.getLogger(__name__)


class DistillTrainer(DefaultTrainer):
    """Trains any detectron2 config: a plain detector, or one wrapped in the Distiller.

    Beyond DefaultTrainer: several CPU processes, mixed precision on CPU too, exact resume (data
    order, random state, the losses' parameters), a checkpoint on SIGINT and SIGTERM, checkpoints
    whose "model" is the plain student, losses with a solver of their own, and the training phases
    of MODEL.DISTILLER (PRETRAIN_TEACHER_ITERS, FIX_BACKBONE_BEFORE, FIX_HEAD_BEFORE). Like DefaultTrainer it is
    built from a config; ``trainer.resume_or_load(resume)`` and ``trainer.train()`` follow.

    Attributes:
        settings: the settings that it read from the config.
        plain_model: the model, not wrapped in DistributedDataParallel.
        loss_training: pretraining and solvers of losses. ``iter`` and ``max_iter`` include the
            iterations of pretraining.
        last_results: of the last evaluation; None before the first.
        average: of the student's weights, with SOLVER.EMA.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            ValueError, KeyError, OSError: the config, its data or its teacher is wrong.
        """
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.settings = RunSettings.from_config(cfg)
        model = self.build_model(cfg)
        self.plain_model = model
        self._kernels = FastKernels(self._student()) if self.settings.fast_kernels else None
        if isinstance(model, Distiller):
            check_acting(model.losses, model.phases, self.settings.max_iter)
        self.loss_training = LossTraining(model, self.settings)
        self.start_iter = 0
        self.max_iter = self.settings.max_iter + self.loss_training.pretrain_iters
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.average = AveragedWeights(self._student(), self.settings.ema)
        self._run_state = RunState(cfg, model, self._student(), data_loader, self.average)
        self._gradients = GradientLog(model, data_loader, self.settings)
        self._ratios = GradientRatios(model, data_loader, self.settings)
        self._check_classes()
        self._trainer = TrainStep(
            distributed(model, **self.settings.ddp),
            data_loader,
            optimizer,
            autocast_dtype=self.settings.autocast_dtype(),
            own_optimizers=self.loss_training.optimizers,
            frozen_parameters=self.loss_training.frozen_parameters,
            accumulate=self.settings.accumulate,
            extra=functools.partial(ratios_in_step, model),
        )
        if isinstance(model, Distiller):
            use_teacher_cache(model, data_loader, self.max_iter * self.settings.accumulate)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self._build_checkpointer(model)
        self.stop = StopRequest()
        self._has_trained = False
        self.last_results: dict[str, Any] | None = None
        self._best = BestCheckpoint(self.settings)
        self._last_step = LastStep()
        self.register_hooks([*self.build_hooks(), self._last_step])

    # Parts that LazyDistillTrainer builds in its own way.

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with assertions_told("the model"):
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        images = micro_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE, "SOLVER")
        return train_loader_of_config(cfg, images)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str, model: nn.Module | None = None):
        """
        Args:
            model: what is evaluated, in batches of TEST.IMS_PER_BATCH images; None: one by one.
        """
        mapper = build_mapper(cfg, is_train=False)
        if model is None:
            mapper = NamedReadErrors(mapper)
            return ShieldedLoader(build_detection_test_loader(cfg, dataset_name, mapper=mapper))
        parts = build_detection_test_loader.from_config(cfg, dataset_name, mapper=mapper)
        images, workers = cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS
        return batched_test_loader(parts["dataset"], mapper, model, images, workers)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return build_evaluator(
            dataset_name,
            cfg.OUTPUT_DIR,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            keypoint_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """DefaultTrainer's, with the evaluators that modules of the model provide, and in batches."""
        if evaluators is None:
            evaluators = [
                with_model_evaluators(cls.build_evaluator(cfg, name), model)
                for name in cfg.DATASETS.TEST
            ]
        if cfg.TEST.IMS_PER_BATCH == 1:
            return super().test(cfg, model, evaluators)
        results: dict[str, Any] = OrderedDict()
        for name, evaluator in zip(cfg.DATASETS.TEST, evaluators):
            loader = cls.build_test_loader(cfg, name, model)
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info(f"Evaluation results for {name} in csv format:")
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    def build_writers(self) -> list[EventWriter]:
        folder = self.settings.output_dir
        writers = [CommonMetricPrinter(self.max_iter), MetricsFile(folder), Events(folder)]
        return writers + build_trackers(self.cfg, folder)

    def _all_writers(self) -> list[EventWriter]:
        return self.build_writers() + self.loss_training.writers()

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's hooks, with our checkpoints, stop requests and progress bar."""
        ret: list[HookBase] = [
            MeasuredWeights(self.measure_weights),
            hooks.IterationTimer(),
            LRScheduler(),
        ]
        ret += self.loss_training.hooks()
        ret += [self.average, *self._precise_bn()]
        ret += [Checkpoints(self.settings.checkpoint_period), StopOnRequest()]
        evaluation = EvalHook(self.settings.eval_period, self._evaluate, self._best)
        ret.append(evaluation)
        if comm.is_main_process():
            period = self.settings.log_period
            ret.append(ExpectedDuration())
            ret.append(Writers(self._all_writers, period, evaluation))
        if ProgressBar.is_enabled():
            ret.append(ProgressBar())
        return [*ret, BoundedHistories(), self._best]

    def _precise_bn(self) -> list[HookBase]:
        if not self.settings.precise_bn_iters:
            return []
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader, iterations = self.build_train_loader(cfg), self.settings.precise_bn_iters
        self._run_state.add_loader("precise_bn", loader)
        return [PreciseBN(self.settings.eval_period, self.model, loader, iterations)]

    @property
    def _checked_datasets(self) -> tuple[str, ...]:
        """The training datasets whose classes are compared with others."""
        return self.settings.train_datasets if self.settings.check_data else ()

    def _check_classes(self) -> None:
        classes.check_number(self._student(), self._checked_datasets)
        if isinstance(self.plain_model, Distiller):
            classes.check_teacher(self.plain_model, self._checked_datasets)

    # Training.

    @property
    def pretraining(self) -> bool:
        """Whether this iteration trains losses alone."""
        return self.iter < self.loss_training.pretrain_iters

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from OUTPUT_DIR's newest whole checkpoint, or start from MODEL.WEIGHTS at iteration 0.

        Raises:
            ValueError: the last checkpoint is of another model, or of other solvers of losses; only some
                of the machines see it.
        """
        found = resume and all_have_checkpoint(self.checkpointer)
        loaded = self.checkpointer.resume_or_load(self.settings.weights, resume=found)
        if found:
            self._continue_from(loaded)
        elif isinstance(self.plain_model, Distiller):
            classes.check_preload(self.plain_model, self._checked_datasets)
            self.plain_model.preload_student()
        if resume:
            self._last_step.continue_metrics(self.settings.output_dir, self.start_iter - 1)
            self._best.continue_from(self._last_step.logged(self._best.metric))

    def _continue_from(self, loaded: dict[str, Any]) -> None:
        """Restore what depends on the checkpoint as a whole.

        Args:
            loaded: its further entries.
        """
        advice = "Resume with the checkpoint's datasets, or start a new run without --resume"
        folder = self.settings.output_dir
        classes.check_checkpoint(f"in {folder}", classes_in(loaded), self._checked_datasets, advice)
        self.start_iter = self.iter + 1
        check_length(self.start_iter, self.loss_training.pretrain_iters, self.settings)
        self._run_state.restore(self.start_iter, self.start_iter * self.settings.accumulate)

    def evaluate_teacher(self) -> None:
        """Evaluate the teacher before a fresh run, if MODEL.DISTILLER.EVAL_TEACHER is True.

        Raises:
            ValueError: its classes are not those of the student.
        """
        model = self.plain_model
        if self.start_iter or not isinstance(model, Distiller):
            return
        if not self.settings.distiller.EVAL_TEACHER:
            return
        state = random_state()
        evaluate_teacher(self.cfg, type(self), model.teacher, model.student)
        set_random_state(state)

    def log_start(self) -> None:
        """Log what is trained, from which weights, and how long, once weights are loaded."""
        log_student(self._student(), self.settings, self.start_iter)
        log_schedule(self.cfg, self.start_iter, self.max_iter, self._trainer.data_loader)

    def train(self) -> dict[str, Any] | None:
        """Run to the last iteration; on SIGINT or SIGTERM save, log how to resume, and return.

        Returns:
            the last evaluation's results; None if it was stopped.

        Raises:
            FloatingPointError: a loss is not finite.
            RuntimeError: it has trained before.
        """
        if self._has_trained:
            raise RuntimeError(
                "a DistillTrainer trains only once: its hooks end with the training. Build a new one, and "
                "call resume_or_load(resume=True)"
            )
        self._has_trained = True
        with stop_request(self.stop), exact_torchscript(self.settings.device):
            try:
                TrainerBase.train(self, self.start_iter, self.max_iter)
                return self._verified_results()
            except EndedEarly:
                if self.last_results is None:  # the run had ended before
                    self._evaluate()
                return self._verified_results()
            except Interrupted:
                logger.warning(
                    f"Stopped by signal {self.stop.signal or 'of another process'} after iteration "
                    f"{self.iter}; saved in {self.settings.output_dir}. The same command with "
                    "--resume continues from there."
                )
                return None
            finally:
                end_workers()
                if self._kernels is not None:
                    self._kernels.undo()

    def _verified_results(self) -> dict[str, Any] | None:
        results = self.last_results
        if self.settings.verify_results and comm.is_main_process():
            if results is None:
                raise ValueError(
                    "TEST.EXPECTED_RESULTS is set, but nothing was evaluated (DATASETS.TEST)"
                )
            verify_results(self.cfg, results)
        return results

    def before_train(self) -> None:
        super().before_train()
        self._run_state.restore_random_state()
        self._best.end_resumed()

    def after_train(self) -> None:
        if self.start_iter >= self.max_iter:
            self.iter = self.max_iter  # TrainerBase counts a step where none was left
        super().after_train()

    def measure_weights(self) -> None:
        """Before each step: set the weights that are measured, and once measure all gradients."""
        iteration = self.iter - self.loss_training.pretrain_iters
        self._ratios.before(iteration)
        if iteration == 0:
            self._gradients.start()

    def note_stop_request(self) -> None:
        """Tell the step whether this process was asked to stop; the processes then agree."""
        self._trainer.stop_requested = bool(self.stop)

    def detect_anomaly(self) -> None:
        """From now on, repeat a step whose losses are not finite, to name the operation."""
        self._trainer.detect_anomaly = True

    @property
    def stop_agreed(self) -> bool:
        return self._trainer.report.stop

    def save(self, name: str) -> None:
        """Write a checkpoint; all processes call it, the main one writes."""
        self._trainer.report.flush()
        self._run_state.gather()
        with self.average.applied():
            self.checkpointer.save(name, **self._metadata())

    def save_student(self, name: str, **metadata: Any) -> None:
        """Write the student alone, from which nothing is resumed; the main process calls it.

        Args:
            metadata: further entries of the file's metadata.
        """
        with self.average.applied():
            self.checkpointer.save_weights(name, **self._metadata(**metadata))

    def _metadata(self, **entries: Any) -> dict[str, Any]:
        things = classes_of(self.settings.train_datasets)
        entries = {**({"thing_classes": things} if things else {}), **entries}
        return {"metadata": entries} if entries else {}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["optimizer_kind"] = optimizer_signature(self._trainer.optimizer)
        state.update(self.loss_training.state_dict())
        state.update(self._ratios.state_dict())
        state.update(self._run_state.state_dict())
        state.update(self.average.entries())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_trainer(state_dict, self.settings.output_dir)
        # Before anything is loaded: with other solvers the student's optimizer differs, too.
        self.loss_training.check(state_dict)
        check_optimizer(self._trainer.optimizer, state_dict)
        self._ratios.check(state_dict)
        super().load_state_dict(state_dict)
        follow_layout(self._trainer.optimizer)
        self.loss_training.load_state_dict(state_dict)
        self._ratios.load_state_dict(state_dict)
        self._run_state.load_state_dict(state_dict)
        self.average.continue_from(state_dict)

    def _student(self) -> nn.Module:
        model = self.plain_model
        return model.student if isinstance(model, Distiller) else model

    def _build_checkpointer(self, model: nn.Module) -> SafeCheckpointer:
        """Law 9: "model" is the plain student; the losses' own parameters are "distiller"."""
        extra = {"distiller": model.losses} if isinstance(model, Distiller) else {}
        folder = self.settings.output_dir
        return SafeCheckpointer(self._student(), folder, trainer=weakref.proxy(self), **extra)

    def _evaluate(self) -> dict[str, Any]:
        state = random_state()  # evaluation must not change what training draws afterwards
        try:
            with (
                self.average.applied(),
                self.model.register_forward_pre_hook(lambda *_: self._leave_if_asked()),
            ):
                self.last_results = self.test(self.cfg, self.model)
        except Interrupted:
            set_random_state(state)
            if self.iter < self.max_iter:  # afterwards model_final is there
                self.save(f"model_{self.iter:07d}")
            raise
        set_random_state(state)
        self._gradients.after(min(self.iter + 1, self.max_iter))
        return self.last_results

    def _leave_if_asked(self) -> None:
        """A scheduler may not wait for the end of an evaluation. Several processes finish it, because they
        cannot leave together while each evaluates its own images."""
        if self.stop and comm.get_world_size() == 1:
            raise Interrupted
