"""``python -m distill_d2`` is the command distill-d2."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
