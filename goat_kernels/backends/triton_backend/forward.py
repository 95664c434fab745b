"""Which kernels make a forward: fused, or in stages where the fused kernel does not serve.

fused     [pack_adapter]  fused_forward  finish_balance
few       project  route_and_prefill                                    decoding, up to FEW_TOKENS tokens
staged    [pack_adapter]  project  route_and_prefill  [finish_balance]  [dropped_hidden]  expand_columns
"""

from __future__ import annotations

import torch
from torch import Tensor

from goat_kernels.backends.base import Adapter, Routing
from goat_kernels.backends.triton_backend.expansion import expand
from goat_kernels.backends.triton_backend.operands import (
    FEW_TOKENS,
    MOST_SPLITS,
    Operands,
    Widths,
    check_addresses,
    dropout_arguments,
    is_unaligned,
    onto,
    operands,
    pack,
    precision,
    split_stages,
    splits_of,
    with_contiguous_vectors,
)
from goat_kernels.kernels.balance import finish_balance
from goat_kernels.kernels.common import padded
from goat_kernels.kernels.configs import Target, choose_tile, current_target, find_tile
from goat_kernels.kernels.forward import fused_forward
from goat_kernels.kernels.launch import blocks, launch
from goat_kernels.kernels.project import dropped_hidden, project
from goat_kernels.kernels.route import route_and_prefill
from goat_kernels.kernels.tiles import Tile

#: More experts than this route in a stage of their own: their logits' accumulators would crowd out the hidden columns'.
FUSED_EXPERTS = 16

#: More hidden columns than this leave no registers for a block of y beside them.
PREFILLED_COLUMNS = 256

#: A grid has at most 65535 programs along its second axis, and the lowest tile is 16 features wide.
PREFILLED_FEATURES = 65535 * 16

#: Slots that the fused kernel keeps accumulators for.
FUSED_SLOTS = 2

_BALANCE = Tile(rows=64, columns=16, warps=4, stages=1)


class Kept:
    """The tensors that a forward writes beside y: h~, gate, probs, f, the balance loss, and its partial sums."""

    def __init__(self, x_TN: Tensor, adapter: Adapter) -> None:
        T, E = x_TN.shape[0], adapter.num_experts
        self.weighted_TR = x_TN.new_empty(T, adapter.rank)
        self.gate_ET = x_TN.new_empty(E, T, dtype=torch.float32)
        self.probs_ET = torch.empty_like(self.gate_ET)
        statistics = x_TN.new_empty if T else x_TN.new_zeros  # without tokens no kernel runs
        self.load_E = statistics(E, dtype=torch.float32)
        self.balance_loss = statistics((), dtype=torch.float32)
        self._x = x_TN

    def partial(self, programs: int) -> Tensor:
        """[programs, 2, E] for the row blocks' sums."""
        return self._x.new_empty(programs, 2, self.load_E.shape[0], dtype=torch.float32)

    def finish_balance(self, partial: Tensor) -> None:
        E = self.load_E.shape[0]
        arguments = {
            "partial_ptr": partial,
            "load_ptr": self.load_E,
            "balance_ptr": self.balance_loss,
            "programs": partial.shape[0],
            "T": self._x.shape[0],
        }
        constants = {"E": E, "E_PAD": padded(E), "BLOCK": _BALANCE.rows}
        launch(finish_balance, (1,) if partial.shape[0] else (0,), _BALANCE, arguments, constants)


def run(
    x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
) -> tuple[Tensor, Tensor, Routing]:
    """``prefill`` of :class:`goat_kernels.backends.base.Passes`."""
    T, M, target = x_TN.shape[0], adapter.lora_B.shape[0], current_target(x_TN.device)
    widths = Widths.of(adapter)
    tile = _fused_tile(x_TN, M, widths, adapter, target)
    # What no kernel holds is refused before anything is allocated.
    check_addresses(adapter)
    if tile is None:
        choose_tile("route_and_prefill.alone", widths.columns, x_TN.dtype.itemsize, target, T)
    adapter = with_contiguous_vectors(adapter)
    y_TM = x_TN.new_empty(T, M)
    kept = Kept(x_TN, adapter)
    packed = pack(adapter, x_TN)
    matrices = operands(adapter, packed)
    if tile is not None:
        _fused(tile, x_TN, adapter, widths, matrices, bias_M, base_output_TM, y_TM, kept)
    else:
        _staged(target, x_TN, adapter, widths, matrices, bias_M, base_output_TM, y_TM, kept)
    routing = Routing(kept.weighted_TR, kept.gate_ET, kept.probs_ET, kept.load_E, packed)
    return y_TM, kept.balance_loss, routing


def _fused_tile(x_TN: Tensor, M: int, widths: Widths, adapter: Adapter, target: Target) -> Tile | None:
    """The fused kernel's tile, or None where it does not serve or would leave more than half of the GPU idle."""
    (T, N), width = x_TN.shape, x_TN.dtype.itemsize
    slots = adapter.top_k if adapter.seed is not None else 1
    if widths.E > FUSED_EXPERTS or slots > FUSED_SLOTS or (T <= FEW_TOKENS and adapter.seed is None):
        return None
    columns = widths.columns + (slots - 1) * widths.E_PAD * widths.D_PAD
    kernel = "fused_forward"
    if adapter.seed is not None:
        kernel += ".dropout"
    elif is_unaligned(x_TN.dtype, (N, M, x_TN.stride(0)), ()):
        kernel += ".unaligned"
    tile = find_tile(kernel, columns, width, target, T)
    if tile is None or (adapter.seed is None and 2 * blocks(T, tile.rows) < target.multiprocessors):
        return None
    return tile


def _fused(
    tile: Tile,
    x_TN: Tensor,
    adapter: Adapter,
    widths: Widths,
    matrices: Operands,
    bias_M: Tensor | None,
    base_output_TM: Tensor | None,
    y_TM: Tensor,
    kept: Kept,
) -> None:
    (T, N), M = x_TN.shape, y_TM.shape[1]
    programs = blocks(T, tile.rows)
    partial = kept.partial(programs)
    target_of_y, kind = onto(bias_M, base_output_TM)
    arguments = {
        "x_ptr": x_TN,
        "A_ptr": matrices.A,
        "router_ptr": matrices.router,
        "A0_ptr": matrices.A0,
        "B_ptr": matrices.B,
        "B0_ptr": matrices.B0,
        "onto_ptr": target_of_y,
        "scaling_E_ptr": adapter.scaling_E,
        "y_ptr": y_TM,
        "weighted_ptr": kept.weighted_TR,
        "gate_ptr": kept.gate_ET,
        "probs_ptr": kept.probs_ET,
        "partial_ptr": partial,
        "T": T,
        "N": N,
        "M": M,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        "stride_onto_t": base_output_TM.stride(0) if kind == "base" else 0,
        "stride_onto_m": base_output_TM.stride(1) if kind == "base" else 1,
        "scaling": adapter.scaling,
        **dropout_arguments(adapter),
    }
    constants = {
        **widths._asdict(),
        "TOP_K": adapter.top_k,
        "PARTS": matrices.parts,
        "L_PAD": max(16, matrices.parts * widths.E_PAD),
        "ONTO": kind,
        "BT": tile.rows,
        "BN": tile.columns,
        "BM": tile.columns,
        "EVEN_N": N % tile.columns == 0,
        "EVEN_M": M % tile.columns == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    launch(fused_forward, (programs,), tile, arguments, constants)
    kept.finish_balance(partial)


def _staged(
    target: Target,
    x_TN: Tensor,
    adapter: Adapter,
    widths: Widths,
    matrices: Operands,
    bias_M: Tensor | None,
    base_output_TM: Tensor | None,
    y_TM: Tensor,
    kept: Kept,
) -> None:
    T, M = y_TM.shape
    width, dropout = x_TN.dtype.itemsize, adapter.seed is not None
    prefills = T <= FEW_TOKENS and not dropout and widths.columns <= PREFILLED_COLUMNS and M <= PREFILLED_FEATURES
    kernel = "route_and_prefill" if prefills else "route_and_prefill.alone"
    tile = choose_tile(kernel, widths.columns, width, target, T, matrices.read_width(with_router=False))
    raw = project_columns(
        x_TN, adapter, matrices, None if dropout else matrices.A, matrices.A0, target, with_router=True
    )
    programs = blocks(T, tile.rows)
    balance = "one" if programs == 1 else "all" if T <= FEW_TOKENS else ""
    partial = kept.partial(programs)
    residual_TR0 = None if prefills or not widths.R0 else x_TN.new_empty(T, widths.R0)
    target_of_y, kind = onto(bias_M, base_output_TM)
    logits = matrices.parts * widths.E_PAD
    summed = max(tile.rows * (logits + widths.columns), FEW_TOKENS * logits if balance == "all" else 0)
    arguments = {
        "raw_ptr": raw,
        "B_ptr": matrices.B,
        "B0_ptr": matrices.B0,
        "onto_ptr": target_of_y,
        "scaling_E_ptr": adapter.scaling_E,
        "y_ptr": y_TM,
        "weighted_ptr": kept.weighted_TR,
        "residual_ptr": residual_TR0,
        "gate_ptr": kept.gate_ET,
        "probs_ptr": kept.probs_ET,
        "partial_ptr": partial,
        "load_ptr": kept.load_E,
        "balance_ptr": kept.balance_loss,
        "T": T,
        "M": M,
        "splits": raw.shape[0],
        "stride_onto_t": base_output_TM.stride(0) if kind == "base" else 0,
        "stride_onto_m": base_output_TM.stride(1) if kind == "base" else 1,
        "scaling": adapter.scaling,
    }
    constants = {
        **widths._asdict(),
        "TOP_K": adapter.top_k,
        "PARTS": matrices.parts,
        "ONTO": kind,
        "WITH_HIDDEN": not dropout,
        "WITH_PREFILL": prefills,
        "BALANCE": balance,
        "MOST_TOKENS": FEW_TOKENS,
        "SPLIT_STAGES": split_stages(raw.shape[0], summed, target),
        "BT": tile.rows,
        "BM": tile.columns,
        "EVEN_M": M % tile.columns == 0,
        "PRECISION": precision(x_TN.dtype),
    }
    launch(route_and_prefill, (programs, blocks(M, tile.columns) if prefills else 1), tile, arguments, constants)
    if not balance:
        kept.finish_balance(partial)
    if dropout:
        _dropped(target, x_TN, adapter, matrices, kept)
    if not prefills:
        expand(
            y_TM,
            kept.weighted_TR,
            matrices.B.t(),
            residual_TR0,
            None if matrices.B0 is None else matrices.B0.t(),
            experts=widths.E,
            onto_tensor=target_of_y,
            onto_kind=kind,
        )


def project_columns(
    x_TN: Tensor,
    adapter: Adapter,
    matrices: Operands,
    W1: Tensor | None,
    W2: Tensor | None,
    target: Target,
    *,
    with_router: bool,
) -> Tensor:
    """float32 [splits, T, C]: partial sums of x [router parts; W1; W2]^T; W1 [C1, N] and W2 [C2, N] of any strides."""
    T, N = x_TN.shape
    if W1 is None:
        W1, W2 = W2, None
    C1, C2 = (0 if W is None else W.shape[0] for W in (W1, W2))
    E, parts = adapter.num_experts, matrices.parts if with_router else 0
    read_width = matrices.read_width(with_router=with_router)
    tile = choose_tile("project", parts * E + C1 + C2, x_TN.dtype.itemsize, target, T, read_width)
    row_blocks = blocks(T, tile.rows)
    column_blocks = blocks(parts * E, tile.rank) + blocks(C1 + C2, tile.rank)
    least_steps = 2 if T <= FEW_TOKENS else 4
    splits, split_steps = splits_of(
        row_blocks * column_blocks, blocks(N, tile.columns), target, least_steps, MOST_SPLITS
    )
    raw = x_TN.new_empty(splits, T, parts * E + C1 + C2, dtype=torch.float32)
    arguments = {
        "x_ptr": x_TN,
        "router_ptr": matrices.router if with_router else None,
        "W1_ptr": W1,
        "W2_ptr": W2,
        "out_ptr": raw,
        "T": T,
        "N": N,
        "split_steps": split_steps,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        "stride_1c": W1.stride(0) if C1 else 0,
        "stride_1n": W1.stride(1) if C1 else 1,
        "stride_2c": W2.stride(0) if C2 else 0,
        "stride_2n": W2.stride(1) if C2 else 1,
    }
    constants = {
        "E": E,
        "STORED_PARTS": matrices.stored_parts,
        "PARTS": parts,
        "C1": C1,
        "C2": C2,
        "BT": tile.rows,
        "BN": tile.columns,
        "BC": tile.rank,
        "PRECISION": precision(x_TN.dtype),
    }
    launch(project, (row_blocks, column_blocks, splits), tile, arguments, constants)
    return raw


def _dropped(target: Target, x_TN: Tensor, adapter: Adapter, matrices: Operands, kept: Kept) -> None:
    """h~ under dropout, from the gates that ``route_and_prefill`` has written."""
    T, N = x_TN.shape
    kernel = "dropped_hidden"
    if is_unaligned(x_TN.dtype, (N, x_TN.stride(0)), ()):
        kernel += ".unaligned"
    tile = choose_tile(kernel, adapter.rank, x_TN.dtype.itemsize, target, T)
    arguments = {
        "x_ptr": x_TN,
        "A_ptr": matrices.A,
        "gate_ptr": kept.gate_ET,
        "scaling_E_ptr": adapter.scaling_E,
        "weighted_ptr": kept.weighted_TR,
        "T": T,
        "N": N,
        "stride_xt": x_TN.stride(0),
        "stride_xn": x_TN.stride(1),
        "scaling": adapter.scaling,
        **dropout_arguments(adapter),
    }
    constants = {
        "E": adapter.num_experts,
        "D": adapter.expert_rank,
        "TOP_K": adapter.top_k,
        "BT": tile.rows,
        "BN": tile.columns,
        "BC": tile.rank,
        "PRECISION": precision(x_TN.dtype),
    }
    launch(dropped_hidden, (blocks(T, tile.rows), blocks(adapter.rank, tile.rank)), tile, arguments, constants)
