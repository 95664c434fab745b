"""A plan: what passes allocated and launched, and how to do it again on other tensors (``plans.py``).

A replay makes a pool, a flat list of whatever any launch takes: addresses, then numbers. Each launch picks its
arguments out of the pool with one call, ``operator.itemgetter``, and so does the result from the tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_kernels.kernels.launch import current_stream


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
            stream = current_stream(device)
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
