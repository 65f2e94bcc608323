#!/usr/bin/env python
"""The command distill-d2 compare, at its old place."""

import sys

from distill_d2.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare"))
