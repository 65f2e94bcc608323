"""Evaluators work in one process and in a folder that is removed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from detectron2.data import MetadataCatalog
from detectron2.utils import comm


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Let evaluators, which wait for all processes and gather their detections, run in this one alone."""
    world_size, synchronize = comm.get_world_size, comm.synchronize
    comm.get_world_size, comm.synchronize = lambda: 1, lambda: None
    try:
        yield
    finally:
        comm.get_world_size, comm.synchronize = world_size, synchronize


@contextlib.contextmanager
def work_folder(name: str) -> Iterator[str]:
    """A folder for an evaluator. Its conversion of a dataset to COCO's format is forgotten with it."""
    metadata = MetadataCatalog.get(name)
    had_json = "json_file" in metadata.as_dict()
    with tempfile.TemporaryDirectory(prefix="distill_d2_") as folder:
        try:
            yield folder
        finally:
            if not had_json and "json_file" in metadata.as_dict():
                del metadata.json_file
            for other in MetadataCatalog.list():
                if folder in other:
                    MetadataCatalog.remove(other)
