"""Plans: what passes allocate and launch, remembered, so that a repeated call costs the host almost nothing else.

At small sizes the host decides how fast a layer is, and most of its time goes into choosing tiles, naming arguments and
Triton's own look-up of the compiled kernel. A pass looks at shapes, strides, dtypes, alignments and options, and never
at a value in memory. So two calls that agree in those allocate and launch the same, at other
addresses: the second such call is watched (``watching.py``) and the later ones replay what was seen.

    call 1   runs the passes
    call 2   runs the passes, watched: every allocation, every launch, and what each pointer argument points into
    call 3+  allocate, fill in the addresses, launch the compiled kernels

Watching proves what it relies on: a pass that did anything to a tensor but allocate it, view it or hand it to a kernel
(a copy of a transposed lora_A, say) gets no plan and simply runs, always.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from goat_kernels.backends.triton_backend.operands import is_current, precision
from goat_kernels.backends.triton_backend.plan import Plan
from goat_kernels.backends.triton_backend.watching import Watch
from goat_kernels.kernels import configs
from goat_kernels.kernels.launch import is_observed

#: Keys remembered at once. Training on ever new lengths of sequence would otherwise fill the memory.
MOST_PLANS = 2048

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
        key += (function, *options.values(), device.index, configs.current_target(device), precision(given[0].dtype))
        key = tuple(key)
        plan = self._plans.get(key, _UNSEEN)
        if type(plan) is Plan:
            if is_current(device):
                return plan.replay(given, addresses)
            with torch.cuda.device(device):
                return plan.replay(given, addresses)
        if plan is not _UNWATCHED:
            if plan is _UNSEEN:
                if len(self._plans) >= MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = _UNWATCHED
            return function(passes, *arguments, **options)
        with Watch(given) as watch:
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
