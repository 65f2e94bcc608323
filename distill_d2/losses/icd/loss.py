"""ICD: instance-conditional knowledge distillation.

Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021, arXiv
2110.12724. Real and fake instances become queries; a decoder on the teacher's neck, trained by an
auxiliary task (does the instance exist, and where), learns where in the feature maps the knowledge
about an instance is. There the student's projected features mimic the teacher's:

    L = WEIGHT_VALUE * mean over images, heads, channels of
        sum_s M |LN V_S - LN V_T|^2 / sum_s M,      M = sum over real instances of their attention

with weight 8 for one-stage and 3 for two-stage detectors. The student's own losses never train the
decoder, and the auxiliary task never the student. Only necks are read, so any detector works. Where the
authors' code and the paper differ, this follows the code. All means are over the process's batch.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode as CN
from torch import nn

from ...views import Batch, DetectorView
from ..base import DISTILL_LOSS_REGISTRY
from ..pairing import FeaturePairs
from ..randomness import seed_of
from ..trained import TrainedLoss
from .auxiliary import AuxiliaryTask
from .decoder import ConditionalDecoder, Decoded, dropout_seed
from .geometry import Geometry, geometry_of
from .projection import positions_of
from .queries import InstanceQueries
from .reference import from_reference
from .sampling import BoxPrior, Queries, SlotSampler
from .settings import ICDSettings
from .student import StudentValues

logger = logging.getLogger(__name__)

Terms = dict[str, torch.Tensor]
Maps = list[torch.Tensor]


@DISTILL_LOSS_REGISTRY.register()
class InstanceConditionalDistillation(TrainedLoss):
    """ICD; keys in MODEL.DISTILLER.INS, INS_ATT_MIMIC and MODEL.DISTILLER itself.

    Its parameters, 1.3 M with the defaults and 80 classes: query encoder, decoder and predictor,
    trained by the auxiliary task alone, and the student's value projections.
    """

    NODE = "ICD"

    weight_setting = "weight_value"
    schedule = ("bypass_distill", "bypass_distill_after", "distill_on", "distill_off")

    Settings = ICDSettings
    settings: ICDSettings
    queries: InstanceQueries  # from bind on: it needs the number of classes

    def __init__(self, *, solver: CN | None = None, **keys: Any):
        """
        Args:
            solver: MODEL.DISTILLER.SOLVER; None: the student's optimizer trains these parameters.
            keys: the settings by name.
        """
        super().__init__(**keys)
        s = self.settings
        self.solver = solver
        self.pairs = FeaturePairs(
            s.input_feats,
            channels=s.hidden_dim,
            contiguous=False,
            key=self.config_key("input_feats"),
        )
        on_values = s.use_pos_embedding and s.decoder_posemb_on_v
        self.decoder = ConditionalDecoder(
            s.att_layers,
            s.hidden_dim,
            s.att_heads,
            project_positions=s.project_pos,
            positions_on_keys=s.use_pos_embedding,
            positions_on_values=on_values,
            dropout=s.dropout,
        )
        self.auxiliary = AuxiliaryTask(s.hidden_dim)
        self.student = nn.ModuleList(
            StudentValues(s.hidden_dim, positions=on_values, project=s.project_pos) for _ in self.decoder
        )
        reconstructed = self.decoder if s.value_reconst > 0 else ()
        self.reconstructors = nn.ModuleList(nn.Linear(s.hidden_dim, s.hidden_dim) for _ in reconstructed)
        self._statistics: Callable | None = None

    @classmethod
    def from_config(cls, distiller: CN) -> InstanceConditionalDistillation:
        return cls(**cls.read_config(distiller), solver=distiller.SOLVER)

    def use_statistics(self, statistics: Callable) -> None:
        self._statistics = statistics
        if hasattr(self, "queries"):  # bound already
            self.queries.sampler.prior = self._prior(self.queries.classes)

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        try:
            super().bind(student, teacher)
        except KeyError as error:
            raise KeyError(f"MODEL.DISTILLER.INS.INPUT_FEATS: {error.args[0]}") from error
        s = self.settings
        if 0 < s.num_classes < (student.num_classes or 0):
            raise ValueError(
                f"MODEL.DISTILLER.INS.NUM_CLASSES is {s.num_classes}, but the student has "
                f"{student.num_classes} classes; set it to 0, which means the student's"
            )
        classes = s.num_classes or student.num_classes
        if not classes:
            raise ValueError(
                f"MODEL.DISTILLER.INS.NUM_CLASSES is {s.num_classes}, and the number of classes of a "
                f"{type(student.model).__name__} is unknown; set it"
            )
        sampler = SlotSampler(
            self._prior(classes),
            rule=s.sample_rule,
            ratio=s.num_neg_pos_ratio,
            num_labels=s.num_labels,
            max_labels=s.max_labels,
            jitter=s.sample_range,
            last_image_scale=s.reference_bugs,
        )
        self.queries = InstanceQueries(sampler, classes, s.hidden_dim, s.add_scale_indicator)
        for parameter in self._of_student():
            parameter.requires_grad_(s.weight_value > 0)

    def _prior(self, classes: int) -> BoxPrior:
        s = self.settings
        prior = BoxPrior.uniform(classes)
        if s.uniform_sample_class and s.uniform_sample_box:
            return prior
        if self._statistics is None:
            logger.info(
                "ICD: no statistics of the training data are known, so fakes are drawn uniformly."
            )
            return prior
        measured = BoxPrior.of(self._statistics(), classes)
        return BoxPrior(
            prior.probability if s.uniform_sample_class else measured.probability,
            prior.mean if s.uniform_sample_box else measured.mean,
            prior.std if s.uniform_sample_box else measured.std,
        )

    # One step.

    def forward(self, student: DetectorView, teacher: DetectorView, batch: Batch) -> Terms:
        """The auxiliary terms "loss_icd_conf_{layer}" and "loss_icd_reg_{layer}", "loss_icd_value"
        and, with value_reconst, "loss_icd_reconst"; weighted."""
        maps, queries, geometry = self.read(teacher, batch)
        with torch.set_grad_enabled(not self._stopped(batch.iteration)):
            decoded = self.decode(maps, queries, geometry, batch.iteration)
            terms = self.auxiliary_terms(decoded, queries, maps)
        if self._stopped(batch.iteration):
            terms = _reach(terms, self._of_teacher())
        if self.settings.weight_value > 0:
            detach = not self.reaches_student(batch.iteration)
            student_maps = self.pairs.of_student(student, geometry.level_sizes, detach=detach)
            temperature = self.temperature(batch.iteration, batch.max_iter)
            terms["loss_icd_value"] = self.value_term(
                list(student_maps.values()), decoded, queries, geometry, temperature
            )
        if self.settings.temp_value < 0:
            terms["loss_icd_temperature"] = terms["loss_icd_conf_0"].new_ones(())
        return terms

    def pretrain(self, teacher: DetectorView, batch: Batch) -> Terms:
        """The auxiliary terms alone."""
        maps, queries, geometry = self.read(teacher, batch)
        decoded = self.decode(maps, queries, geometry, batch.iteration)
        return self.auxiliary_terms(decoded, queries, maps)

    def read(self, teacher: DetectorView, batch: Batch):
        """The teacher's levels (N, C, H, W), the Queries, and the Geometry of a batch."""
        maps = list(self.pairs.of_teacher(teacher).values())
        queries = self.queries.sample(batch, seed_of(batch.iteration))
        sizes = tuple(tuple(feature.shape[-2:]) for feature in maps)
        images = tuple(batch.image_sizes)
        channels, device = self.settings.hidden_dim, maps[0].device
        geometry = geometry_of(sizes, batch.padded_size, images, channels, device)
        return maps, queries, geometry

    def decode(self, maps: Maps, queries: Queries, geometry: Geometry, iteration: int) -> list[Decoded]:
        """The outputs of the decoder's layers for the queries and the teacher's levels."""
        encoded = self.queries(queries)
        if self.settings.dropout == 0:
            return self.decoder(encoded, maps, geometry)
        with dropout_seed(seed_of(iteration), encoded.device):
            return self.decoder(encoded, maps, geometry)

    def auxiliary_terms(self, decoded: list[Decoded], queries: Queries, maps: Maps) -> Terms:
        """The terms that train the decoder."""
        terms: Terms = {}
        for index, layer in enumerate(decoded):
            existence, localization = self.auxiliary(layer.features, queries)
            terms[f"loss_icd_conf_{index}"] = self.settings.confidence_loss_weight * existence
            terms[f"loss_icd_reg_{index}"] = localization
        if self.reconstructors:
            features = torch.cat([positions_of(feature) for feature in maps], dim=1).detach()
            errors = [
                F.mse_loss(reconstruct(layer.values), features)
                for reconstruct, layer in zip(self.reconstructors, decoded)
            ]
            terms["loss_icd_reconst"] = torch.stack(errors).mean()
        return terms

    def value_term(
        self,
        maps: Maps,
        decoded: list[Decoded],
        queries: Queries,
        geometry: Geometry,
        temperature: float,
    ) -> torch.Tensor:
        """The distillation term, weighted, from the student's levels: a scalar."""
        s = self.settings
        counts = queries.filled if s.distill_negative else queries.real
        distances = [
            student(
                maps,
                geometry,
                layer.values,
                layer.attention_mass(counts, temperature),
                form=s.loss_form,
                norm=s.distill_norm,
            )
            for student, layer in zip(self.student, decoded)
        ]
        return self.applied_weight * torch.stack(distances).mean()

    # Schedules.

    def reaches_student(self, iteration: int) -> bool:
        """Whether gradients of the distillation reach the student at this iteration."""
        s = self.settings
        outside = iteration < s.bypass_distill or iteration > s.bypass_distill_after
        return s.weight_value > 0 and (s.distill_off if outside else s.distill_on) != 0

    def temperature(self, iteration: int, max_iter: int) -> float:
        """The temperature of the attention weights at this iteration."""
        s = self.settings
        if s.temp_value < 0:
            return 1.0
        if not s.temp_decay:
            return s.temp_value
        if max_iter < 1:
            raise ValueError(
                f"MODEL.DISTILLER.INS_ATT_MIMIC.TEMP_DECAY needs the length of the run, but Distiller's "
                f"max_iter is {max_iter}"
            )
        done = iteration / max_iter
        return done * s.temp_decay_to + (1 - done) * s.temp_value

    def solver_advances(self, iteration: int) -> bool:
        return not self._stopped(iteration)

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        if iteration < 0:  # pretraining
            return self._of_student()
        return self._of_teacher() if self._stopped(iteration) else []

    def _stopped(self, iteration: int) -> bool:
        return iteration > self.settings.stop_joint

    def _of_student(self) -> list[nn.Parameter]:
        """Parameters that the distillation trains: the student's side."""
        return [*self.student.parameters(), *self.pairs.adapters.parameters()]

    def _of_teacher(self) -> list[nn.Parameter]:
        """Parameters that the auxiliary task trains."""
        of_student = set(self._of_student())
        return [p for p in self.parameters() if p not in of_student]

    # Parameters of an earlier run.

    def starting_state(self, state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
        """All of it, or for "teacher_only" all but the student's side."""
        if part == "all":
            return state
        return {k: v for k, v in state.items() if not k.startswith(("student.", "pairs.adapters."))}

    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = self.state_dict()
        # The reference has projectors of positions even if they are not used.
        converted = from_reference(state).items()
        return {k: v for k, v in converted if k in own or "pos_projector" not in k}


def _reach(terms: Terms, parameters) -> Terms:
    """Let the terms' sum reach these parameters with a zero, so that DDP sees a gradient for them."""
    name, term = next(iter(terms.items()))
    return {**terms, name: term + 0.0 * sum(p.sum() for p in parameters if p.requires_grad)}
