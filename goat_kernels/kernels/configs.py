"""The choice of a tile for a problem, from the table of ``tiles.py``: one validity predicate, one rule.

``goat-kernels tune`` measures candidates on a GPU and writes entries in the table's form, which GOAT_KERNELS_TILES
names to be read before it. Nothing here touches a device at import.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from goat_kernels.kernels.tiles import TABLE, TILES_VARIABLE, Entry, Tile, read_entries


@dataclass(frozen=True)
class Target:
    """What a choice needs to know about a GPU.

    Attributes:
        family: "sm80" (compute capability 8), "sm90" (9), "sm100" (10 and above), "gfx942" (AMD MI300), or "other".
        multiprocessors: streaming multiprocessors, or compute units.
        shared_bytes: shared memory one program may use.
    """

    family: str
    multiprocessors: int
    shared_bytes: int


#: The GPUs that kernels are compiled for without one at hand.
KNOWN_TARGETS: dict[str, Target] = {
    "sm_90": Target("sm90", 132, 232448),
    "sm_80": Target("sm80", 108, 166912),
    "sm_100": Target("sm100", 148, 232448),
    "gfx942": Target("gfx942", 304, 65536),
}

INTERPRETER_TARGET = KNOWN_TARGETS["sm_90"]


#: Kernels whose programs divide the tokens and nothing else, so that low tiles are what fills the GPU with few tokens.
_DIVIDE_TOKENS_ALONE = (
    "fused_forward",
    "fused_forward.dropout",
    "fused_forward.unaligned",
    "fused_hidden_gradient",
    "fused_hidden_gradient.unaligned",
    "dropped_hidden",
    "dropped_hidden.unaligned",
)


#: Kernels whose programs hold a block of the hidden columns, of ``Tile.rank``.
RANKED = ("project", "dropped_hidden", "weight_gradient", "expand_columns")


def shared_estimate(kernel: str, tile: Tile, columns: int, itemsize: int, read_itemsize: int) -> int:
    """Bytes of shared memory that the pipelined operands of one program take, roughly.

    ``read_itemsize``: bytes of an element of the adapter as it is read; where that is not ``itemsize``, a copy in x's
    dtype stands beside it.
    """
    kernel, _, variant = kernel.partition(".")
    is_cast = itemsize * (read_itemsize != itemsize)
    if kernel == "project":
        per_stage = tile.features * (tile.rows * itemsize + 2 * tile.rank * read_itemsize)  # W1 and W2 each
        resident = tile.features * tile.rank * is_cast
    elif kernel == "weight_gradient":
        per_stage = tile.rows * (tile.features + min(tile.rank, columns) + 16) * itemsize
        resident = 0
    elif kernel == "finish_hidden_gradient" or variant == "alone":
        per_stage = resident = 0
    elif kernel == "route_and_prefill":
        per_stage = tile.features * columns * read_itemsize
        resident = tile.features * columns * is_cast
    elif kernel == "expand_columns":
        rank_blocks = min(-(-columns // tile.rank), 4)
        rank = min(tile.rank, columns)
        per_stage = (
            tile.features * (rank_blocks * rank + 16) * read_itemsize + rank_blocks // 2 * rank * tile.rows * itemsize
        )
        resident = tile.features * rank_blocks * rank * is_cast
    else:
        per_stage = tile.features * (tile.rows + (min(tile.rank, columns) if tile.rank else columns) + 16) * itemsize
        resident = 0
    return per_stage * max(tile.stages - 1, 1) + resident


def invalid_reason(
    kernel: str, tile: Tile, columns: int, itemsize: int, target: Target, read_itemsize: int | None = None
) -> str | None:
    """None, or why ``tile`` cannot run: the one predicate for the table, the tuner and files of tiles.

    Args:
        kernel: its function's name.
        tile: the candidate.
        columns: hidden columns that one program accumulates.
        itemsize: bytes of an element of x.
        target: the GPU.
        read_itemsize: bytes of an element of the adapter as it is read; None is ``itemsize``.
    """
    for name in ("rows", "features"):
        value = getattr(tile, name)
        if value < 16 or value & (value - 1):
            return f"{name}={value} must be a power of two, at least 16"
    if not tile.rank and kernel.partition(".")[0] in RANKED:
        return f"rank=0 must be a power of two, at least 16, for {kernel}"
    if tile.rank and (tile.rank < 16 or tile.rank & (tile.rank - 1)):
        return f"rank={tile.rank} must be 0 or a power of two, at least 16"
    if tile.warps not in (1, 2, 4, 8, 16):
        return f"warps={tile.warps} must be 1, 2, 4, 8 or 16"
    if not 1 <= tile.stages <= 8:
        return f"stages={tile.stages} must be in 1..8"
    shared = shared_estimate(kernel, tile, columns, itemsize, read_itemsize or itemsize)
    if shared > target.shared_bytes:
        return f"its operands need about {shared} bytes of shared memory, and a program has {target.shared_bytes}"
    return None


def entries_for(kernel: str, columns: int, itemsize: int, family: str) -> list[Entry]:
    """The entries that serve: a file's before the table's, the family's own before any's, in their order."""
    fitting = [e for e in (*_entries_of_file(), *TABLE) if (e.kernel, e.itemsize) == (kernel, itemsize)]
    fitting = [e for e in fitting if e.min_columns <= columns <= e.max_columns]
    own = [e for e in fitting if e.family == family]
    return own + [e for e in fitting if e.family == "any"]


def choose_tile(
    kernel: str, columns: int, itemsize: int, target: Target, T: int, read_itemsize: int | None = None
) -> Tile:
    """The tile for a problem; see :func:`find_tile`.

    Raises:
        ValueError: the table has none, because a program cannot hold so many columns.
    """
    tile = find_tile(kernel, columns, itemsize, target, T, read_itemsize)
    if tile is None:
        most = max(e.max_columns for e in TABLE if (e.kernel, e.itemsize) == (kernel, itemsize))
        raise ValueError(
            f"lora_A: the rank and the residual pair's, padded, are {columns} columns, and the Triton kernel {kernel} "
            f"holds {most} at most; use a smaller rank or backend='torch'"
        )
    return tile


def find_tile(
    kernel: str, columns: int, itemsize: int, target: Target, T: int, read_itemsize: int | None = None
) -> Tile | None:
    """The tile for a problem; None where the table has none, and another form of the pass has to serve.

    Args:
        kernel: its function's name.
        columns: hidden columns that one program accumulates.
        itemsize: bytes of an element of x.
        target: the GPU.
        T: tokens. The tallest tile is taken that is not twice as tall as T and, where programs divide only the tokens,
            whose programs fill the GPU.
        read_itemsize: bytes of an element of the adapter as it is read; None is ``itemsize``.
    """
    read_itemsize = read_itemsize or itemsize
    if _overrides.asked is not None:
        _overrides.asked.append(Choice(kernel, columns, itemsize, target, T, read_itemsize))
    forced = _overrides.tiles.get(kernel)
    return _tile_of_table(kernel, columns, itemsize, target, T, read_itemsize) if forced is None else forced


@functools.lru_cache(maxsize=4096)
def _tile_of_table(kernel: str, columns: int, itemsize: int, target: Target, T: int, read_itemsize: int) -> Tile | None:
    for entry in entries_for(kernel, columns, itemsize, target.family):
        by_rows: dict[int, Tile] = {}
        for tile in entry.tiles:
            if invalid_reason(kernel, tile, columns, itemsize, target, read_itemsize) is None:
                by_rows.setdefault(tile.rows, tile)
        for tile in by_rows.values():
            if kernel in _DIVIDE_TOKENS_ALONE:
                serves = -(-T // tile.rows) >= 0.75 * target.multiprocessors
            else:
                serves = tile.rows < 2 * T
            if serves:
                return tile
        if by_rows:
            return list(by_rows.values())[-1]
    return None


@functools.cache
def _entries_of_file() -> tuple[Entry, ...]:
    path = os.environ.get(TILES_VARIABLE)
    return read_entries(Path(path)) if path else ()


@dataclass(frozen=True)
class Choice:
    """What a tile was asked for; the arguments of :func:`find_tile`."""

    kernel: str
    columns: int
    itemsize: int
    target: Target
    T: int
    read_itemsize: int


# --- overrides: for tuning, for tests, and for compiling and counting without the GPU ---------------------------------


@dataclass(frozen=True)
class _Overrides:
    """The GPU that tiles are chosen for, tiles by kernel whatever the problem, and where to note what is asked for."""

    target: Target | None = None
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    asked: list[Choice] | None = None


_overrides = _Overrides()


@contextlib.contextmanager
def _overridden(change: Callable[[_Overrides], _Overrides]) -> Iterator[None]:
    global _overrides
    previous, _overrides = _overrides, change(_overrides)
    try:
        yield
    finally:
        _overrides = previous


def forced_target(target: Target | None) -> contextlib.AbstractContextManager[None]:
    """Choose tiles as if ``target`` were the GPU, for compiling and counting without it; None is the one at hand."""
    return _overridden(lambda overrides: replace(overrides, target=target))


def forced_tile(kernel: str, tile: Tile) -> contextlib.AbstractContextManager[None]:
    """Choose ``tile`` for ``kernel`` whatever the problem: for tuning and for tests."""
    return _overridden(lambda overrides: replace(overrides, tiles={**overrides.tiles, kernel: tile}))


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Collect what tiles are asked for."""
    asked: list[Choice] = []
    with _overridden(lambda overrides: replace(overrides, asked=asked)):
        yield asked


def is_overridden() -> bool:
    """Whether a test or tool overrides the tiles, or records which are asked for."""
    return bool(_overrides.tiles) or _overrides.asked is not None


# --- the GPU at hand ------------------------------------------------------------------------------------------------


def current_target(device: torch.device) -> Target:
    """What ``device`` is; the interpreter's imitation for a CPU."""
    if _overrides.target is not None:
        return _overrides.target
    if device.type != "cuda":
        return INTERPRETER_TARGET
    return _target_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _target_of(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        family = properties.gcnArchName.split(":")[0]
        return Target(family if family == "gfx942" else "other", properties.multi_processor_count, 65536)
    family = {8: "sm80", 9: "sm90"}.get(properties.major, "sm100" if properties.major >= 10 else "other")
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)
    return Target(family, properties.multi_processor_count, shared)
