"""Progress: a bar where there is a terminal and tqdm, and elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

#: Between two plain lines.
_EVERY_S = 15.0


def tracked(items: Iterable, label: str, unit: str) -> Iterator:
    """``items`` one after the other, with a sign of life on standard error."""
    if sys.stderr.isatty():
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(items, desc=label, unit=unit, leave=False)
            return
    items = list(items)
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last >= _EVERY_S:
            print(f"{label}: {done} of {len(items)} {unit}s", file=sys.stderr, flush=True)
            last = time.monotonic()
        yield item
