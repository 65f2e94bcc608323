"""Tools for testing losses and detectors, our own and those of a user's package. Nothing else imports this.

- ``tiny_config``, ``tiny_detector``, ``tiny_batch``, ``write_dataset``: detectors, batches and datasets that
  take milliseconds.
- ``families``: a small detector of every kind; ``Family`` with ``dense_config``, ``polygons``, ``bitmasks``
  describes one.
- ``view_of``, ``compare``, ``plane``: views of detectors that computed given feature maps, for losses on
  literal numbers.
- ``check_loss``: holds a loss to all laws of ``laws.py``, on every kind of detector. ``Cell`` is one loss and one
  kind of detector; ``recipes`` says how the registered losses are set for small detectors.
- ``intercepted``: a function of the test's in place of a loss's forward; ``record`` and ``Replay``: what losses
  read in a step, and losses on it again.
- ``no_synchronization``: fails where the host would wait for a GPU; works on a CPU.
"""

from .cells import Cell, step
from .family import Family, bitmasks, dense_config, families, polygons
from .laws import LAWS, check_loss
from .maps import MapDetector, compare, plane, view_of
from .recipes import RECIPES, Recipe, recipes
from .replay import Records, Replay, intercepted, record
from .synchronization import as_on_a_gpu, no_synchronization
from .tiny import (
    CLASSES,
    distiller_config,
    save_teacher,
    short_yaml,
    tiny_batch,
    tiny_config,
    tiny_detector,
    use_dataset,
    write_dataset,
)

__all__ = [
    "CLASSES",
    "LAWS",
    "RECIPES",
    "Cell",
    "Family",
    "MapDetector",
    "Recipe",
    "Records",
    "Replay",
    "as_on_a_gpu",
    "bitmasks",
    "check_loss",
    "compare",
    "dense_config",
    "distiller_config",
    "families",
    "intercepted",
    "no_synchronization",
    "plane",
    "polygons",
    "recipes",
    "record",
    "save_teacher",
    "short_yaml",
    "step",
    "tiny_batch",
    "tiny_config",
    "tiny_detector",
    "use_dataset",
    "view_of",
    "write_dataset",
]
