"""Which tiles are fastest on the GPU at hand? ``goat-kernels tune`` searches widely, the suite ``tuning`` one step away
from the table's tiles; both measure here.

Candidates are what the validity predicate of ``kernels/configs.py`` lets through and whose sums fit the registers. They
are compiled on all processors at once; each is compared with what the table's tiles give, and timed on real tensors,
one launch at a time. A kernel's time is that of all its launches in a forward and backward.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench.cases import BenchSettings, Case
from bench.passes import expected_of, results_error
from bench.steps import checked, worst
from bench.timing import in_words
from goat_kernels.backends import why_not_auto
from goat_kernels.checks.problem import LayerCase, compile_ahead, make_problem, run_passes
from goat_kernels.kernels.configs import (
    RANKED,
    Choice,
    current_target,
    find_tile,
    forced_target,
    forced_tile,
    invalid_reason,
    recorded_choices,
)
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.kernels.tiles import Entry, Tile


@dataclass(frozen=True)
class Measurement:
    """A candidate's time: infinite where ``reason`` is not empty, which is the field "skipped" or "failed" of a row."""

    choice: Choice
    tile: Tile
    time_ms: float = float("inf")
    reason: dict[str, str] = field(default_factory=dict)


def device_time_ms(launch: Launch) -> float:
    """Median time of one launch, by device events, after warming up, with an empty cache."""
    import triton.testing

    return triton.testing.do_bench(launch.run, warmup=10, rep=50, return_mode="median")


# --- candidates -----------------------------------------------------------------------------------------------------


def most_sums(kernel: str, itemsize: int) -> int:
    """How many float32 a thread may hold to sum up in: half of its 255 registers; less in products of float32.

    Those run on the ordinary units, whose operands take most registers.
    """
    multiplies = kernel not in ("finish_hidden_gradient", "route_and_prefill.alone")
    return 32 if multiplies and itemsize == 4 else 128


def sums_per_thread(kernel: str, tile: Tile, columns: int) -> int:
    """How many float32 a thread of 32 in a warp holds to sum up in.

    Args:
        kernel: its function's name.
        tile: of one program.
        columns: hidden columns that one program accumulates.
    """
    kernel = kernel.partition(".")[0]
    rank = min(tile.rank, columns)
    sums = {
        "project": tile.rows * rank,
        "dropped_hidden": 2 * tile.rows * rank,  # of one slot, and of all
        "weight_gradient": tile.features * (rank + 16),  # and of dlogits
        "expand_columns": tile.rows * tile.features,
        "fused_forward": tile.rows * max(columns + 16, tile.features),  # and logits; then a block of y
        "route_and_prefill": tile.rows * max(columns + 16, tile.features),
    }
    return sums.get(kernel, tile.rows * columns) // (32 * tile.warps)


def _is_valid(tile: Tile, c: Choice) -> bool:
    return invalid_reason(c.kernel, tile, c.columns, c.itemsize, c.target, c.read_itemsize) is None


def candidates(choice: Choice, limit: int | None = None) -> list[Tile]:
    """The tiles that the predicate lets through and whose sums fit the registers; with a ``limit``, about so many of
    them, evenly spread."""
    ranks = (32, 64, 128) if choice.kernel.partition(".")[0] in RANKED else (0,)
    sizes = itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (1, 2, 3, 4), ranks)
    most = most_sums(choice.kernel, choice.itemsize)
    valid = [
        tile
        for tile in itertools.starmap(Tile, sizes)
        if sums_per_thread(choice.kernel, tile, choice.columns) <= most and _is_valid(tile, choice)
    ]
    return valid if limit is None else valid[:: -(-len(valid) // limit)]


def neighbours(choice: Choice) -> list[Tile]:
    """The table's tile, and then the valid ones that are one step away from it.

    A step doubles or halves one size, or the warps with a size, or moves the stages by one.
    """
    tile = find_tile(choice.kernel, choice.columns, choice.itemsize, choice.target, choice.T, choice.read_itemsize)
    steps = [{name: factor} for name in ("rows", "features", "rank", "warps") for factor in (2.0, 0.5)]
    steps += [{name: factor, "warps": factor} for name in ("rows", "features") for factor in (2.0, 0.5)]
    sizes = [{name: int(getattr(tile, name) * factor) for name, factor in step.items()} for step in steps]
    sizes += [{"stages": tile.stages + 1}, {"stages": tile.stages - 1}]
    around = dict.fromkeys([tile, *(dataclasses.replace(tile, **one) for one in sizes)])  # twice no rank is none
    return [candidate for candidate in around if candidate == tile or _is_valid(candidate, choice)]


def choices_of(layer: LayerCase, device: torch.device) -> list[Choice]:
    """The distinct tiles that one forward and backward of ``layer`` asks for; nothing runs."""
    with forced_target(current_target(device)), recorded_choices() as choices, observed(lambda launch: None):
        run_passes(TritonPasses(), make_problem(layer, "meta"))
    return list(dict.fromkeys(choices))


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(
    layer: LayerCase, device: torch.device, tiles: dict[Choice, list[Tile]], time_ms: Callable[[Launch], float]
) -> Iterator[Measurement]:
    """Time every tile of every choice in a forward and backward of ``layer``.

    Args:
        layer: what is run.
        device: the GPU.
        tiles: what the layer asks for -> what to try.
        time_ms: times one launch.
    """
    problem = make_problem(layer, device)
    if device.type == "cuda":
        pairs = [(choice.kernel, tile) for choice, of_choice in tiles.items() for tile in of_choice]
        compile_ahead([make_problem(layer, "meta")], device, pairs)
    expected = expected_of(problem)
    for choice, tile in ((choice, tile) for choice, of_choice in tiles.items() for tile in of_choice):
        times: list[float] = []

        def observe(launch: Launch, choice: Choice = choice, tile: Tile = tile, times: list[float] = times) -> None:
            launch.run()
            if launch.name == choice.kernel.partition(".")[0] and launch.tile == tile:
                times.append(time_ms(launch))

        try:
            with forced_tile(choice.kernel, tile), observed(observe):
                results = run_passes(TritonPasses(), problem)
            error = worst(results_error(results[name], of_pass, problem) for name, of_pass in expected.items())
        except Exception as failure:  # it does not compile, or needs more than a program has: what a search is for
            yield Measurement(choice, tile, reason={"skipped": in_words(failure)})
            continue
        if "failed" in (fields := checked(error, layer.dtype)):
            yield Measurement(choice, tile, reason=fields)
        elif not times:
            yield Measurement(choice, tile, reason={"skipped": "with this tile the pass takes another form"})
        else:
            yield Measurement(choice, tile, sum(times))


def tune(
    layers: Iterable[LayerCase],
    device: torch.device,
    report: Callable[[Measurement], None],
    time_ms: Callable[[Launch], float] = device_time_ms,
    limit: int | None = None,
) -> list[Entry]:
    """Entries with the fastest tile of every kernel that ``layers`` launch.

    Args:
        layers: what to tune for; several T of one layer give entries with several heights.
        device: the GPU.
        report: called with every measurement.
        time_ms: times one launch.
        limit: at most so many candidates a kernel; None tries all.
    """
    best: dict[tuple, set[Tile]] = {}
    for layer in layers:
        fastest: dict[Choice, Measurement] = {}
        tiles = {choice: candidates(choice, limit) for choice in choices_of(layer, device)}
        for one in measure(layer, device, tiles, time_ms):
            report(one)
            if one.time_ms < fastest.get(one.choice, Measurement(one.choice, one.tile)).time_ms:
                fastest[one.choice] = one
        for choice, one in fastest.items():
            key = (choice.kernel, choice.itemsize, choice.columns, choice.target.family)
            best.setdefault(key, set()).add(one.tile)
    entries = []
    for (kernel, itemsize, columns, family), tiles in best.items():
        by_height = tuple(sorted(tiles, key=lambda tile: -tile.rows))
        entries.append(Entry(kernel, itemsize, columns, by_height, family, min_columns=columns // 2 + 1))
    return entries


# --- the suite ------------------------------------------------------------------------------------------------------


def tuning_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Every kernel of the case's layers, in each form."""
    reason = why_not_auto("triton", settings.device, settings.dtype)
    if reason is not None:
        yield {"contender": "tiles of the Triton kernels", "skipped": reason}
        return
    for form in case.forms:
        for row in tile_rows(case.layer(settings.dtype, form), settings.device):
            yield {"residual": form, "mode": "launches", **row}


def tile_rows(
    layer: LayerCase, device: torch.device, time_ms: Callable[[Launch], float] = device_time_ms
) -> Iterator[dict]:
    """Of one layer: for each of its kernels the table's tile, and what each step away from it costs or saves."""
    first = {choice.kernel: choice for choice in reversed(choices_of(layer, device))}  # a kernel has one tile here
    table: dict[str, Measurement] = {}
    for one in measure(layer, device, {choice: neighbours(choice) for choice in first.values()}, time_ms):
        of_table = table.setdefault(one.choice.kernel, one)
        if "skipped" in of_table.reason:
            continue  # the kernel's tile was asked for, and the pass took another form
        row = {"pass": one.choice.kernel, "contender": words_of(one.tile), "is_in_table": one is of_table, **one.reason}
        if not one.reason:
            row["time_ms_p50"] = one.time_ms
            row |= {} if of_table.reason else {"ratio_p50": one.time_ms / of_table.time_ms}
        yield row


def words_of(tile: Tile) -> str:
    """A tile in results."""
    rank = f", rank {tile.rank}" if tile.rank else ""
    return f"{tile.rows} x {tile.features}{rank}, {tile.warps} warps, {tile.stages} stages"
