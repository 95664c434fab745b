"""The prefill of a wide output from hidden columns, for both directions: the host side of ``kernels/expand.py``."""

from __future__ import annotations

from torch import Tensor

from goat_kernels.backends.base import Adapter
from goat_kernels.backends.triton_backend.operands import dropout_arguments, is_unaligned, precision
from goat_kernels.kernels.common import padded
from goat_kernels.kernels.configs import choose_tile, current_target
from goat_kernels.kernels.expand import expand_columns
from goat_kernels.kernels.launch import blocks, launch


def expand(
    out_TN: Tensor,
    hidden_TR: Tensor,
    W: Tensor,
    residual_TR0: Tensor | None,
    W0: Tensor | None,
    *,
    experts: int,
    logits_ET: Tensor | None = None,
    router: Tensor | None = None,
    onto_tensor: Tensor | None = None,
    onto_kind: str = "",
    dropped: Adapter | None = None,
    gate_ET: Tensor | None = None,
) -> None:
    """Write out = hidden W [+ residual W0] [+ logits router] [+ what it goes onto].

    W [R, N] and W0 [R0, N] may have any strides.

    ``dropped``: the adapter whose dropout masks hidden's share, with ``gate_ET``; None without dropout.
    """
    T, N = out_TN.shape
    if T == 0:
        return
    R, R0 = hidden_TR.shape[1], 0 if residual_TR0 is None else residual_TR0.shape[1]
    target = current_target(out_TN.device)
    kernel = "expand_columns"
    if dropped is not None:
        kernel += ".dropout"
    if is_unaligned(out_TN.dtype, (N,), (R, R0)):
        kernel += ".unaligned"
    read_width = max(matrix.element_size() for matrix in (W, W0, router) if matrix is not None)
    tile = choose_tile(kernel, R + R0, out_TN.element_size(), target, T, read_width)
    row_blocks, steps = blocks(T, tile.rows), blocks(N, tile.columns)
    chunks = max(1, min(2 * target.multiprocessors // max(row_blocks, 1), steps))
    chunk_steps = max(1, blocks(steps, chunks))
    is_base = onto_kind == "base"
    arguments = {
        "hidden_ptr": hidden_TR,
        "W_ptr": W,
        "residual_ptr": residual_TR0,
        "W0_ptr": W0 if R0 else None,
        "logits_ptr": logits_ET,
        "router_ptr": router,
        "onto_ptr": onto_tensor,
        "gate_ptr": None if dropped is None else gate_ET,
        "out_ptr": out_TN,
        "T": T,
        "N": N,
        "chunk_steps": chunk_steps,
        "stride_wc": W.stride(0),
        "stride_wn": W.stride(1),
        "stride_0c": W0.stride(0) if R0 else 0,
        "stride_0n": W0.stride(1) if R0 else 1,
        "stride_onto_t": onto_tensor.stride(0) if is_base else 0,
        "stride_onto_n": onto_tensor.stride(1) if is_base else 1,
        **(NO_DROPOUT if dropped is None else dropout_arguments(dropped)),
    }
    constants = {
        "E": experts,
        "R": R,
        "R0": R0,
        "TOP_K": 1 if dropped is None else dropped.top_k,
        "E_DOT": padded(experts, 16),
        "ONTO": onto_kind,
        "BT": tile.rows,
        "BN": tile.columns,
        "BC": min(padded(R, 16), tile.rank),
        "BC0": min(padded(R0, 16), tile.rank),
        "PRECISION": precision(out_TN.dtype),
    }
    launch(expand_columns, (row_blocks, blocks(steps, chunk_steps)), tile, arguments, constants)


#: The arguments of ``dropout_arguments`` for a launch that drops nothing.
NO_DROPOUT = {"seed_ptr": None, "keep_threshold": 0, "keep_scale": 1.0}
