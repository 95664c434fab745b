"""From text on the command line to values, and from a dataclass to the options of a command."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping


def integer(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``minimum`` on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {minimum}")
        return int(text)

    return parse


def number(minimum: float, below: float = math.inf, *, inclusive: bool = False) -> Callable[[str], float]:
    """A parser of numbers above (``inclusive``: from) ``minimum`` and below ``below``."""
    need = f"{'at least' if inclusive else 'above'} {minimum:g}" + (f" and below {below:g}" * (below < math.inf))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # `not (a and b)` also catches nan.
        if not ((value >= minimum if inclusive else value > minimum) and value < below):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {need}")
        return value

    return parse


def name_or_number(text: str) -> str | float:
    """A number where ``text`` is one, else ``text``."""
    try:
        return float(text)
    except ValueError:
        return text


def names_or_pattern(text: str) -> str | tuple[str, ...]:
    """Names of modules as a tuple, which PEFT matches by suffix; ``all-linear`` and regular expressions as they are."""
    names = tuple(name.strip() for name in text.split(","))
    if text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    try:
        re.compile(f"(?:{text})")  # it may become a part of a longer one
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither names nor a regular expression: {error}") from None
    return text


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Declare an option for every field of a dataclass, by its type and its metadata (``finetuning.options``).

    An option that is not given is absent from the parsed arguments.
    """
    groups = {}
    kinds = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        more, kind = field.metadata, kinds[field.name]
        if more["group"] not in groups:
            groups[more["group"]] = parser.add_argument_group(more["group"])
        shown = more.get("shown", f"{field.default:g}" if isinstance(field.default, float) else field.default)
        text = more["help"] + (f" (default: {shown})" if shown is not None and shown is not False else "")
        how = {"action": "store_true"} if kind is bool else _parsing(kind, more)
        flag = more.get("flag", f"--{field.name.replace('_', '-')}")
        groups[more["group"]].add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **how)


def _parsing(kind: object, more: Mapping) -> dict[str, object]:
    """What argparse needs to know to make a value of a field's type."""
    union = typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)
    kinds = {*union} - {type(None)}
    if kinds == {int}:
        return {"metavar": "N", "type": integer(more["least"])}
    if kinds == {float}:
        least = more.get("least", more.get("above"))
        return {"metavar": "X", "type": number(least, more.get("below", math.inf), inclusive="least" in more)}
    parse = str
    if len(kinds) > 1:
        parse = name_or_number if float in kinds else names_or_pattern
    return {"metavar": more.get("metavar"), "choices": more.get("choices"), "type": parse}
