"""Install detectron2 without a compiler, unless it is installed.

detectron2 has no release on the package index. The wheel of LabGym carries a complete copy of its Python
sources, with renamed imports. This command takes that copy out of one pinned wheel, names it `detectron2`
again and lets pip install it. Only the compiled part (`detectron2._C`) is missing.

    distill-d2 install-detectron2                # download and install
    distill-d2 install-detectron2 --wheel FILE   # from a local LabGym wheel, without a network
    distill-d2 install-detectron2 --target DIR   # into a folder, for PYTHONPATH
"""

from __future__ import annotations

from ..install_detectron2 import add_arguments, run

__all__ = ["add_arguments", "run"]
