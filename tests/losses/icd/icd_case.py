"""A step of ICD on random maps and boxes, by the package and by the naive version, from equal draws."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import closeness
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from naive_icd import NaiveICD, NaiveQueries, Slots, queries_from_slots, random_weights

from distill_d2.losses.icd import InstanceConditionalDistillation
from distill_d2.losses.icd.reference import from_reference
from distill_d2.testing.maps import view_of
from distill_d2.views import Batch

SMALL = {"num_classes": 7, "hidden_dim": 16, "att_heads": 4, "bypass_distill": 0}
# Terms of the loss by their names in the naive version, without the layer.
TERMS = {
    "prop_conf": "loss_icd_conf_{}",
    "prop_reg": "loss_icd_reg_{}",
    "distill.0.matt.value": "loss_icd_value",
    "distill.0.temp.value": "loss_icd_temperature",
    "loss_reconst": "loss_icd_reconst",
}


close = functools.partial(closeness.close, floor=0.1)


def random_maps(seed, channels, images, padded, strides) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {s: (images, channels, -(-padded[0] // s), -(-padded[1] // s)) for s in strides}
    return {
        f"p{s.bit_length() - 1}": torch.randn(shape, generator=generator) for s, shape in shapes.items()
    }


def random_instances(random: np.random.Generator, count: int, size: tuple[int, int], classes: int):
    corner = random.uniform(0, 0.5, (count, 2))
    boxes = np.hstack([corner, corner + random.uniform(0.05, 0.5, (count, 2))])
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes * np.tile(size[::-1], 2)).float().reshape(-1, 4))
    instances.gt_classes = torch.tensor(random.integers(0, classes, count))
    return instances


class Case:
    """A loss bound to two detectors with given maps, and a batch.

    Attributes:
        loss: the package's, with the naive version's random ``weights``.
        student, teacher: maps by level name; the student's are leaves.
        draws: the sampler's latest.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        instances: Sequence[int] = (2, 1),
        sizes: Sequence[tuple[int, int]] = ((60, 90), (50, 128), (64, 70)),
        padded: tuple[int, int] = (64, 128),
        strides: Sequence[int] = (16, 32),
        channels: tuple[int, int] = (0, 0),
        iteration: int = 5,
        max_iter: int = 10,
        statistics=None,
        **settings,
    ):
        """
        Args:
            instances: how many each image has; sizes: (height, width) of the images.
            channels: of the student's and of the teacher's maps; 0: the loss's.
            settings: arguments of the loss, other than SMALL.
        """
        random = np.random.default_rng(seed)
        self.settings = {**vars(InstanceConditionalDistillation.Settings()), **SMALL, **settings}
        s = self.settings
        self.sizes, self.padded = list(sizes[: len(instances)]), padded
        self.iteration, self.max_iter = iteration, max_iter
        classes = s["num_classes"]
        self.instances = [random_instances(random, n, z, classes) for n, z in zip(instances, self.sizes)]
        student_channels, teacher_channels = (count or s["hidden_dim"] for count in channels)
        shape = (len(instances), padded, strides)
        self.student = random_maps(seed + 1, student_channels, *shape)
        self.teacher = random_maps(seed + 2, teacher_channels, *shape)
        for level in self.student.values():
            level.requires_grad_()
        given = {**SMALL, "input_feats": [*self.student], **settings}
        self.loss = InstanceConditionalDistillation(**given)
        if statistics is not None:
            self.loss.use_statistics(lambda: statistics)
        self.loss.bind(view_of(self.student, "student"), view_of(self.teacher, "teacher"))
        self.weights = random_weights(
            torch.Generator().manual_seed(seed + 3),
            hidden_dim=s["hidden_dim"],
            heads=s["att_heads"],
            layers=s["att_layers"],
            classes=classes,
            add_scale=s["add_scale_indicator"],
            reconst=s["value_reconst"] > 0,
        )
        # As large as a Linear's at its start: attention is not one-hot then, gradients are no noise.
        self.weights = {n: w / 3**0.5 if w.dim() == 2 else w for n, w in self.weights.items()}
        self._load()
        self._record()

    def _load(self) -> None:
        """The naive version's weights, and the loss's adapters, which only the loss has."""
        state = self.loss.state_dict()
        converted = from_reference(self.weights)
        unknown = {name for name in state.keys() - converted.keys() if "adapters" not in name}
        assert not unknown, unknown
        self.loss.load_state_dict({name: converted.get(name, value) for name, value in state.items()})

    def _record(self) -> None:
        sampler, draw = self.loss.queries.sampler, self.loss.queries.sampler.draw

        def recorded(count, random):
            self.draws = draw(count, random)
            return self.draws

        sampler.draw = recorded

    def batch(self, iteration=None) -> Batch:
        inputs = [
            {"image": torch.empty(3, *size), "instances": copy.deepcopy(instances)}
            for size, instances in zip(self.sizes, self.instances)
        ]
        iteration = self.iteration if iteration is None else iteration
        return Batch(inputs, self.padded, iteration, self.max_iter)

    def views(self):
        return view_of(self.student, "student"), view_of(self.teacher, "teacher")

    def forward(self, iteration=None):
        return self.loss(*self.views(), self.batch(iteration))

    def step(self, iteration=None):
        """Forward and backward from fresh gradients; the terms."""
        self.forget()
        terms = self.forward(iteration)
        sum(terms.values()).backward()
        return terms

    def pretrain(self, iteration=-1):
        self.forget()
        terms = self.loss.pretrain(self.views()[1], self.batch(iteration))
        sum(terms.values()).backward()
        return terms

    def forget(self) -> None:
        for tensor in [*self.loss.parameters(), *self.student.values(), *self.teacher.values()]:
            tensor.grad = None

    def decode(self):
        """Decoded layers, the Queries and the Geometry of the batch."""
        maps, queries, geometry = self.loss.read(self.views()[1], self.batch())
        with torch.no_grad():
            return self.loss.decode(maps, queries, geometry, self.iteration), queries, geometry

    def student_gradients(self):
        return {name: level.grad for name, level in self.student.items()}

    # The naive version.

    def naive_queries(self) -> NaiveQueries:
        """From the draws of the latest step, image by image."""
        prior, counts = self.loss.queries.sampler.prior, [len(i) for i in self.instances]
        filled = [self.loss.queries.sampler.num_slots(count) for count in counts]
        ends = np.cumsum(filled)[:-1]
        draws = self.draws
        normal = np.hstack([np.zeros_like(draws.sizes), draws.sizes])
        parts = [np.split(a, ends) for a in (draws.classes, normal, draws.centers, draws.jitter)]
        zeros = np.zeros_like(prior.mean)
        tables = [np.hstack([zeros, table]) for table in (prior.mean, prior.std)]
        return queries_from_slots(
            [Slots(*image) for image in zip(*parts)],
            [i.gt_boxes.tensor for i in self.instances],
            [i.gt_classes for i in self.instances],
            self.sizes,
            mean_std=np.stack(tables, axis=1),
            sample_range=self.settings["sample_range"],
        )

    def naive(self, distil: bool = True):
        """The naive version's loss object and what it returns, after its backward, and the gradients
        of the student's maps; all in float64."""
        settings = {name.upper(): value for name, value in self.settings.items()}
        bugs = self.settings["reference_bugs"]
        weights = {name: weight.double() for name, weight in self.weights.items()}
        icd = NaiveICD(weights, settings, settings, reference_bugs=bugs)
        leaves = {n: level.detach().double().requires_grad_() for n, level in self.student.items()}
        teacher = {name: level.double() for name, level in self.teacher.items()}
        pairs = self.loss.pairs
        out = icd.forward(
            _adapted(teacher, pairs.teacher_adapters),
            _adapted(leaves, pairs.adapters),
            self.naive_queries(),
            self.sizes,
            self.padded,
            iteration=self.iteration,
            max_iter=self.max_iter,
            distil=distil,
        )
        sum(out["losses"].values()).backward()
        return icd, out, {name: level.grad for name, level in leaves.items()}


def _adapted(maps, adapters):
    adapters = {name: copy.deepcopy(adapters[name]).double() for name in adapters}
    return {
        name: F.conv2d(level, adapters[name].weight.detach(), adapters[name].bias.detach())
        if name in adapters
        else level
        for name, level in maps.items()
    }


def compare_losses(terms, losses) -> None:
    """Our terms with the naive version's, all of both."""
    seen = set()
    for name, expected in losses.items():
        parts = name.split(".")
        term = TERMS.get(name) or TERMS[parts[2]].format(parts[1])
        if term not in terms:  # the naive version names a value loss that is switched off
            assert expected == 0
            continue
        close(terms[term], expected, name)
        seen.add(term)
    assert seen == set(terms)


def compare_gradients(case: Case, icd: NaiveICD, student) -> None:
    """Gradients of the student's maps, and of every parameter but adapters, with the naive version's."""
    for name, expected in student.items():
        close(case.student[name].grad, expected, name)
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in icd.weights.items()
    }
    gradients = from_reference(gradients)
    for name, parameter in case.loss.named_parameters():
        if "adapters" not in name:
            close(parameter.grad, gradients[name], name)
