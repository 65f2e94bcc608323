"""The command distill-d2: it finds the subcommand, reads its arguments and runs it.

A subcommand is one module of ``distill_d2.commands`` with ``add_arguments(parser)`` and ``run(args)``; the first
line of its docstring stands in the list of commands, all of it in its help. Nothing heavy is imported before
``run``, so that help and wrong arguments take no time.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .commands.arguments import check_config_arguments
from .mistakes import add_debug_argument, ending_on_mistakes
from .requirements import require_detectron2

# In the order of the list that --help prints. A dash in a name is an underscore in its module's.
COMMANDS = (
    "demo",
    "train",
    "baseline",
    "evaluate",
    "init",
    "check",
    "predict",
    "visualize",
    "profile",
    "compare",
    "report",
    "export",
    "convert",
    "benchmark",
    "proof",
    "check-golden",
    "install-detectron2",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``distill-d2`` with these arguments (default: of the command line).

    Returns:
        the exit status.

    Raises:
        SystemExit: 2 for wrong arguments, or a user's mistake, whose message was printed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:], prog=f"distill-d2 {arguments[0]}")
    parser = _main_parser()
    if not arguments:
        parser.print_help()
        return 0
    parser.parse_args(arguments[:1])  # --help, --version, or an unknown option
    close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    suggestion = f" Did you mean {close[0]}?" if close else ""
    parser.error(f"there is no command '{arguments[0]}'.{suggestion} Known: {', '.join(COMMANDS)}")


def run_command(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command.

    Args:
        name: one of COMMANDS.
        arguments: without the command's name; default: of the command line.
        prog: the program's name in messages; default: that of the script.

    Returns, Raises: see ``main``.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C while modules are imported ends the program without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = _module(name)
    prog = prog or Path(sys.argv[0]).name
    parser = _Parser(
        prog=prog, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_debug_argument(parser)
    command.add_arguments(parser)
    intermixed = getattr(command, "INTERMIXED", False)  # options may stand among KEY VALUE pairs
    args = (parser.parse_intermixed_args if intermixed else parser.parse_args)(arguments)
    with ending_on_mistakes(f"{prog}: ", debug=args.debug):
        if name != "install-detectron2":
            require_detectron2()
        check_config_arguments(args)
        return command.run(args) or 0


class _Parser(argparse.ArgumentParser):
    """Suggests options for those that do not exist."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        known = [option for option in self._option_string_actions if option.startswith("--")]
        close = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        super().error(f"{message}. Did you mean {close[0]}?" if close else message)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)


def _main_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    summaries = {name: (_module(name).__doc__ or "").partition("\n")[0] for name in COMMANDS}
    listing = "\n".join(f"  {name:{width}}  {summary}" for name, summary in summaries.items())
    parser = argparse.ArgumentParser(
        prog="distill-d2",
        usage="%(prog)s COMMAND ...",
        description="Knowledge distillation of object detectors with detectron2.",
        epilog=f"commands:\n{listing}\n\n`distill-d2 COMMAND --help` shows the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from . import __version__

    parser.add_argument("--version", action="version", version=f"distill_d2 {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser
