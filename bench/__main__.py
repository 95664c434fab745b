"""``python -m bench``: the same as ``goat-kernels bench``."""

from __future__ import annotations

import argparse
import sys

from bench import command
from goat_kernels.command_errors import CommandError


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(arguments))
    except CommandError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
