"""The subcommands of distill-d2, one module each; see ``distill_d2.cli``."""
