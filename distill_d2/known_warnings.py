"""Silence the known, harmless warnings of detectron2's own code; everything else stays visible.

Each filter names one message, so a warning about the user's model or data is never lost.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings

_HARMLESS = (
    # detectron2/model_zoo/model_zoo.py finds its files through pkg_resources (hence setuptools<81).
    ("pkg_resources is deprecated as an API", UserWarning),
    # detectron2/modeling/box_regression.py scripts two small functions at import time.
    (r"`torch\.jit\.script` is deprecated", (FutureWarning, DeprecationWarning)),
    # detectron2/modeling/anchor_generator.py calls torch.meshgrid and relies on its default, "ij".
    (r"torch\.meshgrid: in an upcoming release", UserWarning),
    # detectron2/engine/defaults.py, for several processes.
    ("`broadcast_buffers` is deprecated", FutureWarning),
)

# Of loggers, by name.
_NO_NEWS = (
    # A config without VERSION is of the latest; only an older one is news.
    ("detectron2.config.compat", "no VERSION. Assuming it to be compatible with latest"),
    # detectron2's report of the machine asks for the compiler.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # detectron2/modeling/poolers.py asks whether it is being traced.
    ("torch.fx._symbolic_trace", "is_fx_tracing will return true"),
)


def silence_known_warnings() -> None:
    """Add the filters to this process; a spawned process adds them when it imports distill_d2."""
    for message, categories in _HARMLESS:
        for category in categories if isinstance(categories, tuple) else (categories,):
            warnings.filterwarnings("ignore", message=message, category=category)
    for name, text in _NO_NEWS:
        logging.getLogger(name).addFilter(functools.partial(_is_news, text))


def silence_in_spawned_processes() -> None:
    """For those of ``python -m distill_d2``, which import torch and detectron2 before this package."""
    own = "ignore:`torch.jit.script` is deprecated:FutureWarning"
    given = os.environ.get("PYTHONWARNINGS", "")
    if own not in given:
        os.environ["PYTHONWARNINGS"] = f"{given},{own}" if given else own


def _is_news(known: str, record: logging.LogRecord) -> bool:
    return known not in record.getMessage()
