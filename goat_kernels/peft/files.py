"""Writing an adapter's folder so that a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


#: Begins the name of the folder, inside the one that is saved to, in which a save over an existing adapter is prepared.
_SAVING = ".goat-save."

#: A save that has not finished for so long was killed.
_ABANDONED_S = 3600


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, whose files take their places in ``folder`` when the block succeeds.

    It lies on the same file system, so the last step is renaming, which needs no space. Files of ``folder`` that the
    block did not write stay. When the block raises, ``folder`` is as it was, or absent as it was. When the process is
    killed, ``folder`` has every file whole: the old ones, the new ones, or, between two renames, new weights beside an
    old configuration, whose own is then found by :func:`prepared_config_files`.
    """
    folder = folder.absolute()
    exists = folder.is_dir()
    parent, prefix = (folder, _SAVING) if exists else (folder.parent, f".{folder.name}.")
    temporary = parent / f"{prefix}{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not exists and not folder.exists():
            os.replace(temporary, folder)
        else:
            # The configuration comes last: it carries the digest of the weights that it belongs to.
            written = [path for path in temporary.rglob("*") if path.is_file()]
            for path in sorted(written, key=lambda path: path.name == CONFIG_FILE):
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        _remove_abandoned(parent, prefix)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepared_config_files(folder: Path) -> list[Path]:
    """Configurations for ``folder`` that killed saves had prepared and not put into their place."""
    folder = folder.absolute()
    below = f"{_SAVING}*.tmp"
    return [
        *folder.glob(f"{below}/{CONFIG_FILE}"),
        *folder.parent.glob(f"{below}/{glob.escape(folder.name)}/{CONFIG_FILE}"),  # a further adapter's, in a subfolder
    ]


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed saves left, after a save that succeeded: until then it may hold the weights' configuration."""
    for left in parent.glob(f"{glob.escape(prefix)}*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
