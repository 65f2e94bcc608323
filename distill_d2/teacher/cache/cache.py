"""Run a teacher once for each image, and keep what losses read of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from detectron2.utils.events import get_event_storage, has_event_storage

from ...views import DetectorView
from .fingerprint import as_bytes
from .layout import Entry, Layout, Outputs

Size = tuple[int, int]


class Store(Protocol):
    """Keeps entries by name, as many as it has room for."""

    def get(self, name: str) -> Entry | None: ...

    def put(self, name: str, entry: Entry) -> None: ...


class TeacherCache:
    """A frozen teacher's outputs by image.

    They depend on the pixels of the augmented image and on the size to which its batch is padded, because the
    teacher sees zeros behind the image in its first layer alone. So these two are the name of an entry, and a
    teacher's outputs are never those of another image, whatever the augmentations.

    An image and its mirror images are always computed together, apart from others: what a run reads does not
    depend on what was kept before, and a resumed run is the uninterrupted one.
    """

    def __init__(
        self,
        view: DetectorView,
        run: Callable[[Sequence[torch.Tensor], Size], Any],
        compute: Callable[[Sequence[torch.Tensor], Size], Outputs],
        store: Store,
        layout: Layout,
        *,
        flips: Sequence[tuple[int, ...]] = (),
        paddings: Callable[[Size], Sequence[Size]] | None = None,
        half: bool = False,
        share: float = 1.0,
    ):
        """
        Args:
            view: the teacher's.
            run: runs its backbone on images, padded to (H, W); the view remembers the outputs.
            compute: returns the outputs of backbone and heads for images, padded to (H, W), instead.
            store: keeps the entries.
            layout: of the outputs.
            flips: the dimensions of an image (C, H, W) along which it may be mirrored in a later step.
            paddings: the sizes (H, W) to which an image (height, width) may be padded in a later step, for which
                the teacher is run, too, when it sees an image for the first time; None: only for those that it
                sees.
            half: keep float16.
            share: of all images, that are kept; for the others the teacher is run in each step.
        """
        self._view = view
        self._run = run
        self._compute = compute
        self._store = store
        self._layout = layout
        self._flips = [tuple(dims) for dims in flips]
        self._paddings = paddings
        self._half = half
        self._share = share

    def observe(
        self,
        images: Sequence[torch.Tensor],
        padded_size: Size,
        originals: Sequence[torch.Tensor],
        precision: torch.dtype | None,
    ) -> None:
        """As ``Teacher.observe``.

        Args:
            originals: the images on the host.
            precision: with which the teacher is run.
        """
        kept: list[Entry | None] = []
        hits = 0
        for image, original in zip(images, originals):
            entry = self._store.get(_name(digest(original), padded_size, precision))
            hits += entry is not None
            kept.append(entry or self._compute_kept(image, original, padded_size, precision))
        if has_event_storage():
            storage = get_event_storage()
            storage.put_scalar("teacher_cache/hits", hits / len(images), smoothing_hint=False)
        others = [i for i, entry in enumerate(kept) if entry is None]
        if len(others) == len(images):
            self._run(images, padded_size)
            return
        if others:
            outputs = self._compute([images[i] for i in others], padded_size)
            for i, entry in zip(others, self._layout.entries(outputs)):
                kept[i] = entry
        entries = [entry for entry in kept if entry is not None]
        for path, runs in self._layout.outputs(entries, images[0].device).items():
            for output in runs:
                self._view.taps.put(path, output)

    def _compute_kept(
        self,
        image: torch.Tensor,
        original: torch.Tensor,
        padded_size: Size,
        precision: torch.dtype | None,
    ) -> Entry | None:
        """The entry of an image that is to be kept; None: it is not. Its mirror images are computed, too."""
        group = {digest(original): image}
        for dims in self._flips:
            group[digest(original.flip(dims))] = image.flip(dims)
        digests = sorted(group)  # whichever of them was seen first
        if _fraction(digests) >= self._share:
            return None
        wanted = _name(digest(original), padded_size, precision)
        found = None
        more = self._paddings((original.shape[1], original.shape[2])) if self._paddings else ()
        for size in dict.fromkeys([padded_size, *more]):
            names = [_name(name, size, precision) for name in digests]
            if size != padded_size and all(self._store.get(name) for name in names):
                continue
            outputs = self._compute([group[name] for name in digests], size)
            entries = self._layout.entries(outputs, self._half)
            for name, entry in zip(names, entries):
                self._store.put(name, entry)
                found = entry if name == wanted else found
        return found


def digest(image: torch.Tensor) -> str:
    """A checksum of an image on the host: 128 bits in hexadecimal digits."""
    found = hashlib.blake2b(f"{tuple(image.shape)} {image.dtype}".encode(), digest_size=16)
    found.update(as_bytes(image))
    return found.hexdigest()


def _fraction(digests: Sequence[str]) -> float:
    """A number from 0 to 1, always the same for an image and its mirror images."""
    found = hashlib.blake2b("".join(digests).encode(), digest_size=6)
    return int(found.hexdigest(), 16) / 16 ** len(found.hexdigest())


def _name(image: str, padded_size: Size, precision: torch.dtype | None) -> str:
    height, width = padded_size
    return f"{image}-{height}x{width}-{str(precision or torch.float32).rpartition('.')[2]}"
