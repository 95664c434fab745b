"""Watching passes run once, to make a plan of what they did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from goat_kernels.backends.triton_backend.plan import Place, Plan, picker, places_in, rebuilder
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
            kept = {place.slot for place in places_in(result, self._place)}
            given, own = self._slots[: self._given], self._slots[self._given :]
            allocated = [t for slot, t in enumerate(own, start=self._given) if slot in kept or not by_address]
            shared = [t for slot, t in enumerate(own, start=self._given) if slot not in kept and by_address]
            self._slots = given + allocated + shared
            arguments = [
                [self._place(one) if isinstance(one, Tensor) else one for one in launch.in_order()]
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
                (launch.runner(compiled), picker(pick))
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
