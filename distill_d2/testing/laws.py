"""The laws that every loss keeps on every kind of detector, each one written once.

Each law is a function of a Cell, a loss and a kind of detector, and takes some training steps of the two.
``LAWS`` lists them; ``check_loss`` holds a loss to all of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable

import torch

from distill_d2 import DistillLoss
from distill_d2.teacher.cache import MemoryStore

from .cells import Cell, Terms, counting, gradients_of, losses_of, parts_of, step
from .family import families
from .synchronization import as_on_a_gpu, no_synchronization


def trains_the_student(cell: Cell) -> None:
    """The terms are finite, and their gradients reach the student."""
    first = cell.first
    _check(bool(first.terms), "the loss returned no terms")
    _check_finite(first.losses)
    _check_gradients(gradients_of(first.model))
    _check(first.reaches_student, f"no gradient of the terms {first.terms} reaches the student")


def reaches_all_that_is_trained(cell: Cell) -> None:
    """Law 8: DDP, with find_unused_parameters=False, needs a gradient of each parameter in each step; also
    without the student's own losses, and without objects."""
    _check_all_are_there(gradients_of(cell.first.model), "")
    _check_all_are_there(cell.without_objects.gradients, " without objects")
    alone = " with TASK_LOSS_WEIGHT 0"
    _check_all_are_there(cell.without_task.gradients, alone)
    model = cell.without_task.model
    step(model, cell.family.batch(objects=0))
    _check_all_are_there(gradients_of(model), f"{alone} and without objects")


def scales_with_its_weight(cell: Cell) -> None:
    """The number ``applied_weight``, which GRADIENT_RATIO sets, multiplies terms of the loss, and leaves the
    others."""
    losses, terms = cell.without_task.losses, cell.first.terms
    scaled = [n for n, term in terms.items() if torch.allclose(losses[n], 2 * term, rtol=1e-3)]
    same = [n for n, term in terms.items() if torch.allclose(losses[n], term, rtol=1e-3)]
    _check(bool(scaled), f"twice applied_weight doubles none of {list(terms)}")
    other = terms.keys() - {*scaled, *same}
    _check(not other, f"twice applied_weight changes {sorted(other)}")


def off_equals_the_baseline(cell: Cell) -> None:
    """Law 1: while the loss is off, the student's losses and gradients are bit for bit those of the student
    alone, the teacher does not run, and what the loss trains has a gradient of zero."""
    student, alone = cell.alone
    model = cell.distiller()
    (loss,) = model.losses.values()
    loss.factor = lambda iteration: 0.0
    with counting(parts_of(model.teacher.model)) as calls:
        losses = step(model, cell.family.batch())
    _check(not calls, f"the teacher ran {sorted(calls)}")
    different = [name for name, term in alone.items() if not torch.equal(term, losses[name])]
    own = dict(student.named_parameters())
    different += [n for n, p in model.student.named_parameters() if not _equal(p.grad, own[n].grad)]
    _check(not different, f"differ from those of the student alone: {different}")
    trained = [p for p in loss.parameters() if p.requires_grad]
    _check(all(p.grad is not None and not p.grad.any() for p in trained), "the loss is trained")


def leaves_the_teacher_alone(cell: Cell) -> None:
    """Law 2: the teacher is in no parameters, buffers, modules and state of the Distiller, in evaluation
    mode, without gradients, and its state is bit for bit the same after a step."""
    model, before = cell.first.model, cell.first.teacher
    teacher = model.teacher.model
    after = teacher.state_dict()
    _check(before.keys() == after.keys(), "the names of the teacher's state changed")
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    _check(not changed, f"the teacher's {changed} changed")
    parts = {*teacher.modules(), *model.teacher.view.model.modules()}  # of the prepared copy, too
    _check(not any(part.training for part in parts), "parts of the teacher are in training mode")
    _check(all(p.grad is None for p in teacher.parameters()), "the teacher has gradients")
    tensors = {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    _check(
        not tensors & {id(t) for t in (*model.parameters(), *model.buffers())}, "seen by the Distiller"
    )
    _check(not set(teacher.modules()) & set(model.modules()), "a module of the Distiller")


def keeps_the_student_plain(cell: Cell) -> None:
    """Laws 2 and 9: the state is the student's own, with the loss's own parameters apart; the student can be
    saved and is a plain detector then; a copy of the Distiller trains."""
    model = cell.distiller()
    state = {name for name in model.state_dict() if not name.startswith("distiller.")}
    _check(state == set(cell.alone[0].state_dict()), "the student's state has other names")
    losses = step(copy.deepcopy(model), cell.family.batch())
    _check(losses.keys() == cell.first.losses.keys(), "a copy of the Distiller has other losses")
    with io.BytesIO() as file:
        torch.save(model.student, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
    losses = step(saved, cell.family.batch())
    _check(losses.keys() == cell.first.own, "the saved student has other losses")


def asks_for_no_more_than_it_needs(cell: Cell) -> None:
    """Law 4: in a step the teacher's backbone runs once, and its other parts only where the loss has stated
    to need them."""
    calls = cell.first.calls
    _check(calls["backbone"] == 1, f"the teacher's backbone ran {calls['backbone']} times")
    others = sorted(calls.keys() - {"backbone"})
    if not cell.first.model.teacher.view.required:
        _check(not others, f"the teacher ran {others}, which the loss does not need")


def reads_the_same_from_a_cache(cell: Cell) -> None:
    """With what TEACHER_CACHE kept of the same images, in another batch, the loss is the same up to rounding, and
    the teacher's backbone does not run."""
    model = cell.distiller()
    teacher, batch = model.teacher, cell.family.batch()
    images = [item["image"] for item in batch]
    teacher.keep_outputs(MemoryStore(2**30))
    with teacher.view.recording():
        teacher.observe(images[::-1], model.padding.of_images(images), images[::-1])
    with counting({"backbone": teacher.view.model.backbone}) as calls:
        losses = losses_of(model, batch)
    _check(not calls, "the teacher's backbone ran")
    off = {
        name: (losses[name].item(), term.item())
        for name, term in cell.first.terms.items()
        if not torch.allclose(losses[name], term, rtol=1e-4, atol=1e-6)
    }
    _check(not off, f"from the cache, and computed: {off}")


def is_float32_without_waiting(cell: Cell) -> None:
    """Law 7: under autocast the terms are float32 and finite, with finite gradients, and the loss does not
    make the host wait for the device."""
    model = cell.distiller()
    (loss,) = model.losses.values()
    forward = loss.forward
    terms: Terms = {}

    def guarded(*args):
        one = torch.ones(1, 1, device=cell.device)
        _check((one @ one).dtype is torch.float32, "the loss is computed under autocast")
        with as_on_a_gpu(), no_synchronization(host=cell.host):
            terms.update(forward(*args))
        return terms

    loss.forward = guarded
    with torch.autocast(cell.device, dtype=torch.bfloat16):
        losses = step(model, cell.family.batch())
    other = {name: term.dtype for name, term in terms.items() if term.dtype != torch.float32}
    _check(not other, f"terms that are not float32: {other}")
    _check_finite(losses)
    _check_gradients(gradients_of(model))


def takes_images_without_objects(cell: Cell) -> None:
    """Law 7: terms and gradients are finite where some or all of the images have no objects."""
    none = cell.without_objects
    _check_finite(none.losses)
    _check_gradients(none.gradients)
    batch = [*cell.family.batch(1), cell.family.batch(objects=0)[1]]
    _check_finite(step(none.model, batch))
    _check_gradients(gradients_of(none.model))


def is_zero_for_equals(cell: Cell) -> None:
    """A student that computes what its teacher computes has no loss."""
    losses = losses_of(cell.distiller_of_equals(), cell.family.batch())
    compared = losses.keys() - cell.first.own
    excused = {name for name in compared if name.startswith(cell.not_zero)}
    large = {name: losses[name].item() for name in compared - excused if losses[name].abs() > 1e-6}
    _check(not large, f"of equal detectors: {large}")


LAWS: list[Callable[[Cell], None]] = [
    trains_the_student,
    reaches_all_that_is_trained,
    off_equals_the_baseline,
    leaves_the_teacher_alone,
    keeps_the_student_plain,
    asks_for_no_more_than_it_needs,
    reads_the_same_from_a_cache,
    is_float32_without_waiting,
    takes_images_without_objects,
    is_zero_for_equals,
    scales_with_its_weight,
]


def check_loss(
    loss: DistillLoss,
    *,
    on: Sequence[str] | None = None,
    equal: DistillLoss | None = None,
    not_zero: Sequence[str] = (),
    host: Sequence[str] = (),
) -> dict[str, str]:
    """Hold a loss of yours to all laws, on every kind of detector with which it works.

        from distill_d2.testing import check_loss

        def test_my_loss():
            check_loss(MyLoss(in_features=["p3"]))

    Args:
        loss: not yet used with a Distiller.
        on: names of kinds of detectors, see ``families``: on these it is tested, and has to work; None: it
            is tested on all, and has to work on some.
        equal: the loss, set so that it is 0 where student and teacher are equal (without adapters, say);
            None: ``loss`` itself is.
        not_zero: what the names of terms begin with that are not 0 even so.
        host: see ``no_synchronization``.

    Returns:
        by kind of detector the reason why it is refused, "" where it works.

    Raises:
        AssertionError: a law is broken; the message names the law and the kind of detector.
    """
    kinds = families()
    unknown = set(on or ()) - kinds.keys()
    _check(not unknown, f"on={sorted(unknown)}: expected some of {list(kinds)}")
    refusals = {}
    for name in kinds if on is None else on:
        cell = Cell(kinds[name], loss, equal=equal, not_zero=not_zero, host=host)
        refusals[name] = cell.refusal
        for law in () if cell.refusal else LAWS:
            # Without it, TorchScript changes the last bits of a function after its first calls.
            with _errors_name_law(law, name), torch.jit.optimized_execution(False):
                law(cell)
    refused = {name: reason for name, reason in refusals.items() if reason}
    works = len(refused) < len(refusals) if on is None else not refused
    _check(works, f"the loss is refused: {refused}")
    return refusals


@contextlib.contextmanager
def _errors_name_law(law: Callable, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        summary = (law.__doc__ or "").strip()
        raise AssertionError(f"{law.__name__}, on {name}: {error!r}\n{summary}") from error


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _check_finite(losses: Terms) -> None:
    broken = {name: loss.item() for name, loss in losses.items() if not loss.isfinite()}
    _check(not broken, f"not finite: {broken}")


def _check_gradients(gradients: Mapping[str, torch.Tensor | None]) -> None:
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    broken = [name for name, gradient in found.items() if not gradient.isfinite().all()]
    _check(not broken, f"gradients that are not finite: {broken}")


def _check_all_are_there(gradients: Mapping[str, torch.Tensor | None], where: str) -> None:
    missing = [name for name, gradient in gradients.items() if gradient is None]
    _check(not missing, f"no gradient of {missing}{where}")


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
