"""How many bytes does each launch move, and is it what the design says? Counted in Triton's interpreter, without a GPU.

The interpreter runs one program after the other, so a hook on its loads and stores sees every access. Each belongs to
the pointer argument whose memory it falls into; ``traffic_formulas.py`` sorts those into kinds, and has the formulas
that a launch must meet to the byte. What falls outside of every argument is a kind of its own, and always an error.

Over a layer, ``DESIGNED_PASSES`` says how often the fused form goes through each wide tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch

from goat_kernels.checks.problem import LayerCase, imitated, make_problem, run_passes
from goat_kernels.checks.traffic_formulas import planned, pointer_kinds
from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target
from goat_kernels.kernels.launch import Launch, observed

#: The most that scalars may be of a launch's bytes.
SCALARS_SHARE = 0.01

#: How much more than ``DESIGNED_PASSES`` a layer may move of x, y, dY and dX.
STREAM_BOUND = 1.02

#: (direction, tensor) -> how often a fused layer goes through it. dY: for the hidden gradient, and for lora_B's where
#: that does not ride in the same read.
DESIGNED_PASSES = {
    ("forward", "x"): 1,
    ("forward", "y"): 1,
    ("backward", "dY"): 2,
    ("backward", "dX"): 1,
    ("backward", "x"): 1,
}


class TrafficCase(NamedTuple):
    """A layer to count; ``fused``: whether it takes the kernels that ``DESIGNED_PASSES`` describes."""

    name: str
    layer: LayerCase
    fused: bool = True


@dataclass(frozen=True)
class Moved:
    """What one launch moved of one kind of tensor, in bytes.

    Attributes:
        direction: "forward" or "backward".
        kernel: its function's name.
        what: x, dY, y or dX for the wide tensors, else a kind of ``traffic_formulas.py``, or "outside".
        read_bytes, written_bytes: counted (of :func:`plan_layer`: as planned).
        planned: (read, written) by the kernel's plan; None for scalars that it leaves out.
        once_bytes: going through each of those tensors once.
        launch_bytes: all that the launch moved.
    """

    direction: str
    kernel: str
    what: str
    read_bytes: int
    written_bytes: int
    planned: tuple[int, int] | None
    once_bytes: int
    launch_bytes: int

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    @property
    def times(self) -> float:
        """How often the tensors were gone through."""
        return self.moved_bytes / max(self.once_bytes, 1)

    @property
    def passed(self) -> bool:
        if self.planned is None:
            return self.moved_bytes <= SCALARS_SHARE * self.launch_bytes
        return (self.read_bytes, self.written_bytes) == self.planned


class StreamPasses(NamedTuple):
    """How often a whole layer went through x, y, dY or dX in one direction, and how often it may; None: no bound."""

    direction: str
    what: str
    times: float
    designed: int | None

    @property
    def passed(self) -> bool:
        return self.designed is None or self.times <= STREAM_BOUND * self.designed


# --- the layers ---------------------------------------------------------------------------------------------------


_SIZES = {"T": 128, "N": 256, "M": 384, "target": imitated(2)}

#: What ``goat-kernels check --traffic`` counts.
CASES: tuple[TrafficCase, ...] = (
    TrafficCase("fused, path", LayerCase(**_SIZES)),
    TrafficCase("fused, fold", LayerCase(**_SIZES, path=False)),
    TrafficCase("fused, path, dropout", LayerCase(**_SIZES, dropout_p=0.1)),
    TrafficCase("fused, onto a base's output", LayerCase(**_SIZES, onto_base=True)),
    TrafficCase("fused, adapter in x's dtype", LayerCase(**_SIZES, adapter_dtype=torch.bfloat16)),
    TrafficCase("fused, float32", LayerCase(**_SIZES, dtype=torch.float32)),
    TrafficCase("fused, lora_B rides", LayerCase(**_SIZES, R=8)),
    TrafficCase("fused, unaligned", LayerCase(T=75, N=200, M=328, R=24, E=6, K=3, target=imitated(2))),
    TrafficCase("fused, unaligned, lora_B rides", LayerCase(T=75, N=200, M=150, R=12, E=6, target=imitated(2))),
    TrafficCase("fused, splits of T", LayerCase(T=520, N=64, M=64, target=imitated(12))),
    TrafficCase("staged: few programs", LayerCase(T=128, N=256, M=384, target=imitated(40)), fused=False),
    TrafficCase("staged: large R", LayerCase(T=66, N=72, M=80, R=256, target=imitated(2)), fused=False),
    TrafficCase(
        "staged: both slots' columns, dropout",
        LayerCase(T=66, N=72, M=80, R=72, path=False, dropout_p=0.1, target=imitated(2)),
        fused=False,
    ),
    TrafficCase("decoding", LayerCase(T=16, N=512, M=384, target=imitated(16)), fused=False),
)

#: Layers of a real size, whose bytes follow from the plans: the sizes of docs/design.md.
REAL_CASES: tuple[LayerCase, ...] = tuple(
    LayerCase(T=8192, N=N, M=M, R=R, path=path, target=KNOWN_TARGETS["sm_90"])
    for N, M, R in ((4096, 4096, 32), (5120, 13824, 128), (13824, 5120, 128))
    for path in (False, True)
)


#: Pass -> (direction, the wide tensor it reads, the one it writes).
_STREAMS = {
    "prefill": ("forward", "x", "y"),
    "hidden_gradient": ("backward", "dY", ""),
    "weight_gradients": ("backward", "", ""),  # reads both; its kernel's plan tells them apart
    "input_prefill": ("backward", "", "dX"),
}


def count_layer(case: LayerCase, run: Callable[[Launch], None] = Launch.run) -> list[Moved]:
    """Run one forward and backward of the layer in the interpreter, and return what each launch moved.

    Args:
        case: the layer.
        run: runs a launch.
    """
    return _layer(case, "cpu", lambda launch: count(launch, run))


def plan_layer(case: LayerCase) -> list[Moved]:
    """What :func:`count_layer` would count, by the plans: nothing runs, and the sizes may be real."""
    return _layer(case, "meta", planned)


def _layer(case: LayerCase, device: str, moved_by: Callable[[Launch], dict[str, tuple[int, int]]]) -> list[Moved]:
    """One row for each kind that a launch moved, or should have."""
    from goat_kernels.kernels.passes import TritonPasses  # imports Triton

    rows: list[Moved] = []

    def counted(name: str) -> AbstractContextManager:
        direction, reads, writes = _STREAMS[name]

        def observe(launch: Launch) -> None:
            moved, plan, once = moved_by(launch), planned(launch), Counter()
            for argument, kind in pointer_kinds(launch).items():
                once[kind] += launch.arguments[argument].nbytes
            for kind in dict.fromkeys([*plan, *moved]):
                both, due = moved.get(kind, (0, 0)), plan.get(kind, None if kind == "scalars" else (0, 0))
                if any(both) or any(due or ()):
                    what, total = {"in": reads, "out": writes}.get(kind, kind), sum(map(sum, moved.values()))
                    rows.append(Moved(direction, launch.name, what, *both, due, once[kind], total))

        return observed(observe)

    with forced_target(case.target):
        run_passes(TritonPasses(), make_problem(case, device), around=counted)
    return rows


def stream_passes(case: TrafficCase, rows: list[Moved]) -> list[StreamPasses]:
    """How often the layer went through each wide tensor."""
    summed = []
    for (direction, what), designed in DESIGNED_PASSES.items():
        of_it = [row for row in rows if (row.direction, row.what) == (direction, what)]
        times = sum(row.moved_bytes for row in of_it) / max(row.once_bytes for row in of_it)
        if what == "dY" and any((row.kernel, row.what) == ("fused_hidden_gradient", "gradient") for row in rows):
            designed -= 1
        summed.append(StreamPasses(direction, what, times, designed if case.fused else None))
    return summed


# --- counting -----------------------------------------------------------------------------------------------------


def count(launch: Launch, run: Callable[[Launch], None] = Launch.run) -> dict[str, tuple[int, int]]:
    """Run one launch on CPU tensors; kind -> (bytes read, bytes written), "outside" for addresses of no argument.

    Loads and stores without a mask reach the interpreter's same two methods, with a mask of ones. No kernel uses
    atomics.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    memory, loads, stores = list(_memory(launch)), Counter(), Counter()

    def add(moved: Counter, pointers, mask) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        active = pointers.data[mask.data.astype(bool)]
        for kind, start, stop in memory:
            inside = (active >= start) & (active < stop)
            moved[kind] += int(inside.sum()) * width
            active = active[~inside]
        moved["outside"] += active.size * width

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        add(loads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        add(stores, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with mock.patch.multiple(InterpreterBuilder, create_masked_load=counted_load, create_masked_store=counted_store):
        run(launch)
    return {kind: (loads[kind], stores[kind]) for kind in sorted({*loads, *stores}) if loads[kind] or stores[kind]}


def _memory(launch: Launch) -> Iterator[tuple[str, int, int]]:
    """(kind, first address, address behind the last) of each pointer argument."""
    for name, kind in pointer_kinds(launch).items():
        tensor = launch.arguments[name]
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield kind, tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
        if launch.name == "weight_gradient" and kind == "gradient":
            # The tensor is the first split's; the others follow in the same buffer.
            buffer = tensor.untyped_storage()
            yield kind, buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes()
