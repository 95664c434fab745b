"""A plan: what passes allocated and launched, and how to do it again on other tensors (``plans.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor lies: in which of the tensors that a plan knows, how many elements in, and with what geometry.

    ``whole``: it has the geometry of that tensor.
    """

    slot: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool

    def tensor(self, slots: list[Tensor]) -> Tensor:
        base = slots[self.slot]
        if self.whole:
            return base
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


class PlannedLaunch(NamedTuple):
    """A launch with holes: ``run(*arguments)`` once each position of ``places`` has been filled in."""

    run: Callable[..., None]
    arguments: list[Any]
    places: tuple[tuple[int, Place, int], ...]  # position, where it points, and that in bytes


class Plan(NamedTuple):
    """One pass for one key.

    Slots are the tensors it was given, those it allocates, and parts of one workspace: what it allocates and its result
    does not hold. The interpreter, which wants tensors and not addresses, has no workspace.

    Attributes:
        allocations: shape, strides and dtype of each.
        workspace_bytes: its size.
        offsets: of its parts, in bytes.
        launches: in order.
        result: the pass's result with a Place for each tensor.
        by_address: whether launches take addresses.
    """

    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    workspace_bytes: int
    offsets: tuple[int, ...]
    launches: tuple[PlannedLaunch, ...]
    result: Any
    by_address: bool

    def replay(self, given: list[Tensor], addresses: list[int]) -> Any:
        """The pass on ``given``, which lie at ``addresses``."""
        device = given[0].device
        allocated = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.allocations
        ]
        slots = given + allocated
        if self.by_address:
            addresses = addresses + [tensor.data_ptr() for tensor in allocated]
            if self.offsets:
                workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
                start = workspace.data_ptr()
                addresses += [start + offset for offset in self.offsets]
            for run, template, places in self.launches:
                arguments = template.copy()
                for position, place, offset_bytes in places:
                    arguments[position] = addresses[place.slot] + offset_bytes
                run(*arguments)
        else:
            for run, template, places in self.launches:
                arguments = template.copy()
                for position, place, _ in places:
                    arguments[position] = place.tensor(slots)
                run(*arguments)
        return filled_in(self.result, slots)


def outlined(result: Any, place: Callable[[Tensor], Place]) -> Any:
    """``result`` with a Place for each tensor; tuples keep their type."""
    if isinstance(result, Tensor):
        return place(result)
    if isinstance(result, tuple):
        return _like(result, (outlined(part, place) for part in result))
    return result


def slots_in(outline: Any) -> Iterator[int]:
    """The slots of the places in ``outline``."""
    if type(outline) is Place:
        yield outline.slot
    elif isinstance(outline, tuple):
        for part in outline:
            yield from slots_in(part)


def filled_in(outline: Any, slots: list[Tensor]) -> Any:
    """``outline`` with the tensor for each Place."""
    if type(outline) is Place:
        return outline.tensor(slots)
    if isinstance(outline, tuple):
        return _like(outline, (filled_in(part, slots) for part in outline))
    return outline


def _like(example: tuple, parts: Iterator) -> tuple:
    return tuple(parts) if type(example) is tuple else type(example)._make(parts)
