"""Files of text and tables: CSV, TSV, JSON and JSON Lines.

Python's own parsers, but told what they do not assume: line ends are \\n and \\r alone, a cell may be long, a row that
does not fit the header is an error.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.columns import Column

_SEPARATED, _JSON = (".csv", ".tsv"), (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (*_SEPARATED, *_JSON)

#: The largest that fits a C long everywhere; csv's own limit is 131,072 characters.
_CELL_LIMIT = 2**31 - 1


def read_file(argument: str, path: Path) -> str:
    """The text of a file, in UTF-8 or, with its byte order mark, UTF-16; line ends as they are.

    Raises:
        CommandError: not readable, in another encoding, or not text at all.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise CommandError(
            f"{argument} {str(path)!r} is not readable as UTF-8 text ({error}); it needs to be saved as UTF-8"
        ) from None
    if "\0" in text:
        line = _line(text, text.index("\0"))
        raise CommandError(f"{argument} {str(path)!r}, line {line}, has a NUL character; it needs to be plain text")
    return text


def read_columns(argument: str, path: Path, wanted: Sequence[tuple[str, str]]) -> list[Column]:
    """Some columns of a table.

    Args:
        argument: the option that named the file, for messages.
        path: of a file with one of ``TABLE_SUFFIXES``, in upper or lower case.
        wanted: (option, name) of each column.

    Raises:
        CommandError: not a table, no rows, a row that does not fit the header, or a column that is not there once.
    """
    source = f"{argument} {str(path)!r}"
    text = read_file(argument, path)
    if path.suffix.lower() in _SEPARATED:
        header, rows = _separated(source, path, text, [name for _, name in wanted])

        def cells(name: str) -> list[str | None]:
            return [row[header.index(name)] for row in rows]

    else:
        rows = list(_objects(source, text))
        header = list(dict.fromkeys(name for row in rows for name in row))

        def cells(name: str) -> list:
            return [row.get(name) for row in rows]

    if not rows:
        raise CommandError(f"{source} has no rows; it needs at least a few examples")
    for option, name in wanted:
        if name not in header:
            raise CommandError(f"{option} {name!r} is not a column of {source}; it has {header!s:.300}")
        if header.count(name) > 1:
            raise CommandError(f"{option} {name!r} is {header.count(name)} columns of {source}; it has {header!s:.300}")
    return [Column(source, name, cells(name)) for _, name in wanted]


def _separated(source: str, path: Path, text: str, wanted: Sequence[str]) -> tuple[list[str], list[list[str | None]]]:
    """Header and rows, every row as long as the header."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    # Spreadsheets write semicolons where the comma is the decimal point.
    separators = [usual, *(other for other in ",;\t|" if other != usual)]
    separator = next((one for one in separators if set(wanted) <= _header(text, one)), usual)
    if separator != usual:
        print(f"{source} separates its cells by {separator!r}")
    rows = [row for row in _parsed(source, text, separator) if any(cell.strip() for cell in row)]
    if not rows:
        return [], []
    header = [name.strip() for name in rows[0]]
    if header != rows[0]:
        print(f"warning: {source} has spaces around the names of its columns; they are left out")
    return header, [_fitted(source, number, row, header) for number, row in enumerate(rows[1:], start=1)]


def _header(text: str, separator: str) -> set[str]:
    """The names of the columns, were the cells separated by ``separator``."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        return {name.strip() for name in next((row for row in rows if any(cell.strip() for cell in row)), [])}
    except csv.Error:
        return set()


def _parsed(source: str, text: str, separator: str) -> Iterator[list[str]]:
    # Not text.splitlines(): that splits at U+2028, U+0085 and form feeds too.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    before = csv.field_size_limit(_CELL_LIMIT)
    try:
        yield from reader
    except csv.Error as error:
        raise CommandError(
            f"{source}, up to line {reader.line_num}, is not a table ({error}); a cell with a quote, a separator or "
            'a line break in it needs quotes around it, and its own quotes doubled ("")'
        ) from None
    finally:
        csv.field_size_limit(before)


def _fitted(source: str, number: int, row: list[str], header: list[str]) -> list[str | None]:
    beyond = [cell for cell in row[len(header) :] if cell.strip()]
    if beyond:
        raise CommandError(
            f"{source}: row {number} has {len(row)} cells, but the header has {len(header)}; "
            "a cell with a separator in it needs quotes around it"
        )
    return [*row[: len(header)], *[None] * (len(header) - len(row))]


def _objects(source: str, text: str) -> Iterator[dict]:
    """The objects of an array, or one after the other, on one line each or on several."""
    decoder, start = json.JSONDecoder(), _after_spaces(text, 0)
    while start < len(text):
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # An object that is cut short is only noticed in the line after it.
            number = error.lineno if text[start] == "[" else _line(text, start)
            raise CommandError(f"{source}, line {number}, is not JSON: {error.msg}") from None
        except (RecursionError, ValueError) as error:  # ValueError: Python's own limit to the digits of an integer
            what = "lists or objects nested too deeply" if isinstance(error, RecursionError) else "a number too long"
            raise CommandError(f"{source}, line {_line(text, start)} or below, has {what} to read") from None
        for row in value if isinstance(value, list) and value else [value]:
            if not isinstance(row, dict):
                raise CommandError(
                    f"{source}, line {_line(text, start)}, must be a JSON object with the columns, or a list of them"
                )
            yield row
        start = _after_spaces(text, end)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _after_spaces(text: str, position: int) -> int:
    return re.compile(r"\s*").match(text, position).end()
