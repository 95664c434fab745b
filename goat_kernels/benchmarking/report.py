"""README's and docs' tables and figures, generated from the files of results alone.

A document holds blocks::

    <!-- bench:layer cpu -->
    ... generated ...
    <!-- /bench -->

and everything between such a pair of comments is replaced by what the newest results of that suite on the standard
shapes and that type of device say. ``summary`` is the README's short table of the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from goat_kernels.benchmarking.plots import FIGURES, digest, digest_in, figure
from goat_kernels.benchmarking.results import RESULTS_FOLDER, newest, read_folder, timed
from goat_kernels.benchmarking.suites import SUITES
from goat_kernels.benchmarking.tables import TABLES, layer_summary, provenance, summary_table

#: Documents with blocks, and the folder of the figures, in a checkout.
DOCUMENTS = (Path("README.md"), Path("docs/benchmarks.md"))
FIGURES_FOLDER = Path("docs/figures")

DEVICES = ("cpu", "cuda")

_BLOCK = re.compile(r"(<!-- bench:(\w+) (\w+) -->\n).*?(<!-- /bench -->)", re.S)


def _summary(rows: list[dict], device: str) -> str:
    backend = "torch" if device == "cpu" else "triton"
    return f"{summary_table(rows, backend)}\n\n{provenance(rows)} {layer_summary(rows, backend)}".rstrip()


def _suite(suite: str) -> Callable[[list[dict], str], str]:
    def block(rows: list[dict], device: str) -> str:
        picture = ""
        if suite in FIGURES:
            picture = f"![{SUITES[suite].summary}](figures/{_figure_name(suite, device)})\n\n"
        return f"{picture}{TABLES[suite](rows)}\n\n{provenance(rows)}"

    return block


#: Block -> (the suite it is made from, what makes it).
_BLOCKS: dict[str, tuple[str, Callable[[list[dict], str], str]]] = {
    "summary": ("layer", _summary),
    **{suite: (suite, _suite(suite)) for suite in SUITES},
}


def _figure_name(suite: str, device: str) -> str:
    return f"bench-{suite}-{'cpu' if device == 'cpu' else 'gpu'}.png"


def documents(root: Path, results: Path | None = None) -> dict[Path, str]:
    """Document -> its text with every block as the results have it.

    Raises:
        KeyError: a block that nothing makes.
    """
    rows = read_folder(results or root / RESULTS_FOLDER)

    def block(match: re.Match) -> str:
        opening, name, device, closing = match.groups()
        suite, make = _BLOCKS[name]
        found = newest(rows, suite, device)
        content = make(found, device) if timed(found) else f"No results yet; `goat-kernels bench --suite {suite}`."
        return f"{opening}\n{content}\n\n{closing}"

    return {path: _BLOCK.sub(block, (root / path).read_text(encoding="utf-8")) for path in DOCUMENTS}


def figures(root: Path, results: Path | None = None) -> dict[Path, list[dict]]:
    """Figure -> the rows that it has to be drawn from."""
    rows = read_folder(results or root / RESULTS_FOLDER)
    found = {(suite, device): newest(rows, suite, device) for suite in FIGURES for device in DEVICES}
    return {
        FIGURES_FOLDER / _figure_name(suite, device): of_figure
        for (suite, device), of_figure in found.items()
        if timed(of_figure)
    }


def out_of_date(root: Path, results: Path | None = None) -> list[Path]:
    """The documents and figures that do not say what the results say."""
    texts = documents(root, results)
    stale = [path for path, text in texts.items() if (root / path).read_text(encoding="utf-8") != text]
    drawn = figures(root, results)
    return stale + [path for path, rows in drawn.items() if digest_in(root / path) != digest(rows)]


def write(root: Path, results: Path | None = None) -> list[Path]:
    """Bring everything up to date; returns what was written."""
    stale, texts, drawn = out_of_date(root, results), documents(root, results), figures(root, results)
    (root / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in stale:
        if path in texts:
            (root / path).write_text(texts[path], encoding="utf-8")
        else:
            (root / path).write_bytes(figure(drawn[path][0]["suite"], drawn[path]))
    return stale
