#!/usr/bin/env python
"""The same as `distill-d2 install-detectron2`, also where distill_d2 is not installed."""

import runpy
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "distill_d2" / "install_detectron2.py"

if __name__ == "__main__":
    runpy.run_path(str(PROGRAM), run_name="__main__")
