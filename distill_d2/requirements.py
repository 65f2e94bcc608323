"""detectron2, which pip does not install with this package."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings

MISSING = (
    "distill_d2 needs detectron2, which is not on the package index; `distill-d2 install-detectron2` installs it "
    "(or `python -m distill_d2 install-detectron2`)"
)


def require_detectron2() -> None:
    """Raises ImportError, whose message names the command that installs it, if detectron2 is not installed."""
    if importlib.util.find_spec("detectron2") is None:  # which does not import it
        raise ImportError(MISSING, name="detectron2")


def warn_without_detectron2() -> None:
    """For ``import distill_d2``: a submodule that is imported next ends with Python's own message. The command
    says it itself."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name in ("distill-d2", "-m"):  # "-m": Python is still looking for the module that it is to run
        return
    if importlib.util.find_spec("detectron2") is None:
        warnings.warn(MISSING, stacklevel=3)
