"""The two ways in which a command ends early on purpose."""

from __future__ import annotations


class CommandError(Exception):
    """The user's input cannot be used. The message is one line: the argument, its value and what it needs."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything worth keeping has been written. The message says what was kept and how to go on."""
