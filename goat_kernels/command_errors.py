"""The two ways in which a command ends early on purpose, and how they quote other errors."""

from __future__ import annotations


class CommandError(Exception):
    """The user's input cannot be used. The message is one line: the argument, its value and what it needs."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything worth keeping has been written. The message says what was kept and how to go on."""


def one_line(error: object, length: int | None = 200) -> str:
    """The message of an error as part of a line, at most ``length`` characters of it."""
    return " ".join(str(error).split())[:length]
