"""Writing an adapter's folder so that a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, whose files take their places in ``folder`` when the block succeeds.

    It lies on the same file system, so the last step is renaming, which needs no space. Files of ``folder`` that the
    block did not write stay. When the block raises, ``folder`` is as it was, or absent as it was.
    """
    folder = folder.absolute()
    exists = folder.is_dir()
    name = f".{folder.name}.{os.getpid()}.tmp"
    temporary = folder / name if exists else folder.with_name(name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not exists and not folder.exists():
            os.replace(temporary, folder)
            return
        # The configuration comes last: it carries the digest of the weights that it belongs to.
        written = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: path.name == CONFIG_FILE):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
