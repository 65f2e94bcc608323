#!/usr/bin/env python
"""The same as `distill-d2 compare`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the package of this checkout
from distill_d2.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare"))
