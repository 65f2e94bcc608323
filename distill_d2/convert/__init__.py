"""Converters of public checkpoints: one module per source, with ``run(args)`` for ``distill-d2 convert``."""
