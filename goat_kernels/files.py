"""Writing files and folders so that a reader finds all of them or nothing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target`` to write a file or folder to; renamed to ``target`` when the block succeeds.

    A folder replaces a folder that exists at ``target``, a file never does; of a symbolic link there the link is
    replaced and never what it points to. When the block raises, what it wrote is removed.

    Raises:
        OSError: nothing can be written there, or a folder is where the file goes.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():  # a file takes the place of a file or a link by itself
            _remove(target)
        os.replace(temporary, target)
    finally:
        _remove(temporary)


def write_json(target: Path, content: object) -> None:
    """Write ``content`` as JSON to ``target``, at once; NaN and infinity, which JSON does not have, become null."""
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(content: object) -> object:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
