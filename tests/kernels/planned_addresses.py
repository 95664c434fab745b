"""In a process of its own, without Triton's interpreter: what a replayed launch hands to a compiled kernel.

A driver that launches nothing (``bench/dry_driver.py``) stands in for the GPU's, and the arguments are noted. The third
call of a layer (replayed) has to launch the same compiled kernels on the same grids with the same numbers as the first,
and its pointers have to be those of the first, each tensor of the first exchanged for the one that stands in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import dry_driver

dry_driver.install()

from goat_kernels import GoatLinear  # noqa: E402
from goat_kernels.backends import get_backend  # noqa: E402
from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target  # noqa: E402


class Noted(NamedTuple):
    """One launch: the kernel's name, its grid, its run-time arguments; a pointer is a tensor or an address."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@contextmanager
def noted() -> Iterator[list[Noted]]:
    """The launches of the block, in order."""
    notes: list[Noted] = []

    def note(launcher, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        notes.append(Noted(launcher.name, (x, y, z), arguments))

    with mock.patch.object(dry_driver.DryLauncher, "__call__", note):
        yield notes


def step(layer: GoatLinear, T: int) -> tuple[list[Noted], int, list[torch.Tensor]]:
    """(launches of a forward and backward, how many are the forward's, the tensors that the caller sees)."""
    x = torch.randn(T, layer.in_features, dtype=layer.weight.dtype, requires_grad=True)
    grad_y = torch.randn(T, layer.out_features, dtype=layer.weight.dtype)
    with noted() as launched:
        y = layer(x)
        of_forward = len(launched)
        gradients = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B, layer.router), grad_y)
    return launched, of_forward, [x, grad_y, y, *gradients]


def assert_apart(first: list[Noted], stands_for: dict[int, int]) -> None:
    """What two allocations of ``first`` are exchanged for does not overlap while both are in use."""
    found: dict[int, tuple[int, int, int, int]] = {}  # where it was -> where it is now, and ends; first, last launch
    for number, launch in enumerate(first):
        for one in launch.arguments:
            if isinstance(one, torch.Tensor) and one.numel():
                storage = one.untyped_storage()
                now = stands_for[one.data_ptr()] - (one.data_ptr() - storage.data_ptr())
                *_, start, _ = found.get(storage.data_ptr(), (now, now, number, number))
                found[storage.data_ptr()] = (now, now + storage.nbytes(), start, number)
    ranges = list(found.values())
    for i, (low, high, start, end) in enumerate(ranges):
        for other_low, other_high, other_start, other_end in ranges[:i]:
            together = start <= other_end and other_start <= end
            assert not together or high <= other_low or other_high <= low


def check(T: int, r: int = 16, **settings) -> int:
    layer = GoatLinear(
        192, 128, r=r, num_experts=4, backend="triton", balance_coefficient=1e-3, dtype=torch.bfloat16, **settings
    )
    first, of_forward, kept = step(layer, T)  # its launches keep its tensors, so that no address stands for two
    again, _, kept_again = step(layer, T)
    replayed, _, seen = step(layer, T)
    assert [launch[:2] for launch in first] == [launch[:2] for launch in again] == [launch[:2] for launch in replayed]
    stands_for: dict[int, int] = {}
    for number, ((_, _, before), (_, _, after)) in enumerate(zip(first, replayed, strict=True)):
        if number == of_forward:  # what only the forward needed is free again
            assert_apart(first[:of_forward], stands_for)
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            if not isinstance(one, torch.Tensor):
                assert one == other and type(one) is type(other)
                continue
            assert type(other) is int, "the third call was not replayed"
            assert stands_for.setdefault(one.data_ptr(), other) == other
    assert_apart(first[of_forward:], stands_for)
    for old, new in zip(kept, seen, strict=True):
        if old.data_ptr() in stands_for:
            assert stands_for[old.data_ptr()] == new.data_ptr()
    for parameter in (layer.lora_A, layer.lora_B, layer.router, layer.residual_A, layer.residual_B):
        assert stands_for.get(parameter.data_ptr(), parameter.data_ptr()) == parameter.data_ptr()
    assert {t.data_ptr() for t in (kept[0], kept[1])} <= set(stands_for)
    del kept_again
    return len(replayed)


with forced_target(KNOWN_TARGETS[dry_driver.TARGET]):
    total = check(16) + check(8192) + check(8192, r=8) + check(8192, dropout=0.1) + check(512)
    assert not get_backend("triton").plans.refusals()
print(f"{total} launches replayed")
