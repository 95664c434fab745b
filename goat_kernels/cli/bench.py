"""Measure layers, passes and whole models here; the options are those of ``bench/command.py`` in a checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from goat_kernels.command_errors import CommandError

_ROOT = Path(__file__).resolve().parents[2]


def door(name: str) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]:
    """``add_arguments`` and ``run`` of a command that lives in ``bench``, beside the package in a checkout."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        if not (_ROOT / "bench" / "__init__.py").is_file():
            parser.parse_known_args = _refuse
            return
        command = _command(name)
        parser.description = command.__doc__
        command.add_arguments(parser)

    def run(arguments: argparse.Namespace) -> int:
        return _command(name).run(arguments)

    return add_arguments, run


def _command(name: str):
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    return importlib.import_module(name)


def _refuse(*_: object) -> None:
    raise CommandError(
        "what measures is not part of the installed package: clone the repository, run pip install -e '.[bench]' in "
        "the clone, and this command there"
    )


add_arguments, run = door("bench.command")
