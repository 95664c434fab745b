"""The passes of a layer in Triton: each describes its launches, which are then made in order.

    prefill            forward.py (fused), staged_forward.py            backward of a layer: the three others
    hidden_gradient    hidden_gradient.py (both forms)
    weight_gradients   weight_gradient.py
    input_prefill      expand.py

A call that repeats an earlier one is replayed, and nothing here runs (``replay.py``; GOAT_KERNELS_REPLAY=0 turns it
off, for example to stop at breakpoints).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from goat_kernels.kernels.adapter import Widths, check_addresses, operands, pack, packed_numel
from goat_kernels.kernels.configs import choose_tile, current_target
from goat_kernels.kernels.expand import input_prefill
from goat_kernels.kernels.forward import fused, fused_tile
from goat_kernels.kernels.hidden_gradient import TritonHiddenGradient, hidden_gradient
from goat_kernels.kernels.launch import Launch, launch_all
from goat_kernels.kernels.replay import Plans
from goat_kernels.kernels.staged_forward import staged
from goat_kernels.kernels.weight_gradient import weight_gradients
from goat_kernels.passes import Adapter, Routing


def prefill(
    x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
) -> tuple[list[Launch], tuple[Tensor, Tensor, Routing]]:
    """(launches, (y0, balance loss, routing)): ``prefill`` of :class:`goat_kernels.passes.Passes`."""
    (T, _), M, E = x_TN.shape, adapter.lora_B.shape[0], adapter.num_experts
    tile = fused_tile(x_TN, adapter)
    # What no kernel holds is refused before anything is allocated.
    check_addresses(adapter)
    if tile is None:
        columns, target = Widths.of(adapter).columns, current_target(x_TN.device)
        choose_tile("route_and_prefill.alone", columns, x_TN.dtype.itemsize, target, T)
    y_TM = x_TN.new_empty(T, M)
    gate_ET = x_TN.new_empty(E, T, dtype=torch.float32)
    statistics = x_TN.new_empty if T else x_TN.new_zeros  # without tokens no kernel runs
    routing = Routing(
        weighted_TR=x_TN.new_empty(T, adapter.rank),
        gate_ET=gate_ET,
        probs_ET=torch.empty_like(gate_ET),
        load_E=statistics(E, dtype=torch.float32),
        packed=x_TN.new_empty(packed_numel(adapter, x_TN.dtype, T)),
    )
    balance_loss = statistics((), dtype=torch.float32)
    packing, matrices = pack(adapter, routing.packed), operands(adapter, routing.packed)
    tensors = (x_TN, adapter, matrices, bias_M, base_output_TM, y_TM, balance_loss, routing)
    launches = staged(*tensors) if tile is None else fused(tile, *tensors)
    return packing + launches, (y_TM, balance_loss, routing)


class TritonPasses:
    """Implements :class:`goat_kernels.passes.Passes`.

    ``launch_all`` makes the launches of a pass; the replay gives one that remembers them too.
    """

    def __init__(self, launch_all: Callable[[Iterable[Launch]], None] = launch_all) -> None:
        self.plans = Plans()
        self._launch_all = launch_all

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Hashable) -> Any:
        return self.plans.run(function, self, arguments, options)

    def packed_numel(self, adapter: Adapter, compute: torch.dtype, T: int) -> int:
        return packed_numel(adapter, compute, T)

    def folds(self, x_TN: Tensor, weight_MN: Tensor, residual_A: Tensor) -> bool:
        return False  # the residual's columns ride in reads that happen anyway

    def folded_weight(self, weight_MN: Tensor, residual_A: Tensor, residual_B: Tensor) -> Tensor:
        raise NotImplementedError("this backend never folds")

    def prefill(self, *tensors: Any) -> tuple[Tensor, Tensor, Routing]:
        return self._made(prefill(*tensors))

    def hidden_gradient(self, *tensors: Any, **needs: bool) -> TritonHiddenGradient:
        return self._made(hidden_gradient(*tensors, **needs))

    def weight_gradients(self, *tensors: Any, **needs: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self._made(weight_gradients(*tensors, **needs))

    def input_prefill(self, *tensors: Any) -> Tensor:
        return self._made(input_prefill(*tensors))

    def _made(self, pass_: tuple[list[Launch], Any]) -> Any:
        """The result of a pass, whose launches are made."""
        launches, result = pass_
        self._launch_all(launches)
        return result
