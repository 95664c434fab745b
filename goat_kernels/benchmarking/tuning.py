"""Are there better tiles near the table's? Each neighbour of a kernel's tile, checked and timed beside the table's.

For whoever changes the table (``kernels/tiles.py``): ``goat-kernels tune`` searches widely for a layer of your own and
writes what is fastest to a file; this shows what each step away from the table costs or saves. A kernel's time is that
of all its launches in a forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from goat_kernels.backends import why_not_auto
from goat_kernels.benchmarking.capture import Captured, Eager, step_of
from goat_kernels.benchmarking.cases import Case
from goat_kernels.benchmarking.failures import differs, in_words
from goat_kernels.benchmarking.machine import cache_bytes
from goat_kernels.benchmarking.passes import copy_problem, difference, pass_calls, problem_bytes, tensors_of
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.benchmarking.timing import copies_for, time_interleaved
from goat_kernels.checks.correctness import compare
from goat_kernels.checks.problem import LayerCase, Problem, make_problem, run_passes
from goat_kernels.checks.tuning import compile_tiles, neighbours
from goat_kernels.kernels.configs import Choice, current_target, find_tile, forced_target, forced_tile, recorded_choices
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.kernels.tiles import Tile


def tuning_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Every kernel of the case's layers, in each form."""
    reason = why_not_auto("triton", settings.device, settings.dtype)
    if reason is not None:
        yield {**case.row(), "contender": "tiles of the Triton kernels", "skipped": reason}
        return
    for form in case.forms:
        common = {**case.row(), **settings.dtypes(), "residual": form, "mode": "launches"}
        rows = tile_rows(case.layer(settings.dtype, form), settings, f"{case}, {form}")
        yield from ({**common, **row} for row in rows)


def tile_rows(layer: LayerCase, settings: BenchSettings, label: str) -> Iterator[dict]:
    """Of one layer: for each of its kernels the table's tile, which is compared with float64, and its neighbours."""
    wrong = [row.what for row in compare(layer, "triton", settings.device) if not row.passed]
    if wrong:
        yield {"contender": "tiles of the table", "failed": f"out of bounds: {', '.join(wrong)}"}
        return
    tiles = _tiles_of(layer, settings.device)
    if settings.device.type == "cuda":
        pairs = [(kernel, tile) for kernel, around in tiles.items() for tile in around]
        compile_tiles(layer, settings.device, pairs)
    problem = make_problem(layer, settings.device)
    copies = copies_for(problem_bytes(problem), 0 if settings.quick else cache_bytes(settings.device))
    problems = [problem, *(copy_problem(problem) for _ in range(copies - 1))]
    expected = _results(problem)
    for kernel, around in tiles.items():
        for row in _kernel_rows(kernel, around, problems, expected, settings, f"{label}, {kernel}"):
            yield {"pass": kernel, **row}


def _tiles_of(layer: LayerCase, device: torch.device) -> dict[str, list[Tile]]:
    """Kernel -> the table's tile for this layer, and then its neighbours."""
    launched: set[tuple[str, Tile]] = set()

    def note(launch: Launch) -> None:
        launched.add((launch.name, launch.tile))

    with forced_target(current_target(device)), recorded_choices() as asked, observed(note):
        run_passes(TritonPasses(), make_problem(layer, "meta"))
    of_kernel: dict[str, list[Choice]] = {}
    for choice in dict.fromkeys(asked):
        of_kernel.setdefault(choice.kernel, []).append(choice)
    tiles = {}
    for kernel, choices in of_kernel.items():
        one = choices[0]
        table = find_tile(kernel, one.columns, one.width, one.target, one.T, one.read_width)
        if (kernel.partition(".")[0], table) in launched:  # else it was asked for, and another form was taken
            tiles[kernel] = [table, *neighbours(choices, table)]
    return tiles


def _kernel_rows(
    kernel: str,
    tiles: list[Tile],
    problems: list[Problem],
    expected: list[Tensor],
    settings: BenchSettings,
    label: str,
) -> Iterator[dict]:
    steps: dict[str, Captured | Eager] = {}
    table = in_words_of(tiles[0])
    for tile in tiles:
        name = in_words_of(tile)
        row = {"contender": name, "is_in_table": tile == tiles[0]}
        try:
            launches = [_launches(kernel, tile, problem) for problem in problems]
            if not launches[0]:
                continue  # with this tile the pass takes another form
            with forced_tile(kernel, tile):
                error = difference(_results(problems[0]), expected)
            step = _step(launches, settings)
        except Exception as failure:  # it does not compile, or needs more than a program has: what a search is for
            yield {**row, "skipped": in_words(failure)}
            continue
        if not error <= 1:
            yield {**row, "failed": differs(error)}
            continue
        steps[name] = step
    timings = time_interleaved(
        steps,
        device=settings.device,
        copies=len(problems),
        rounds=settings.rounds,
        ratios={"ratio": dict.fromkeys(steps, table)},
        label=label,
    )
    for name, timing in timings.items():
        yield {"contender": name, "is_in_table": name == table, **timing.row(), "ratio_to": table}


def _step(launches: list[list[Launch]], settings: BenchSettings) -> Captured | Eager:
    def make(copy: int) -> Callable[[], None]:
        def run() -> None:
            for launch in launches[copy]:
                launch.run()

        return run

    return step_of(make, len(launches), graph=settings.device.type == "cuda")


def _launches(kernel: str, tile: Tile, problem: Problem) -> list[Launch]:
    """The launches of ``kernel`` with ``tile`` in a forward and backward, on tensors that stay."""
    name, kept = kernel.partition(".")[0], []

    def observe(launch: Launch) -> None:
        launch.run()
        if launch.name == name and launch.tile == tile:
            kept.append(launch)

    with forced_tile(kernel, tile), observed(observe):
        run_passes(TritonPasses(), problem)
    return kept


def _results(problem: Problem) -> list[Tensor]:
    """What every pass gives."""
    return [tensor for call in pass_calls(TritonPasses(), problem).values() for tensor in tensors_of(call())]


def in_words_of(tile: Tile) -> str:
    rank = f", rank {tile.rank}" if tile.rank else ""
    return f"{tile.rows} x {tile.columns}{rank}, {tile.warps} warps, {tile.stages} stages"
