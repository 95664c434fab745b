"""Tile sizes: one frozen table, and files of the same form.

A tile decides the shape of a program of one kernel. The table is keyed by what matters: the kernel, the GPU's family,
the itemsize of x's dtype, and how many hidden columns a program accumulates (R, plus R' with residual="path", R once
more for the second slot with dropout). Adding a GPU or a better tile is adding an :class:`Entry`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

#: Names a file of entries that are used before the table's.
TILES_VARIABLE = "GOAT_KERNELS_TILES"


@dataclass(frozen=True)
class Tile:
    """The shape of one program.

    Attributes:
        rows: tokens.
        features: in- or out-features in one step of the program's loop, or in its output.
        warps: warps of 32 threads (64 on AMD).
        stages: depth of the software pipeline.
        rank: hidden columns of one program, in kernels that run in rank blocks; 0 elsewhere.
    """

    rows: int
    features: int
    warps: int
    stages: int
    rank: int = 0


@dataclass(frozen=True)
class Entry:
    """Tiles for one kernel, from the tallest to the lowest: the first that is valid and fills the GPU is taken.

    Of tiles with the same rows, the first that is valid counts: the others are for GPUs with less shared memory.

    Attributes:
        kernel: its function's name, with ".dropout" where dropout makes another kernel of it, ".alone" where it
            writes nothing of y, and ".unaligned" where the compiler cannot tell that rows of half-precision
            matrices begin at multiples of 16 bytes, so that their addresses take more registers.
        itemsize: bytes of an element of x: 2 or 4.
        max_columns: the most hidden columns it serves.
        tiles: candidates.
        family: see :class:`Target`; "any" for all that have no entry of their own.
        min_columns: the fewest hidden columns it serves.
    """

    kernel: str
    itemsize: int
    max_columns: int
    tiles: tuple[Tile, ...]
    family: str = "any"
    min_columns: int = 0


#: No limit: kernels that run in rank blocks hold any rank.
_ANY = 1 << 30


def _tall_to_low(features: int, warps: int, stages: int, rows: tuple[int, ...], rank: int = 0) -> tuple[Tile, ...]:
    """One tile for each of ``rows``, each followed by the same with fewer stages."""
    return tuple(Tile(r, features, warps, s, rank) for r in rows for s in range(stages, 0, -1))


_PROJECT = _tall_to_low(64, 8, 3, (64, 32), rank=128) + _tall_to_low(64, 8, 3, (16,), rank=64)
_EXPAND = _tall_to_low(64, 8, 2, (64, 32, 16), rank=64)

#: On Hopper four warps multiply 64 rows as one, eight 128. Eight for 64 would hold half of the columns each, and take
#: several times the barriers to turn those into rows. Steps of 128 columns: a step's waits are the same for 64.
_HOPPER_TALL = _tall_to_low(128, 8, 3, (128,))
_HOPPER_EXPAND = _tall_to_low(128, 8, 2, (128,), rank=128) + _tall_to_low(128, 4, 2, (64, 32, 16), rank=128)

#: For adapters that are read wider than x, in little shared memory.
_SMALL_EXPAND = _tall_to_low(32, 8, 2, (64, 32, 16), rank=32)
_SMALL_PROJECT = _tall_to_low(32, 4, 2, (64, 32, 16), rank=32)

#: In order: of the entries of a kernel that hold the columns, those of the GPU's own family come first, then "any".
TABLE: tuple[Entry, ...] = (
    # One read of x (dY) by programs of `rows` tokens; every program re-reads the adapter.
    Entry("fused_forward", 2, 32, _tall_to_low(64, 8, 3, (64, 32, 16)), family="sm100"),
    Entry("fused_forward", 2, 32, _tall_to_low(128, 4, 3, (64, 32, 16))),
    Entry("fused_forward", 2, 32, _HOPPER_TALL + _tall_to_low(128, 4, 3, (64, 32, 16)), family="sm90"),
    Entry("fused_forward", 2, 64, _HOPPER_TALL + _tall_to_low(128, 4, 4, (64, 32, 16)), family="sm90"),
    Entry("fused_forward", 2, 128, _HOPPER_TALL + _tall_to_low(128, 4, 3, (64, 32, 16)), family="sm90"),
    Entry("fused_forward", 2, 64, _tall_to_low(64, 4, 3, (64, 32, 16))),
    Entry("fused_forward", 2, 128, _tall_to_low(64, 8, 3, (64, 32, 16))),
    Entry("fused_forward", 4, 64, _tall_to_low(16, 4, 2, (32, 16)), family="sm100"),
    Entry("fused_forward", 4, 64, _tall_to_low(32, 4, 2, (32, 16))),
    Entry("fused_forward", 4, 128, _tall_to_low(32, 8, 2, (32, 16))),
    Entry("fused_forward.unaligned", 2, 128, _tall_to_low(64, 8, 3, (32, 16))),
    Entry("fused_forward.dropout", 2, 128, _tall_to_low(64, 4, 3, (64, 32, 16))),
    Entry("fused_forward.dropout", 4, 64, _tall_to_low(32, 4, 2, (16,))),
    Entry("fused_forward.dropout", 4, 128, _tall_to_low(32, 8, 2, (16,))),
    Entry("fused_hidden_gradient", 2, 32, _tall_to_low(64, 4, 4, (64, 32, 16))),
    Entry("fused_hidden_gradient", 2, 64, _HOPPER_TALL + _tall_to_low(128, 4, 4, (64, 32, 16)), family="sm90"),
    Entry("fused_hidden_gradient", 2, 128, _HOPPER_TALL + _tall_to_low(128, 4, 3, (64, 32, 16)), family="sm90"),
    Entry("fused_hidden_gradient", 2, 256, _tall_to_low(64, 8, 4, (64, 32, 16)), family="sm90"),
    Entry("fused_hidden_gradient", 2, 64, _tall_to_low(64, 4, 3, (64, 32, 16))),
    Entry("fused_hidden_gradient", 2, 256, _tall_to_low(64, 8, 3, (64, 32, 16))),
    Entry("fused_hidden_gradient.unaligned", 2, 64, _tall_to_low(64, 4, 3, (64, 32, 16))),
    Entry("fused_hidden_gradient.unaligned", 2, 256, _tall_to_low(64, 8, 2, (32, 16)), family="gfx942", min_columns=65),
    Entry("fused_hidden_gradient.unaligned", 2, 256, _tall_to_low(64, 8, 3, (32, 16))),
    Entry("fused_hidden_gradient", 4, 64, _tall_to_low(32, 4, 2, (32, 16))),
    Entry("fused_hidden_gradient", 4, 128, _tall_to_low(32, 8, 2, (32, 16))),
    # Products in rank blocks and splits.
    Entry("project", 2, _ANY, _tall_to_low(64, 8, 3, (64, 32, 16), rank=64) + _SMALL_PROJECT, family="sm100"),
    Entry("project", 2, 96, _tall_to_low(64, 8, 3, (64, 32, 16), rank=64) + _SMALL_PROJECT),
    Entry("project", 2, _ANY, _PROJECT + _SMALL_PROJECT),
    Entry("project", 4, _ANY, _tall_to_low(32, 8, 2, (32, 16), rank=32)),
    Entry("dropped_hidden", 2, _ANY, _tall_to_low(64, 8, 2, (64, 32), rank=64)),
    Entry("dropped_hidden.unaligned", 2, _ANY, _tall_to_low(64, 8, 2, (32,), rank=64)),
    Entry("dropped_hidden", 4, _ANY, _tall_to_low(32, 4, 2, (16,), rank=32), family="sm100"),
    Entry("dropped_hidden", 4, _ANY, _tall_to_low(32, 4, 2, (32, 16), rank=32)),
    # Elementwise over hidden columns, and a narrow product.
    Entry("route_and_prefill", 2, 128, (Tile(64, 64, 8, 1), Tile(32, 64, 4, 1), Tile(16, 64, 4, 1))),
    Entry("route_and_prefill", 2, 256, _tall_to_low(32, 8, 1, (16,))),
    Entry("route_and_prefill", 4, 64, _tall_to_low(32, 8, 1, (32, 16))),
    Entry("route_and_prefill", 4, 128, _tall_to_low(16, 8, 1, (32, 16))),
    Entry("route_and_prefill", 4, 256, _tall_to_low(16, 8, 1, (16,))),
    Entry("route_and_prefill.alone", 2, 128, _tall_to_low(16, 8, 1, (32, 16)), family="sm80"),
    Entry("route_and_prefill.alone", 4, 128, _tall_to_low(16, 8, 1, (32, 16)), family="sm100"),
    *(
        entry
        for itemsize in (2, 4)
        for entry in (
            Entry("route_and_prefill.alone", itemsize, 128, _tall_to_low(16, 4, 1, (32, 16))),
            Entry("route_and_prefill.alone", itemsize, 1024, _tall_to_low(16, 8, 1, (16,))),
            Entry("route_and_prefill.alone", itemsize, 2048, _tall_to_low(16, 16, 1, (16,))),
        )
    ),
    Entry("finish_hidden_gradient", 2, 512, _tall_to_low(16, 4, 1, (16,))),
    Entry("finish_hidden_gradient", 2, 2048, _tall_to_low(16, 8, 1, (16,))),
    Entry("finish_hidden_gradient", 4, 512, _tall_to_low(16, 4, 1, (16,))),
    Entry("finish_hidden_gradient", 4, 2048, _tall_to_low(16, 8, 1, (16,))),
    # Sums over tokens: `rows` tokens a step, `features` and `rank` hidden columns a program.
    Entry("weight_gradient", 2, 32, _tall_to_low(128, 8, 3, (64,), rank=32), family="sm100"),
    Entry("weight_gradient", 2, 32, _tall_to_low(128, 4, 3, (64,), rank=32)),
    Entry("weight_gradient", 2, 64, _tall_to_low(128, 8, 4, (64,), rank=64), family="sm100"),
    Entry("weight_gradient", 2, 64, _tall_to_low(128, 4, 3, (64,), rank=64)),
    Entry("weight_gradient", 2, _ANY, _tall_to_low(128, 8, 3, (64,), rank=128)),
    Entry("weight_gradient.unaligned", 2, 32, _tall_to_low(128, 8, 3, (64,), rank=32)),
    Entry("weight_gradient.unaligned", 2, 64, _tall_to_low(128, 8, 3, (64,), rank=64)),
    Entry("weight_gradient.unaligned", 2, _ANY, _tall_to_low(64, 8, 3, (64,), rank=128)),
    Entry("weight_gradient", 4, 64, _tall_to_low(64, 8, 2, (16,), rank=32), family="sm100"),
    Entry("weight_gradient", 4, 64, _tall_to_low(64, 8, 3, (16,), rank=32)),
    Entry("weight_gradient", 4, _ANY, _tall_to_low(32, 8, 2, (16,), rank=32)),
    Entry("weight_gradient.dropout", 2, _ANY, _tall_to_low(64, 4, 2, (32,), rank=32)),
    Entry("weight_gradient.dropout", 4, _ANY, _tall_to_low(64, 8, 2, (16,), rank=32)),
    # dX and the staged y: `rows` tokens stay, the walk is over `features` a step.
    Entry("expand_columns", 2, 64, _tall_to_low(128, 4, 3, (64, 32, 16), rank=64), family="sm90"),
    Entry("expand_columns", 2, 128, _HOPPER_EXPAND + _SMALL_EXPAND, family="sm90"),
    Entry("expand_columns", 2, 256, _tall_to_low(64, 8, 2, (128,), rank=128) + _EXPAND + _SMALL_EXPAND, family="sm90"),
    Entry("expand_columns", 2, _ANY, _tall_to_low(128, 8, 2, (128,), rank=64) + _EXPAND + _SMALL_EXPAND, family="sm90"),
    Entry("expand_columns", 2, 64, _tall_to_low(128, 4, 2, (64, 32, 16), rank=64)),
    Entry("expand_columns", 2, _ANY, _EXPAND + _SMALL_EXPAND),
    Entry("expand_columns.unaligned", 2, 64, _tall_to_low(128, 4, 2, (64, 32, 16), rank=64)),
    Entry("expand_columns.unaligned", 2, _ANY, _EXPAND + _SMALL_EXPAND),
    Entry("expand_columns", 4, _ANY, _tall_to_low(32, 8, 2, (32, 16), rank=16)),
    Entry("expand_columns.dropout", 2, 96, _tall_to_low(64, 8, 2, (64, 32, 16), rank=64)),
    Entry("expand_columns.dropout", 2, _ANY, _tall_to_low(64, 8, 2, (64, 32, 16), rank=32)),
    Entry("expand_columns.dropout.unaligned", 2, _ANY, _tall_to_low(64, 8, 2, (32, 16), rank=32)),
    Entry("expand_columns.dropout", 4, _ANY, _tall_to_low(32, 8, 2, (16,), rank=32)),
)


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The entries of a file that the tuner wrote.

    Raises:
        ValueError: the file is not JSON of that form; it names the file and what is wrong.
    """
    try:
        rows = json.loads(path.read_text())
        entries = []
        for row in rows:
            tiles = tuple(Tile(**tile) for tile in row.pop("tiles"))
            entries.append(Entry(**row, tiles=tiles))
            if entries[-1].kernel not in {entry.kernel for entry in TABLE}:
                raise ValueError(f"there is no kernel {entries[-1].kernel!r}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{TILES_VARIABLE}: {path} is not a list of tile entries: {error}") from error
    return tuple(entries)


def write_entries(entries: list[Entry], path: Path) -> None:
    """Write entries as :func:`read_entries` reads them; to a temporary name first, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1) + "\n")
    partial.replace(path)
