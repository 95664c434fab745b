"""README's and docs' tables and figures, generated from the files of results alone.

A page holds blocks::

    <!-- bench:sections cpu -->
    ... generated ...
    <!-- /bench -->

and everything between such a pair of comments is replaced by what the results say. ``bench:sections DEVICE`` has a
section for every suite that has results on that type of device, of the newest on the standard shapes;
``bench:summary DEVICE`` is the README's short table of the layer; ``quality:NAME`` are those of ``bench.quality``.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.plots import Draw, digest, digest_in, png, scaling
from bench.quality import report as quality
from bench.results import RESULTS_FOLDER, newest, read_folder, timed
from bench.suites import SUITES
from bench.tables import provenance, summary_table

#: Pages with blocks, and the folder of the figures, in a checkout.
PAGES = (Path("README.md"), Path("docs/benchmarks.md"), Path("docs/quality.md"))
FIGURES_FOLDER = Path("docs/figures")

#: Device -> the figure of the suite ``scaling``.
_SCALING = {device: FIGURES_FOLDER / f"bench-scaling-{device.replace('cuda', 'gpu')}.png" for device in ("cpu", "cuda")}

_BLOCK = re.compile(r"(<!-- (bench|quality):(\S+)(?: (\w+))? -->\n).*?(<!-- /\2 -->)", re.S)


def _summary(rows: list[dict], device: str) -> str:
    rows = newest(rows, "layer", device)
    return f"{summary_table(rows, 'torch' if device == 'cpu' else 'triton')}\n\n{provenance(rows)}"


def _sections(rows: list[dict], device: str) -> str:
    """Empty where there are no results."""
    parts = []
    for name, suite in SUITES.items():
        of_suite = newest(rows, name, device)
        if not timed(of_suite):
            continue
        parts.append(f"### {suite.title}" + ("" if device == "cpu" else " on a GPU"))
        if name == "scaling":
            parts.append(f"![{suite.title}, over the frozen layer](figures/{_SCALING[device].name})")
        parts += [suite.table(of_suite), provenance(of_suite)]
    if parts and device == "cuda":
        parts.insert(0, "## On a GPU")
    return "\n\n".join(parts)


def pages(root: Path) -> dict[Path, str]:
    """Page -> its text with every block as the results have it.

    Raises:
        KeyError: a block that nothing makes.
    """
    rows, rows_of_task = read_folder(root / RESULTS_FOLDER), quality.read(root)
    makers = {"summary": _summary, "sections": _sections}

    def block(match: re.Match) -> str:
        opening, kind, name, device, closing = match.groups()
        content = makers[name](rows, device) if kind == "bench" else quality.BLOCKS[name](rows_of_task)
        return f"{opening}\n{content}\n\n{closing}" if content else f"{opening}{closing}"

    return {path: _BLOCK.sub(block, (root / path).read_text(encoding="utf-8")) for path in PAGES}


def figures(root: Path) -> dict[Path, tuple[Draw, object]]:
    """Figure -> what draws it, and the data that it has to be drawn from."""
    rows = read_folder(root / RESULTS_FOLDER)
    of_scaling = {path: newest(rows, "scaling", device) for device, path in _SCALING.items()}
    return {path: (scaling, of_device) for path, of_device in of_scaling.items() if timed(of_device)}


def out_of_date(root: Path) -> list[Path]:
    """The pages and figures that do not say what the results say."""
    stale = [path for path, text in pages(root).items() if (root / path).read_text(encoding="utf-8") != text]
    return stale + [path for path, (_, data) in figures(root).items() if digest_in(root / path) != digest(data)]


def write(root: Path) -> list[Path]:
    """Bring everything up to date; returns what was written."""
    stale, texts, drawn = out_of_date(root), pages(root), figures(root)
    (root / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in stale:
        (root / path).write_bytes(texts[path].encode() if path in texts else png(*drawn[path]))
    return stale
