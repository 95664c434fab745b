"""Markdown tables and sentences from rows of results; nothing in them comes from anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from goat_kernels.benchmarking.cases import TRAINING_MODES
from goat_kernels.benchmarking.layers import FROZEN, LORA
from goat_kernels.benchmarking.results import timed

_MIB = 2**20


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table; the cells are text."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def shape(row: dict) -> tuple:
    return tuple(row.get(letter) for letter in "TNMREK")


def by_shape(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """(T, N, M, R, E, K) -> contender -> row."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in timed(rows):
        grouped.setdefault(shape(row), {})[row["contender"]] = row
    return grouped


def contenders(rows: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in timed(rows)))


def in_mode(rows: Iterable[dict], mode: str, *, dropout: bool = False) -> list[dict]:
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
    return f"commit {row['commit'] or 'unknown'}" + (" with uncommitted changes" if row["commit_is_dirty"] else "")


# --- the layer ----------------------------------------------------------------------------------------------------


def layer_table(rows: list[dict], mode: str, *, dropout: bool = False) -> str:
    """One row per shape: the frozen layer's time, every contender's median ratio to it, and GOAT's to PEFT LoRA.

    A ratio of a CUDA graph is to the CUDA graph of the frozen layer, or of LoRA.
    """
    rows = in_mode(rows, mode, dropout=dropout)
    names = [name for name in contenders(rows) if not name.startswith(FROZEN)]
    over_lora = [
        (name, quantity, words)
        for quantity, words in (("lora_ratio", "LoRA"), ("half_lora_ratio", "LoRA in x's dtype"))
        for name in names
        if "compiled" not in name and any(row["contender"] == name and f"{quantity}_p50" in row for row in rows)
    ]
    head = ["T", "N -> M", "R", "frozen, ms", *names, *(f"{name} / {words}" for name, _, words in over_lora)]
    lines = []
    for (T, N, M, R, _, _), of_shape in by_shape(rows).items():
        cells = [str(T), f"{N} -> {M}", str(R), _cell(of_shape, FROZEN, lambda row: number(row["time_ms_p50"]))]
        cells += [_cell(of_shape, name, lambda row: f"{row['ratio_p50']:.2f}") for name in names]
        cells += [_ratio(of_shape, name, quantity) for name, quantity, _ in over_lora]
        lines.append(cells)
    return markdown(head, lines)


def launches_table(rows: list[dict]) -> str:
    """Kernels that a call of each contender launches, those of ours in brackets, where they were counted."""
    counted = [row for row in timed(rows) if "kernel_launches" in row and "dropout_p" not in row]
    names, lines = contenders(counted), []
    for mode in dict.fromkeys(row["mode"] for row in counted):
        for (T, N, M, R, _, _), of_shape in by_shape(in_mode(counted, mode)).items():
            lines.append([mode, str(T), f"{N} -> {M}", str(R), *(launches_cell(of_shape.get(n)) for n in names)])
    return markdown(["mode", "T", "N -> M", "R", *names], lines)


def launches_cell(row: dict | None) -> str:
    """As "7 (5 of ours)"; "-" where nothing was counted."""
    ours = None if row is None else row.get("triton_launches")
    if row is None or (ours is None and "kernel_launches" not in row):
        return "-"
    if "kernel_launches" not in row:
        return f"{ours} of ours"
    return f"{row['kernel_launches']}" + ("" if ours is None else f" ({ours} of ours)")


def summary_table(rows: list[dict], backend: str) -> str:
    """One row per shape and residual: the medians of a forward and backward, with the eager layers of ``backend``."""
    head = ["T", "N -> M", "R", "residual", "frozen, ms"]
    head += ["PEFT LoRA / frozen", "GOAT / frozen", "GOAT / PEFT LoRA", "expert loop / frozen"]
    lines = []
    for (T, N, M, R, _, _), of_shape in by_shape(in_mode(rows, "both")).items():
        frozen = _cell(of_shape, FROZEN, lambda row: number(row["time_ms_p50"]))
        for form in ("fold", "path"):
            goat = f"GOAT {form}, {backend}"
            if goat in of_shape:
                pairs = ((LORA, "ratio"), (goat, "ratio"), (goat, "lora_ratio"), ("expert loop", "ratio"))
                ratios = [_ratio(of_shape, name, quantity) for name, quantity in pairs]
                lines.append([str(T), f"{N} -> {M}", str(R), f"`{form}`", frozen, *ratios])
    return markdown(head, lines)


def _ratio(of_shape: dict[str, dict], name: str, quantity: str) -> str:
    value = of_shape.get(name, {}).get(f"{quantity}_p50")
    return "-" if value is None else f"{value:.2f}"


def _cell(of_shape: dict[str, dict], name: str, text: Callable[[dict], str]) -> str:
    row = of_shape.get(name)
    return "-" if row is None or ("ratio_p50" not in row and name != FROZEN) else text(row)


def layer_summary(rows: list[dict], backend: str) -> str:
    """From where to where GOAT's ratios to the frozen layer and to PEFT's LoRA go, over the shapes."""
    grouped = by_shape(in_mode(rows, "both"))
    sentences = []
    for form in ("fold", "path"):
        name = f"GOAT {form}, {backend}"
        of_frozen = [of[name]["ratio_p50"] for of in grouped.values() if "ratio_p50" in of.get(name, {})]
        of_lora = [of[name]["lora_ratio_p50"] for of in grouped.values() if "lora_ratio_p50" in of.get(name, {})]
        if of_frozen and of_lora:
            sentences.append(
                f"`{form}` takes {min(of_frozen):.2f} to {max(of_frozen):.2f} of the frozen layer's time and "
                f"{min(of_lora):.2f} to {max(of_lora):.2f} of PEFT LoRA's"
            )
    return "; ".join(sentences) + "." if sentences else ""


# --- the other suites -----------------------------------------------------------------------------------------------


def kernels_table(rows: list[dict]) -> str:
    """One row per pass and contender."""
    head = ["T", "N -> M", "R", "form", "pass", "contender", "ms", "floor, ms", "GB/s", "TFLOP/s", "% of roofline"]
    lines = []
    for row in timed(rows):
        cells = [str(row["T"]), f"{row['N']} -> {row['M']}", str(row["R"]), row["residual"], row["pass"]]
        cells += [row["contender"], *(number(row[name]) for name in ("time_ms_p50", "floor_ms", "gb_per_s", "tflops"))]
        lines.append([*cells, f"{row['roofline_percent']:.0f}"])
    return markdown(head, lines)


def ceilings(rows: list[dict]) -> str:
    row = timed(rows)[0]
    return (
        f"This machine's ceilings, measured in the same run: {row['machine_read_gb_per_s']:.0f} GB/s in a large sum, "
        f"{row['machine_copy_gb_per_s']:.0f} GB/s in a large copy, {number(row['machine_tflops'])} TFLOP/s in the best "
        f"of several large {row['dtype']} products."
    )


def roofline_table(rows: list[dict]) -> str:
    """One row per ceiling and size."""
    lines = []
    for row in timed(rows):
        is_product = row["contender"] == "product"
        size = f"{row['size']} x {row['size']}" if is_product else f"{row['size'] / _MIB:.0f} MiB"
        rate = f"{number(row['tflops'])} TFLOP/s" if is_product else f"{number(row['gb_per_s'])} GB/s"
        lines.append([row["contender"], row["dtype"] if is_product else "float32", size, rate])
    return markdown(["what", "dtype", "size", "fastest rate"], lines)


def memory_table(rows: list[dict]) -> str:
    """Saved for backward beside x and the parameters, and the peak, in MiB."""
    names = contenders(rows)
    head = ["T", "N -> M", "R", "x, MiB", *(f"{name}: saved / peak" for name in names)]
    lines = []
    for (T, N, M, R, _, _), of_shape in by_shape(rows).items():
        cells = [str(T), f"{N} -> {M}", str(R), number(next(iter(of_shape.values()))["x_bytes"] / _MIB)]
        for name in names:
            row = of_shape.get(name)
            saved = "" if row is None else f"{row['saved_for_backward_bytes'] / _MIB:.2f} / {number(row['peak_mib'])}"
            cells.append(saved or "-")
        lines.append(cells)
    return markdown(head, lines)


def scaling_table(rows: list[dict]) -> str:
    """The ratio to the frozen layer as one size grows."""
    names = [name for name in contenders(rows) if not name.startswith(FROZEN)]
    lines = []
    for letter, of_letter in scaling_groups(rows).items():
        for value, of_value in of_letter.items():
            frozen = _cell(of_value, FROZEN, lambda row: number(row["time_ms_p50"]))
            ratios = (_cell(of_value, name, lambda row: f"{row['ratio_p50']:.2f}") for name in names)
            lines.append([f"{letter} = {value}" + (" (= M)" if letter == "N" else ""), frozen, *ratios])
    return markdown(["varied", "frozen, ms", *names], lines)


def scaling_groups(rows: list[dict]) -> dict[str, dict[int, dict[str, dict]]]:
    """Letter -> its value -> contender -> row."""
    groups: dict[str, dict[int, dict[str, dict]]] = {}
    for row in timed(rows):
        groups.setdefault(row["varied"], {}).setdefault(row[row["varied"]], {})[row["contender"]] = row
    return groups


def model_table(rows: list[dict]) -> str:
    """One row per model and method."""
    lines = []
    for row in timed(rows):
        unit = "tokens_per_s" if "tokens_per_s" in row else "images_per_s"
        name = f"{row['model']}, {row['num_hidden_layers']} x {row['hidden_size']}, R = {row['R']}"
        ratios = [f"{row[q]:.2f}" if q in row else "-" for q in ("ratio_p50", "lora_ratio_p50")]
        rate = f"{number(row[unit])} {unit.split('_')[0]}"
        lines.append([name, row["contender"], number(row["time_ms_p50"]), rate, *ratios, number(row["peak_mib"])])
    head = ["model", "method", "ms a step", "a second", "/ frozen", "/ PEFT LoRA", "peak, MiB"]
    return markdown(head, lines)


def startup_table(rows: list[dict]) -> str:
    """One row per thing that is paid once."""
    lines = []
    for row in timed(rows):
        size = f"{row['N']} -> {row['M']}, R = {row['R']}" if "N" in row else ""
        lines.append([row["mode"], row["contender"], size, number(row["time_ms_p50"])])
    return markdown(["what", "of", "layer", "ms"], lines)


def design_table(rows: list[dict]) -> str:
    """One row per shape, form and direction: the median ratio of each order to the base product alone."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in timed(rows):
        key = (row["T"], f"{row['N']} -> {row['M']}", row["R"], row["residual"], row["mode"])
        groups.setdefault(key, {})[row["contender"]] = row
    base = next(row["ratio_to"] for row in timed(rows) if "ratio_to" in row)
    names = [name for name in contenders(rows) if name != base]
    lines = []
    for key, of_key in groups.items():
        alone = number(of_key[base]["time_ms_p50"]) if base in of_key else "-"
        lines.append([*map(str, key), alone, *(_cell(of_key, n, lambda row: f"{row['ratio_p50']:.3f}") for n in names)])
    return markdown(["T", "N -> M", "R", "form", "direction", "base alone, ms", *names], lines)


def tuning_table(rows: list[dict]) -> str:
    """One row per kernel: the table's tile, and the fastest of it and its neighbours."""
    groups: dict[tuple, list[dict]] = {}
    for row in timed(rows):
        key = (row["T"], f"{row['N']} -> {row['M']}", row["R"], row["residual"], row["pass"])
        groups.setdefault(key, []).append(row)
    lines = []
    for key, of_kernel in groups.items():
        table = [row for row in of_kernel if row["is_in_table"]]
        best = min(of_kernel, key=lambda row: row["time_ms_p50"])
        of_table = [table[0]["contender"], number(table[0]["time_ms_p50"])] if table else ["-", "-"]
        gained = f"{best['ratio_p50']:.3f}" if "ratio_p50" in best else "-"
        lines.append([*map(str, key), *of_table, str(len(of_kernel)), best["contender"], gained])
    head = ["T", "N -> M", "R", "form", "kernel", "table's tile", "ms", "tried", "fastest", "/ table's"]
    return markdown(head, lines)


def layer_tables(rows: list[dict]) -> str:
    """Of every mode that was measured, and the launches where they were counted."""
    parts = [
        f"{title}\n\n{layer_table(rows, mode, dropout=dropout)}"
        for mode, dropout, title in (
            ("both", False, "Forward and backward:"),
            ("forward", False, "Forward, keeping what the backward needs:"),
            ("backward", False, "Backward alone:"),
            ("inference", False, "Forward without gradients (decoding):"),
            ("both", True, "Forward and backward with dropout of x:"),
        )
        if in_mode(rows, mode, dropout=dropout)
    ]
    if any("kernel_launches" in row for row in rows):
        parts.append(f"Kernels that one call launches:\n\n{launches_table(rows)}")
    return "\n\n".join(parts)


def host_table(rows: list[dict]) -> str:
    """One row per shape and contender: what a call costs the host, in microseconds, and what it launches."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in timed(rows):
        groups.setdefault((*shape(row), row["contender"], row["how"]), {})[row["mode"]] = row
    lines = []
    for (T, N, M, R, _, _, name, how), of_mode in groups.items():
        both = of_mode.get("both")
        cells = [str(T), f"{N} -> {M}", str(R), name]
        cells += [number(1e3 * of_mode[m]["time_ms_p50"]) if m in of_mode else "-" for m in TRAINING_MODES]
        to_lora = f"{both['lora_ratio_p50']:.2f}" if both is not None and "lora_ratio_p50" in both else "-"
        lines.append([*cells, to_lora, launches_cell(both), how])
    head = ["T", "N -> M", "R", "contender", "forward, us", "backward, us", "both, us", "both / PEFT LoRA"]
    return markdown([*head, "launches", "how"], lines)


def not_timed(rows: list[dict]) -> list[str]:
    """One line for each reason why a contender has no time, in the order of the rows."""
    lines = []
    for row in rows:
        for word in ("skipped", "failed"):
            if word in row:
                at = "" if word == "skipped" else f" ({', '.join(f'{k}={row[k]}' for k in 'TNMR' if k in row)})"
                lines.append(f"{word}: {row['contender']}{at}: {row[word]}")
    return list(dict.fromkeys(lines))


#: Suite -> its tables, one below the other.
TABLES: dict[str, Callable[[list[dict]], str]] = {
    "roofline": roofline_table,
    "kernels": lambda rows: f"{ceilings(rows)}\n\n{kernels_table(rows)}",
    "layer": layer_tables,
    "host": host_table,
    "memory": memory_table,
    "scaling": scaling_table,
    "model": model_table,
    "startup": startup_table,
    "design": design_table,
    "tuning": tuning_table,
}
