"""What `distill-d2 check` finds: everything that is wrong with a run, and what its training will do."""

from .report import check_run

__all__ = ["check_run"]
