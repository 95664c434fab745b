"""Markdown tables and sentences from rows of results; nothing in them comes from anywhere else."""

from __future__ import annotations

from collections.abc import Iterable

from bench.cases import TRAINING_MODES
from bench.layers import FROZEN, LORA
from bench.results import part_of, timed

_MIB = 2**20


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table; the cells are text."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _grouped(rows: Iterable[dict], fields: tuple[str, ...], inner: str = "contender") -> dict[tuple, dict[str, dict]]:
    """The values of ``fields`` -> the value of ``inner`` -> row, of those that have a time."""
    grouped: dict = {}
    for row in timed(rows):
        grouped.setdefault(part_of(row, fields), {})[row[inner]] = row
    return grouped


_SHAPE, _LETTERS = ["T", "N -> M", "R"], ("T", "N", "M", "R")


def _shape(key: tuple) -> list[str]:
    """The cells under ``_SHAPE``; ``key`` begins with the values of ``_LETTERS``."""
    T, N, M, R, *_ = key
    return [str(T), f"{N} -> {M}", str(R)]


def adapters(rows: Iterable[dict]) -> list[str]:
    """The contenders, in their order, but for the frozen layer, to which the others are set in relation."""
    names = dict.fromkeys(row["contender"] for row in timed(rows))
    return [name for name in names if not name.startswith(FROZEN)]


def in_mode(rows: Iterable[dict], mode: str, *, dropout: bool = False) -> list[dict]:
    """Of the layer suite."""
    return [row for row in timed(rows) if row["mode"] == mode and ("dropout_p" in row) == dropout]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def provenance(rows: list[dict]) -> str:
    """One sentence: what the rows were measured on."""
    row = max(rows, key=lambda row: row["date"])
    rounds = sorted({r["rounds"] for r in timed(rows) if "rounds" in r})
    where = f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}" if row["gpu"] else row["cpu"]
    threads = "" if row["gpu"] else f", {row['threads']} thread" + ("s" if row["threads"] > 1 else "")
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "python")
    of_rounds = f"Medians of {rounds[-1]} rounds. " if rounds and rounds[-1] > 1 else ""
    runs = dict.fromkeys((r["date"][:10], commit_of(r)) for r in sorted(rows, key=lambda row: row["date"]))
    when = "; and ".join(f"{commit}; {date}" for date, commit in runs)
    return f"{of_rounds}{where}{threads}; {versions}; {when}."


def commit_of(row: dict) -> str:
    """In words."""
    return f"commit {row['commit'] or 'unknown'}" + (" with uncommitted changes" if row["commit_is_dirty"] else "")


def _median(row: dict | None, quantity: str = "ratio", digits: int = 2) -> str:
    value = None if row is None else row.get(f"{quantity}_p50")
    return "-" if value is None else f"{value:.{digits}f}"


def _frozen_ms(of_shape: dict[str, dict]) -> str:
    return number(of_shape[FROZEN]["time_ms_p50"]) if FROZEN in of_shape else "-"


# --- the layer ----------------------------------------------------------------------------------------------------


def layer_tables(rows: list[dict]) -> str:
    """Of every mode that was measured."""
    tables = []
    for title, mode, dropout in (
        ("Forward and backward:", "both", False),
        ("Forward, keeping what the backward needs:", "forward", False),
        ("Backward alone:", "backward", False),
        ("Forward without gradients (decoding):", "inference", False),
        ("Forward and backward with dropout of x:", "both", True),
    ):
        if of_mode := in_mode(rows, mode, dropout=dropout):
            tables.append(f"{title}\n\n{_layer_table(of_mode)}")
    return "\n\n".join(tables)


def _layer_table(rows: list[dict]) -> str:
    """One row per shape: the frozen layer's time, every contender's median ratio to it, and GOAT's to PEFT LoRA.

    A ratio of a CUDA graph is to the CUDA graph of the frozen layer, or of LoRA.
    """
    columns = [(name, "ratio", name) for name in adapters(rows)]
    columns += [
        (name, quantity, f"{name} / {words}")
        for quantity, words in (("lora_ratio", "LoRA"), ("half_lora_ratio", "LoRA in x's dtype"))
        for name in adapters(rows)
        if "compiled" not in name and any(row["contender"] == name and f"{quantity}_p50" in row for row in rows)
    ]
    lines = [
        [*_shape(key), _frozen_ms(of_shape), *(_median(of_shape.get(name), quantity) for name, quantity, _ in columns)]
        for key, of_shape in _grouped(rows, (*_LETTERS, "E", "K")).items()
    ]
    return markdown([*_SHAPE, "frozen, ms", *(words for _, _, words in columns)], lines)


def summary_table(rows: list[dict], backend: str) -> str:
    """One row per shape and residual: the medians of a forward and backward, with the eager layers of ``backend``."""
    head = [*_SHAPE, "residual", "frozen, ms"]
    head += ["PEFT LoRA / frozen", "GOAT / frozen", "GOAT / PEFT LoRA", "expert loop / frozen"]
    lines = []
    for key, of_shape in _grouped(in_mode(rows, "both"), (*_LETTERS, "E", "K")).items():
        for form in ("fold", "path"):
            goat = f"GOAT {form}, {backend}"
            if goat in of_shape:
                pairs = ((LORA, "ratio"), (goat, "ratio"), (goat, "lora_ratio"), ("expert loop", "ratio"))
                ratios = [_median(of_shape.get(name), quantity) for name, quantity in pairs]
                lines.append([*_shape(key), f"`{form}`", _frozen_ms(of_shape), *ratios])
    return markdown(head, lines)


# --- the other suites -----------------------------------------------------------------------------------------------


def kernels_table(rows: list[dict]) -> str:
    """The ceilings, and one row per pass and contender."""
    rows = timed(rows)
    first = rows[0]
    ceilings = (
        f"This machine's ceilings, measured in the same run: {first['machine_read_gb_per_s']:.0f} GB/s in a large sum, "
        f"{first['machine_copy_gb_per_s']:.0f} GB/s in a large copy, {number(first['machine_tflops'])} TFLOP/s in the "
        f"best of several large {first['dtype']} products."
    )
    head = [*_SHAPE, "form", "pass", "contender", "ms", "floor, ms", "GB/s", "TFLOP/s", "% of roofline"]
    lines = [
        [
            *(*_shape(part_of(row, _LETTERS)), row["residual"], row["pass"], row["contender"]),
            *(number(row[name]) for name in ("time_ms_p50", "floor_ms", "gb_per_s", "tflops")),
            f"{row['roofline_percent']:.0f}",
        ]
        for row in rows
    ]
    return f"{ceilings}\n\n{markdown(head, lines)}"


def memory_table(rows: list[dict]) -> str:
    """Saved for backward beside x and the parameters, and the peak, in MiB."""

    def cell(row: dict | None) -> str:
        return "-" if row is None else f"{row['saved_for_backward_bytes'] / _MIB:.2f} / {number(row['peak_mib'])}"

    names = [FROZEN, *adapters(rows)]
    lines = [
        [
            *(*_shape(key), number(next(iter(of_shape.values()))["x_bytes"] / _MIB)),
            *(cell(of_shape.get(name)) for name in names),
        ]
        for key, of_shape in _grouped(rows, (*_LETTERS, "E", "K")).items()
    ]
    return markdown([*_SHAPE, "x, MiB", *(f"{name}: saved / peak" for name in names)], lines)


def scaling_table(rows: list[dict]) -> str:
    """The ratio to the frozen layer as one size grows."""
    names = adapters(rows)
    lines = [
        [
            *(f"{letter} = {value}" + (" (= M)" if letter == "N" else ""), _frozen_ms(of_value)),
            *(_median(of_value.get(name)) for name in names),
        ]
        for (letter, value), of_value in by_varied(rows).items()
    ]
    return markdown(["varied", "frozen, ms", *names], lines)


def by_varied(rows: list[dict]) -> dict[tuple[str, int], dict[str, dict]]:
    """(letter, its value) -> contender -> row."""
    found = _grouped(rows, ("varied", "T", "N", "R", "E", "K"))
    return {(letter, dict(zip("TNREK", sizes, strict=True))[letter]): of for (letter, *sizes), of in found.items()}


def model_table(rows: list[dict]) -> str:
    """One row per model and method."""
    lines = []
    for row in timed(rows):
        unit = "tokens_per_s" if "tokens_per_s" in row else "images_per_s"
        name = f"{row['model']}, {row['num_hidden_layers']} x {row['hidden_size']}, R = {row['R']}"
        ratios = (_median(row), _median(row, "lora_ratio"))
        rate = f"{number(row[unit])} {unit.split('_')[0]}"
        lines.append([name, row["contender"], number(row["time_ms_p50"]), rate, *ratios, number(row["peak_mib"])])
    head = ["model", "method", "ms a step", "a second", "/ frozen", "/ PEFT LoRA", "peak, MiB"]
    return markdown(head, lines)


def tuning_table(rows: list[dict]) -> str:
    """One row per kernel: the table's tile, and the fastest of it and its neighbours."""
    lines = []
    for key, of_kernel in _grouped(rows, (*_LETTERS, "residual", "pass")).items():
        table = next((row for row in of_kernel.values() if row["is_in_table"]), None)
        best = min(of_kernel.values(), key=lambda row: row["time_ms_p50"])
        of_table = ["-", "-"] if table is None else [table["contender"], number(table["time_ms_p50"])]
        of_best = [str(len(of_kernel)), best["contender"], _median(best, digits=3)]
        lines.append([*_shape(key), *key[4:], *of_table, *of_best])
    head = [*_SHAPE, "form", "kernel", "table's tile", "ms", "tried", "fastest", "/ table's"]
    return markdown(head, lines)


def host_table(rows: list[dict]) -> str:
    """One row per shape and contender: what a call costs the host, in microseconds, and what it launches."""
    lines = []
    for key, of_mode in _grouped(rows, (*_LETTERS, "contender", "how"), "mode").items():
        both = of_mode.get("both")
        times = [number(1e3 * of_mode[m]["time_ms_p50"]) if m in of_mode else "-" for m in TRAINING_MODES]
        launches = f"{both['triton_launches']} of ours" if both and "triton_launches" in both else "-"
        lines.append([*_shape(key), key[4], *times, _median(both, "lora_ratio"), launches, key[5]])
    head = [*_SHAPE, "contender", "forward, us", "backward, us", "both, us", "both / PEFT LoRA", "launches", "how"]
    return markdown(head, lines)


def not_timed(rows: list[dict]) -> list[str]:
    """One line for each reason why a contender has no time, in the order of the rows."""
    lines = []
    for row in rows:
        for word in ("skipped", "failed"):
            if word in row:
                at = "" if word == "skipped" else f" ({', '.join(f'{k}={row[k]}' for k in 'TNMR' if k in row)})"
                lines.append(f"{word}: {row['contender']}{at}: {row[word]}")
    return list(dict.fromkeys(lines))
