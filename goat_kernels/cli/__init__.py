"""The ``goat-kernels`` command: a table of subcommands, and the one place that turns errors into exit codes.

A subcommand is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, and one entry in ``COMMANDS``.
Such a module imports torch, transformers and the like inside ``run``, so that ``goat-kernels --help`` answers at once.

Exit codes: 0 done, 1 done but a check failed, 2 input that cannot be used or a file that cannot be written (one line on
stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from goat_kernels.command_errors import CommandError

#: Name of a subcommand, and of its module in this package -> what it does, for ``goat-kernels --help``.
COMMANDS = {
    "finetune": "fine-tune a model with full fine-tuning, LoRA and GOAT, and compare them",
    "check": "check the kernels on this machine against float64, and what they move",
    "bench": "measure layers, passes and models beside PEFT's LoRA and the frozen base",
    "convert": "turn GOAT-PEFT, LoRA and PiSSA adapters into GOAT ones, or GOAT into approximate LoRA",
    "tune": "measure which tiles are fastest on this GPU",
}


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument as a CommandError: one line, instead of the usage text followed by the error."""

    def error(self, message: str):
        raise CommandError(message)


def build_parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line, with the options of the subcommand ``asked`` for alone: others stay unloaded."""
    parser = _Parser(prog="goat-kernels", description="Fine-tune with GOAT, a mixture of low-rank experts.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == asked:
            module = importlib.import_module(f"goat_kernels.cli.{name}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments without the program's name; ``sys.argv[1:]`` by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = argv[0] if argv and argv[0] in COMMANDS else None
    name = "goat-kernels" if asked is None else f"goat-kernels {asked}"
    try:
        arguments = build_parser(asked).parse_args(argv)
        return arguments.run(arguments)
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{name}: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return 130
