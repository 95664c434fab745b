"""Plans: what passes allocate and launch, remembered, so that a repeated call costs the host almost nothing else.

At small sizes the host decides how fast a layer is, and most of its time goes into choosing tiles, naming arguments and
Triton's own look-up of the compiled kernel. A pass looks at shapes, strides, dtypes, alignments and options, and never
at a value in memory. So two calls that agree in those (their ``_key``) allocate and launch the same, at other
addresses: the second such call is watched and the later ones replay what was seen.

    call 1   runs the passes
    call 2   runs the passes, watched: every allocation, every launch, and what each pointer argument points into
    call 3+  allocate, fill in the addresses, launch the compiled kernels

Watching proves what it relies on: a pass that did anything to a tensor but allocate it, view it or hand it to a kernel
(a copy of a transposed lora_A, say) gets no plan and simply runs, always.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from goat_kernels.backends.triton_backend.operands import on_device_of, precision
from goat_kernels.kernels import configs
from goat_kernels.kernels.launch import Launch, is_observed, watched

#: Keys remembered at once. Training on ever new lengths of sequence would otherwise fill the memory.
MOST_PLANS = 2048

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
        return _filled_in(self.result, slots)


_UNSEEN, _UNWATCHED = "unseen", "not watched yet"


class Plans:
    """The plans of one backend, by key."""

    def __init__(self) -> None:
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
        given: list[Tensor] = []
        addresses: list[int] = []
        if is_observed() or configs.is_overridden() or not _describe(arguments, key := [], given, addresses):
            return function(passes, *arguments, **options)
        device = given[0].device
        key += (function, *options.values(), device.index, configs.current_target(device), precision(torch.float32))
        key = tuple(key)
        plan = self._plans.get(key, _UNSEEN)
        if type(plan) is Plan:
            with on_device_of(given[0]):
                return plan.replay(given, addresses)
        if plan is not _UNWATCHED:
            if plan is _UNSEEN:
                if len(self._plans) >= MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = _UNWATCHED
            return function(passes, *arguments, **options)
        with _Watch(given) as watch:
            result = function(passes, *arguments, **options)
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


class _Watch(TorchDispatchMode):
    """Sees what a pass allocates, launches, and does besides."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._slots = list(given)
        self._given = len(given)
        self._launches: list[tuple[Launch, Any]] = []
        self._refusal: str | None = None
        self._launching = False

    def __enter__(self) -> _Watch:
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
            kept = set(_slots_in(_outlined(result, self._place)))
            given, own = self._slots[: self._given], self._slots[self._given :]
            allocated = [t for slot, t in enumerate(own, start=self._given) if slot in kept or not by_address]
            shared = [t for slot, t in enumerate(own, start=self._given) if slot not in kept and by_address]
            self._slots = given + allocated + shared
            launches = tuple(self._planned(*seen) for seen in self._launches)
            outline = _outlined(result, self._place)
        except _ElsewhereError:
            return "a tensor is neither among those given nor among those allocated"
        allocations = tuple((tuple(t.shape), t.stride(), t.dtype) for t in allocated)
        size_bytes, *offsets = _laid_out([t.untyped_storage().nbytes() for t in shared])
        return Plan(allocations, size_bytes, tuple(offsets), launches, outline, by_address)

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


def _outlined(result: Any, place: Callable[[Tensor], Place]) -> Any:
    """``result`` with a Place for each tensor; tuples keep their type."""
    if isinstance(result, Tensor):
        return place(result)
    if isinstance(result, tuple):
        return _like(result, (_outlined(part, place) for part in result))
    return result


def _slots_in(outline: Any) -> Iterator[int]:
    """The slots of the places in ``outline``."""
    if type(outline) is Place:
        yield outline.slot
    elif isinstance(outline, tuple):
        for part in outline:
            yield from _slots_in(part)


def _laid_out(sizes: list[int]) -> list[int]:
    """[bytes together, where each begins] of parts one after the other, as aligned as allocations of their own."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return [starts[-1], *starts[:-1]]


def _filled_in(outline: Any, slots: list[Tensor]) -> Any:
    if type(outline) is Place:
        return outline.tensor(slots)
    if isinstance(outline, tuple):
        return _like(outline, (_filled_in(part, slots) for part in outline))
    return outline


def _like(example: tuple, parts: Iterator) -> tuple:
    return tuple(parts) if type(example) is tuple else type(example)._make(parts)
