"""Replay: what a call allocates and launches, remembered, so that a repeated call costs the host almost nothing else.

At small sizes the host decides how fast a layer is, and most of its time goes into choosing tiles, naming arguments and
Triton's own look-up of the compiled kernel. A pass looks at shapes, strides, dtypes, alignments and options, and never
at a value in memory. So two calls that agree in those allocate and launch the same, at other addresses:

    call 1   runs the passes
    call 2   runs the passes, watched: every allocation, every launch, and what each pointer argument points into
    call 3+  allocate, fill in the addresses, launch the compiled kernels: the code of the passes does not run

The environment variable GOAT_KERNELS_REPLAY=0, set before the first call, turns it off: every call runs the passes, and
a breakpoint in them stops. So does an observer of launches, for as long as it looks.

Watching proves what a replay relies on: a pass that did anything to a tensor but allocate it, view it or hand it to a
kernel (for example, copied a transposed lora_A) gets no plan and runs every time.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from goat_kernels.kernels.common import precision
from goat_kernels.kernels.configs import current_target, is_overridden
from goat_kernels.kernels.launch import Launch, is_observed, on_device

#: "0" turns it off, "1" or nothing leaves it on.
REPLAY_VARIABLE = "GOAT_KERNELS_REPLAY"

#: Keys remembered at once. Training on ever new lengths of sequence would otherwise fill the memory.
MOST_PLANS = 2048

_UNSEEN, _UNWATCHED = "unseen", "not watched yet"


class Plans:
    """The plans of one backend, by key.

    Attributes:
        is_on: whether calls are replayed; what GOAT_KERNELS_REPLAY said when this was made.
        calls, replayed: how many calls there were, and how many of them were replayed.
    """

    def __init__(self) -> None:
        asked = os.environ.get(REPLAY_VARIABLE) or "1"
        if asked not in ("0", "1"):
            raise ValueError(f"{REPLAY_VARIABLE}={asked!r} is unknown; it must be 0 (off) or 1 (on)")
        self.is_on = asked == "1"
        self.calls = self.replayed = 0
        #: What is known of a key: its plan, why it has none, or that it has been seen once.
        self._plans: dict[Hashable, Plan | str] = {}

    def run(self, function: Callable[..., Any], passes: Any, arguments: tuple, options: dict[str, Hashable]) -> Any:
        """``function(passes, *arguments, **options)``, by its plan where there is one.

        Args:
            function: strings passes together. Its result is made of tensors, None, and tuples of them.
            passes: the backend's.
            arguments: tensors, numbers, strings, None, and tuples of them; the first is a tensor.
            options: no tensors.
        """
        self.calls += 1
        given: list[Tensor] = []
        addresses: list[int] = []
        key: list[Hashable] = []
        is_off = not self.is_on or is_observed() or is_overridden()
        if is_off or not _describe(arguments, key, given, addresses):
            return function(passes, *arguments, **options)
        device = given[0].device
        key += (function, *options.values(), device.index, current_target(device), precision(given[0].dtype))
        key = tuple(key)
        plan = self._plans.get(key, _UNSEEN)
        if type(plan) is Plan:
            self.replayed += 1
            with on_device(device):
                return plan.replay(given, addresses)
        if plan is not _UNWATCHED:
            if plan is _UNSEEN:
                if len(self._plans) >= MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = _UNWATCHED
            return function(passes, *arguments, **options)
        with _Watch(given) as watch:
            result = function(type(passes)(watch.launch_all), *arguments, **options)
        self._plans[key] = watch.plan(result)
        return result

    def refusals(self) -> list[str]:
        """Why the keys without a plan have none."""
        return [plan for plan in self._plans.values() if type(plan) is str and plan is not _UNWATCHED]


def _describe(arguments: tuple, key: list, given: list[Tensor], addresses: list[int]) -> bool:
    """Append to ``key`` all that a pass looks at, and the tensors to ``given`` and ``addresses``; False: no plan."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is torch.nn.Parameter:
            address = argument.data_ptr()
            given.append(argument)
            addresses.append(address)
            key += (argument.shape, argument.stride(), argument.dtype, address & 15)
        elif argument is None or kind in (int, float, bool, str):
            key.append(argument)
        elif isinstance(argument, tuple):
            key.append(kind)
            if not _describe(argument, key, given, addresses):
                return False
        else:  # a tracer's tensor, a number of its own
            return False
    return True


class Place(NamedTuple):
    """Where a tensor lies: in which of the tensors that a plan knows, how many bytes in, and with what geometry.

    ``geometry``: (shape, strides, offset in elements), or None where it is that tensor as a whole.
    """

    slot: int
    offset_bytes: int
    geometry: tuple[tuple[int, ...], tuple[int, ...], int] | None

    def tensor(self, slots: list[Tensor]) -> Tensor:
        base = slots[self.slot]
        if self.geometry is None:
            return base
        shape, stride, offset = self.geometry
        return base.as_strided(shape, stride, base.storage_offset() + offset)


class Plan(NamedTuple):
    """One pass for one key.

    Slots are the tensors it was given, those it allocates, and parts of one workspace: what it allocates and its result
    does not hold. The interpreter, which wants tensors and not addresses, has no workspace.

    Attributes:
        allocations: shape, strides and dtype of each.
        workspace_bytes: its size.
        offsets: of its parts, in bytes.
        inside: the places that launches point to and that are no slot: the pool has them behind the slots.
        constants: the pool's last part, numbers and None.
        launches: in order; ``run(*pick(pool))``.
        result: the pass's result, from the slots that are tensors.
        by_address: whether launches take addresses.
    """

    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    workspace_bytes: int
    offsets: tuple[int, ...]
    inside: tuple[Place, ...]
    constants: tuple[Any, ...]
    launches: tuple[tuple[Callable[..., None], Callable[[list], tuple]], ...]
    result: Callable[[list[Tensor]], Any]
    by_address: bool

    def replay(self, given: list[Tensor], addresses: list[int]) -> Any:
        """The pass on ``given``, which lie at ``addresses``."""
        device = given[0].device
        allocated = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.allocations
        ]
        slots = given + allocated
        if self.by_address:
            pool = addresses + [tensor.data_ptr() for tensor in allocated]
            if self.offsets:
                workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
                start = workspace.data_ptr()
                pool += [start + offset for offset in self.offsets]
            pool += [pool[slot] + offset_bytes for slot, offset_bytes, _ in self.inside]
            pool += self.constants
            stream = driver.active.get_current_stream(device.index)  # once, where Triton would ask at each launch
            for run, pick in self.launches:
                run(*pick(pool), stream=stream)
        else:
            pool = [*slots, *(place.tensor(slots) for place in self.inside), *self.constants]
            for run, pick in self.launches:
                run(*pick(pool))
        return self.result(slots)


def picker(indices: list[int]) -> Callable[[list], tuple]:
    """list -> the tuple of its elements at ``indices``."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda elements: tuple(elements[index] for index in indices)


def places_in(result: Any, place: Callable[[Tensor], Place]) -> Iterator[Place]:
    """Where the tensors of a pass's result lie."""
    if isinstance(result, Tensor):
        yield place(result)
    elif isinstance(result, tuple):
        for part in result:
            yield from places_in(part, place)


def rebuilder(result: Any, place: Callable[[Tensor], Place]) -> Callable[[list[Tensor]], Any]:
    """slots -> what ``result`` is, with the tensors at the same places of these; tuples keep their type."""
    if isinstance(result, Tensor):
        found = place(result)
        return operator.itemgetter(found.slot) if found.geometry is None else found.tensor
    if not isinstance(result, tuple):
        return lambda slots: result
    make = tuple if type(result) is tuple else type(result)._make
    if all(isinstance(part, Tensor) for part in result):
        places = [place(part) for part in result]
        if all(found.geometry is None for found in places):  # one call for all
            pick = picker([found.slot for found in places])
            return pick if make is tuple else lambda slots: make(pick(slots))
    parts = [rebuilder(part, place) for part in result]
    return lambda slots: make([part(slots) for part in parts])


# --- watching a call, to make a plan of it ---------------------------------------------------------------------------

#: Of what a GPU's allocator hands out, in bytes.
_ALIGNMENT = 512

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_VIEWS = {
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.t.default,
    _aten.transpose.int,
    _aten.view.default,
}


class _Watch(TorchDispatchMode):
    """Sees what passes allocate, launch, and do besides."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._slots = list(given)
        self._given = len(given)
        self._launches: list[tuple[Launch, Any]] = []
        self._refusal: str | None = None
        self._launching = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if self._launching:  # the interpreter's own
            return result
        if function in _ALLOCATIONS:
            self._slots.append(result)
        elif function not in _VIEWS:
            self._refusal = f"it calls {function}"
        return result

    def launch_all(self, launches: Iterable[Launch]) -> None:
        self._launching = True
        try:
            self._launches += [(launch, launch.run()) for launch in launches if 0 not in launch.grid]
        finally:
            self._launching = False

    def plan(self, result: Any) -> Plan | str:
        """The plan made from what was seen, or why there is none."""
        if self._refusal is not None:
            return self._refusal
        starts = [tensor.data_ptr() for tensor in self._slots if tensor.numel()]
        if len(set(starts)) < len(starts):
            return "two of its tensors begin at the same address"
        by_address = all(isinstance(seen.kernel, triton.JITFunction) for seen, _ in self._launches)
        try:
            kept = {place.slot for place in places_in(result, self._place)}
            given, own = self._slots[: self._given], self._slots[self._given :]
            allocated = [t for slot, t in enumerate(own, start=self._given) if slot in kept or not by_address]
            shared = [t for slot, t in enumerate(own, start=self._given) if slot not in kept and by_address]
            self._slots = given + allocated + shared
            arguments = [
                [self._place(one) if isinstance(one, Tensor) else one for one in _in_order(launch)]
                for launch, _ in self._launches
            ]
            rebuilt = rebuilder(result, self._place)
        except _ElsewhereError:
            return "a tensor is neither among those given nor among those allocated"
        lives = _lives(arguments)
        first_shared = self._given + len(allocated)
        size_bytes, offsets = laid_out(
            [(t.untyped_storage().nbytes(), *lives.get(slot, (0, 0))) for slot, t in enumerate(shared, first_shared)]
        )
        inside, constants, picks = _pooled(arguments, len(self._slots), by_address)
        return Plan(
            allocations=tuple((tuple(t.shape), t.stride(), t.dtype) for t in allocated),
            workspace_bytes=size_bytes,
            offsets=offsets,
            inside=inside,
            constants=constants,
            launches=tuple(
                (_runner(launch, compiled), picker(pick))
                for (launch, compiled), pick in zip(self._launches, picks, strict=True)
            ),
            result=rebuilt,
            by_address=by_address,
        )

    def _place(self, tensor: Tensor) -> Place:
        """Where ``tensor`` lies: it begins where a slot does, or within one that has no gaps."""
        address, size = tensor.data_ptr(), tensor.element_size()
        shape, stride = tuple(tensor.shape), tensor.stride()
        for slot, base in enumerate(self._slots):
            if tensor is base or (tensor.numel() and base.numel() and base.data_ptr() == address):
                whole = shape == tuple(base.shape) and stride == base.stride()
                return Place(slot, 0, None if whole else (shape, stride, 0))
        for slot, base in enumerate(self._slots):
            offset_bytes = address - base.data_ptr()
            if base.is_contiguous() and base.dtype == tensor.dtype and 0 <= offset_bytes < base.numel() * size:
                offset = offset_bytes // size
                return Place(slot, offset * size, (shape, stride, offset))
        raise _ElsewhereError


class _ElsewhereError(Exception):
    """A tensor that is in none of the slots."""


def _in_order(launch: Launch) -> list[Any]:
    """Arguments and constants as the kernel lists them."""
    given = {**launch.arguments, **launch.constants}
    return [given[name] for name in launch.kernel.arg_names]


def _runner(launch: Launch, compiled: Any) -> Callable[..., None]:
    """``runner(*in order)`` launches ``compiled``, which a launch returned, without looking it up again.

    A compiled kernel's runner takes addresses for tensors, and ``stream=``; the interpreter's takes tensors.
    """
    if compiled is None:
        options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
        return functools.partial(launch.kernel[launch.grid], **options)
    return compiled[(*launch.grid, 1, 1)[:3]]


def _pooled(
    arguments: list[list[Any]], slots: int, by_address: bool
) -> tuple[tuple[Place, ...], tuple[Any, ...], list[list[int]]]:
    """(places that are no slot, constants, and for each launch where its arguments are in the pool).

    The pool is the slots, the places, the constants. To an address, a slot's own beginning is the slot.
    """

    def is_slot(place: Place) -> bool:
        return not place.offset_bytes if by_address else place.geometry is None

    flat = [one for of_launch in arguments for one in of_launch]
    inside = list(dict.fromkeys(one for one in flat if type(one) is Place and not is_slot(one)))
    at = {place: slots + index for index, place in enumerate(inside)}
    constants, picks = [], []
    for of_launch in arguments:
        pick = []
        for one in of_launch:
            if type(one) is not Place:
                pick.append(slots + len(inside) + len(constants))
                constants.append(one)
            else:
                pick.append(one.slot if is_slot(one) else at[one])
        picks.append(pick)
    return tuple(inside), tuple(constants), picks


def _lives(arguments: list[list[Any]]) -> dict[int, tuple[int, int]]:
    """Slot -> its first and its last launch."""
    lives: dict[int, tuple[int, int]] = {}
    for number, of_launch in enumerate(arguments):
        for one in of_launch:
            if type(one) is Place:
                first, _ = lives.get(one.slot, (number, number))
                lives[one.slot] = (first, number)
    return lives


def laid_out(parts: list[tuple[int, int, int]]) -> tuple[int, tuple[int, ...]]:
    """(bytes together, where each part begins), as aligned as allocations of their own.

    A part is (bytes, first launch, last launch) and goes to the lowest place that is free as long as it lives, as the
    allocator would put it. Launches of one stream run in order, so what has been used before may be written again.
    """
    placed: list[tuple[int, int, int, int]] = []  # start, end, first, last
    for size, first, last in parts:
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        start = 0
        for other_start, other_end in sorted((s, e) for s, e, f, l in placed if f <= last and first <= l):
            if start + size <= other_start:
                break
            start = max(start, other_end)
        placed.append((start, start + size, first, last))
    return max((end for _, end, _, _ in placed), default=0), tuple(start for start, _, _, _ in placed)
