"""The one place that writes files and folders so that a reader finds all of them or nothing.

Everything is written under a temporary name on the same file system and then renamed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

#: The files of an adapter, by PEFT's names.
CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

#: A save over an existing folder is prepared in a folder inside it, whose name begins like this.
SAVING = ".goat-save."

#: A temporary folder older than this was left by a process that was killed.
_ABANDONED_S = 3600


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target`` to write a file to: renamed when the block succeeds, removed when it raises.

    A symbolic link at ``target`` is replaced, never the file it points to.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: Path, content: object) -> None:
    """Write ``content`` as JSON to ``target``, at once; NaN and infinity, which JSON does not have, become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda constant: None)
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, whose files take their places in ``folder`` when the block succeeds.

    Files of ``folder`` that the block did not write stay. When the block raises, ``folder`` is as it was. When the
    process is killed, every file is whole: the old ones, the new ones, or, between two renames, new weights beside an
    old configuration, whose own ``config_of_killed_save`` of ``peft/storage.py`` then finds.
    """
    folder = folder.absolute()
    exists = folder.is_dir()
    parent, prefix = (folder, SAVING) if exists else (folder.parent, f".{folder.name}.")
    temporary = parent / f"{prefix}{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not exists and not folder.exists():
            os.replace(temporary, folder)
        else:
            # JSON files come last: an adapter's configuration has the digest of the weights that it belongs to.
            written = [path for path in temporary.rglob("*") if path.is_file()]
            for path in sorted(written, key=lambda path: path.suffix == ".json"):
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        # Only now: until a save succeeded, what killed ones left may hold the weights' configuration.
        for left in parent.glob(f"{glob.escape(prefix)}*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
