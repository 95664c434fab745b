"""Watching passes run once, to make a plan of what they did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from goat_kernels.backends.triton_backend.plan import Place, Plan, PlannedLaunch, outlined, slots_in
from goat_kernels.kernels.launch import Launch, watched

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


class Watch(TorchDispatchMode):
    """Sees what a pass allocates, launches, and does besides."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._slots = list(given)
        self._given = len(given)
        self._launches: list[tuple[Launch, Any]] = []
        self._refusal: str | None = None
        self._launching = False

    def __enter__(self) -> Watch:
        self._watching = watched(self._launch)
        self._watching.__enter__()
        return super().__enter__()

    def __exit__(self, *failure) -> None:
        super().__exit__(*failure)
        self._watching.__exit__(*failure)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if self._launching:  # the interpreter's own
            return result
        if function in _ALLOCATIONS:
            self._slots.append(result)
        elif function not in _VIEWS:
            self._refusal = f"it calls {function}"
        return result

    def _launch(self, launch: Launch) -> None:
        self._launching = True
        try:
            self._launches.append((launch, launch.run()))
        finally:
            self._launching = False

    def plan(self, result: Any) -> Plan | str:
        """The plan for what was seen, or why there is none."""
        if self._refusal is not None:
            return self._refusal
        starts = [tensor.data_ptr() for tensor in self._slots if tensor.numel()]
        if len(set(starts)) < len(starts):
            return "two of its tensors begin at the same address"
        by_address = not any(seen.interpreted for seen, _ in self._launches)
        try:
            kept = set(slots_in(outlined(result, self._place)))
            given, own = self._slots[: self._given], self._slots[self._given :]
            allocated = [t for slot, t in enumerate(own, start=self._given) if slot in kept or not by_address]
            shared = [t for slot, t in enumerate(own, start=self._given) if slot not in kept and by_address]
            self._slots = given + allocated + shared
            launches = tuple(self._planned(*seen) for seen in self._launches)
            outline = outlined(result, self._place)
        except _ElsewhereError:
            return "a tensor is neither among those given nor among those allocated"
        allocations = tuple((tuple(t.shape), t.stride(), t.dtype) for t in allocated)
        lives = _lives(launches)
        first_shared = self._given + len(allocated)
        size_bytes, offsets = laid_out(
            [(t.untyped_storage().nbytes(), *lives.get(slot, (0, 0))) for slot, t in enumerate(shared, first_shared)]
        )
        return Plan(allocations, size_bytes, offsets, launches, outline, by_address)

    def _planned(self, launch: Launch, compiled: Any) -> PlannedLaunch:
        arguments = launch.in_order()
        places = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                place = self._place(argument)
                places.append((position, place, place.offset * argument.element_size()))
                arguments[position] = None
        return PlannedLaunch(launch.runner(compiled), arguments, tuple(places))

    def _place(self, tensor: Tensor) -> Place:
        """Where ``tensor`` lies: it begins where a slot does, or within one that has no gaps."""
        address, size = tensor.data_ptr(), tensor.element_size()
        for slot, base in enumerate(self._slots):
            if tensor is base or (tensor.numel() and base.numel() and base.data_ptr() == address):
                whole = tensor.shape == base.shape and tensor.stride() == base.stride()
                return Place(slot, 0, tuple(tensor.shape), tensor.stride(), whole)
        for slot, base in enumerate(self._slots):
            offset_bytes = address - base.data_ptr()
            if base.is_contiguous() and base.dtype == tensor.dtype and 0 <= offset_bytes < base.numel() * size:
                return Place(slot, offset_bytes // size, tuple(tensor.shape), tensor.stride(), whole=False)
        raise _ElsewhereError


class _ElsewhereError(Exception):
    """A tensor that is in none of the slots."""


def _lives(launches: tuple[PlannedLaunch, ...]) -> dict[int, tuple[int, int]]:
    """Slot -> its first and its last launch."""
    lives: dict[int, tuple[int, int]] = {}
    for number, launch in enumerate(launches):
        for _, place, _ in launch.places:
            first, _ = lives.get(place.slot, (number, number))
            lives[place.slot] = (first, number)
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
