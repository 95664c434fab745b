"""Which tiles are fastest on the GPU at hand? Opt-in: nothing is measured unless somebody asks.

For each kernel that a layer launches, every candidate tile that the validity predicate of ``kernels/configs.py`` lets
through, and whose sums fit the registers, is compiled, on all processors at once, and timed on real tensors, one launch
at a time; the fastest becomes an :class:`Entry` of the table's own form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from goat_kernels.checks.ahead import compiling
from goat_kernels.checks.problem import LayerCase, Problem, make_problem, run_passes
from goat_kernels.kernels.configs import RANKED, Choice, forced_tile, invalid_reason, recorded_choices
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.kernels.tiles import Entry, Tile

#: What a tile can fail with on a GPU: it does not compile, or needs more than a program has.
_REFUSALS = (OutOfResources, PTXASError, CompilationError, RuntimeError)


@dataclass(frozen=True)
class Measurement:
    """A candidate's time; infinite where it cannot run, or the pass then takes another form."""

    choice: Choice
    tile: Tile
    time_ms: float


def device_time_ms(launch: Launch) -> float:
    """Median time of one launch, by device events, after warming up."""
    import triton.testing

    return triton.testing.do_bench(launch.run, warmup=10, rep=50, return_mode="median")


def most_sums(kernel: str, width: int) -> int:
    """How many float32 a thread may hold to sum up in: half of its 255 registers; less in products of float32.

    Those run on the ordinary units, whose operands take most registers.
    """
    multiplies = kernel not in ("finish_hidden_gradient", "route_and_prefill.alone")
    return 32 if multiplies and width == 4 else 128


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
        "weight_gradient": tile.columns * (rank + 16),  # and of dlogits
        "expand_columns": tile.rows * tile.columns,
        "fused_forward": tile.rows * max(columns + 16, tile.columns),  # and logits; then a block of y
        "route_and_prefill": tile.rows * max(columns + 16, tile.columns),
    }
    return sums.get(kernel, tile.rows * columns) // (32 * tile.warps)


def candidates(choice: Choice, limit: int | None = None) -> list[Tile]:
    """The tiles that the predicate lets through and whose sums fit the registers; with a ``limit``, about so many of
    them, evenly spread."""
    kernel = choice.kernel.partition(".")[0]
    ranks = (32, 64, 128) if kernel in RANKED else (0,)
    sizes = itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (1, 2, 3, 4), ranks)
    tiles = (Tile(rows, columns, warps, stages, rank) for rows, columns, warps, stages, rank in sizes)
    about = (choice.columns, choice.width, choice.target, choice.read_width)
    most = most_sums(choice.kernel, choice.width)
    fitting = (t for t in tiles if sums_per_thread(choice.kernel, t, choice.columns) <= most)
    valid = [tile for tile in fitting if invalid_reason(choice.kernel, tile, *about) is None]
    return valid if limit is None else valid[:: -(-len(valid) // limit)]


def neighbours(choices: Iterable[Choice], tile: Tile) -> list[Tile]:
    """Tiles one step away from ``tile`` that the predicate lets through for every one of ``choices``.

    A step doubles or halves one size, or the warps with a size, or moves the stages by one.
    """
    steps = [{name: factor} for name in ("rows", "columns", "rank", "warps") for factor in (2.0, 0.5)]
    steps += [{name: factor, "warps": factor} for name in ("rows", "columns") for factor in (2.0, 0.5)]
    sizes = [{name: int(getattr(tile, name) * factor) for name, factor in step.items()} for step in steps]
    sizes += [{"stages": tile.stages + 1}, {"stages": tile.stages - 1}]
    around = dict.fromkeys(dataclasses.replace(tile, **one) for one in sizes)
    around.pop(tile, None)  # twice no rank is none

    def is_valid(candidate: Tile, choice: Choice) -> bool:
        about = (choice.columns, choice.width, choice.target, choice.read_width)
        return invalid_reason(choice.kernel, candidate, *about) is None

    return [candidate for candidate in around if all(is_valid(candidate, choice) for choice in choices)]


def choices_of(layer: LayerCase, device: torch.device) -> list[Choice]:
    """The distinct tiles that one forward and backward of ``layer`` asks for."""
    with recorded_choices() as choices:
        run_passes(TritonPasses(), make_problem(layer, device))
    return list(dict.fromkeys(choices))


def compile_tiles(layer: LayerCase, device: torch.device, tiles: Iterable[tuple[str, Tile]]) -> None:
    """Compile ``layer`` for ``device`` with each (kernel, tile) in turn, all at once, on all processors."""
    problem = make_problem(layer, "meta")
    with compiling(device):
        for kernel, tile in tiles:
            # What a tile does not fit is met again where it is measured.
            with forced_tile(kernel, tile), contextlib.suppress(Exception):
                run_passes(TritonPasses(), problem)


def measure(problem: Problem, choice: Choice, tile: Tile, time_ms: Callable[[Launch], float]) -> Measurement:
    """Time every launch of the choice's kernel that takes ``tile``."""
    name, times = choice.kernel.partition(".")[0], []

    def observe(launch: Launch) -> None:
        launch.run()
        if launch.name == name and launch.tile == tile:
            times.append(time_ms(launch))

    try:
        with forced_tile(choice.kernel, tile), observed(observe):
            run_passes(TritonPasses(), problem)
    except _REFUSALS:
        times.clear()
    return Measurement(choice, tile, sum(times) if times else float("inf"))


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
    best: dict[tuple, list[Measurement]] = {}
    for layer in layers:
        problem = make_problem(layer, device)
        tiles = {choice: candidates(choice, limit) for choice in choices_of(layer, device)}
        if device.type == "cuda":
            compile_tiles(layer, device, [(choice.kernel, tile) for choice in tiles for tile in tiles[choice]])
        for choice, of_choice in tiles.items():
            measured = []
            for tile in of_choice:
                measured.append(measure(problem, choice, tile, time_ms))
                report(measured[-1])
            fastest = min(measured, key=lambda measurement: measurement.time_ms, default=None)
            if fastest is not None and fastest.time_ms < float("inf"):
                key = (choice.kernel, choice.width, choice.columns, choice.target.family)
                best.setdefault(key, []).append(fastest)
    entries = []
    for (kernel, width, columns, family), fastest in best.items():
        tall_to_low = sorted({m.tile for m in fastest}, key=lambda tile: -tile.rows)
        entries.append(Entry(kernel, width, columns, tuple(tall_to_low), family, min_columns=columns // 2 + 1))
    return entries
