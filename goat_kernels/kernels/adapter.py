"""The adapter as the kernels read it: its widths in registers, and its matrices in the compute dtype.

Where the adapter's dtype is another than x's (float32 adapters over a half-precision base) it is packed: cast once per
forward, read by every row block, kept for the backward. The router becomes two parts, high and low, whose sum is the
float32 weight to 16 bits or more: the high part alone picks other experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from goat_kernels.dropout import keep_scale, keep_threshold
from goat_kernels.kernels.common import LOW_PART_SCALE, cast, padded
from goat_kernels.kernels.launch import Launch, blocks
from goat_kernels.kernels.tiles import Tile
from goat_kernels.passes import Adapter

#: Up to here (decoding) a forward reads the adapter as it is and takes two launches; above, it is packed if need be.
FEW_TOKENS = 64

_PACK = Tile(rows=16, features=1024, warps=4, stages=1)
_LOW_PART_SCALE = tl.constexpr(LOW_PART_SCALE)


class Widths(NamedTuple):
    """E, D, R0 and the powers of two that hold an adapter's columns in registers (``common.py``)."""

    E: int
    D: int
    R0: int
    E_PAD: int
    D_PAD: int
    R0_PAD: int

    @classmethod
    def of(cls, adapter: Adapter, *, with_residual: bool = True) -> Widths:
        D_PAD = padded(adapter.expert_rank)
        return cls(
            E=adapter.num_experts,
            D=adapter.expert_rank,
            R0=adapter.residual_rank if with_residual else 0,
            E_PAD=padded(adapter.num_experts, minimum=max(16 // D_PAD, 1)),  # padding D would scatter the columns
            D_PAD=D_PAD,
            R0_PAD=padded(adapter.residual_rank, minimum=16),
        )

    @property
    def columns(self) -> int:
        """Hidden and residual columns that a program accumulates when it holds them all."""
        return self.E_PAD * self.D_PAD + (self.R0_PAD if self.R0 else 0)


class Operands(NamedTuple):
    """The adapter's matrices, contiguous: packed in the compute dtype, or as they are.

    router is [stored_parts * E, N], the high and the low part where 2; ``parts`` is how many its product with x needs.
    """

    A: Tensor
    router: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None
    stored_parts: int
    parts: int

    def read_itemsize(self, *, with_router: bool) -> int:
        """Bytes of the widest element among them, as they are read."""
        matrices = [self.A, self.B, self.A0, self.B0] + [self.router] * with_router
        return max(matrix.element_size() for matrix in matrices if matrix is not None)


@triton.jit
def pack_adapter(
    A_ptr, router_ptr, B_ptr, A0_ptr, B0_ptr, out_ptr,
    size_A, size_router, size_B, size_A0, size_B0,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK elements of each of A, router (its PARTS: high, low), B, A0, B0 in turn.

    Reads the five matrices, contiguous, by their sizes in elements (0 for an absent one, whose pointer is None).
    Writes out_ptr compute: the five one after the other, each beginning at a multiple of BLOCK.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    out = out_ptr + program.to(tl.int64) * BLOCK + lane
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first_router = tl.cdiv(size_A, BLOCK)
    first_B = first_router + tl.cdiv(PARTS * size_router, BLOCK)
    first_A0 = first_B + tl.cdiv(size_B, BLOCK)
    first_B0 = first_A0 + tl.cdiv(size_A0, BLOCK)
    if program < first_router:
        index = program * BLOCK + lane
        tl.store(out, cast(tl.load(A_ptr + index, mask=index < size_A, other=0.0), dtype))
    elif program < first_B:
        index = (program - first_router) * BLOCK + lane
        is_high = index < size_router
        source = tl.where(is_high, index, index - size_router)
        whole = tl.load(router_ptr + source, mask=index < PARTS * size_router, other=0.0).to(tl.float32)
        high = cast(whole, dtype)
        low = cast((whole - high.to(tl.float32)) * _LOW_PART_SCALE, dtype)
        tl.store(out, tl.where(is_high, high, low))
    elif program < first_A0:
        index = (program - first_B) * BLOCK + lane
        tl.store(out, cast(tl.load(B_ptr + index, mask=index < size_B, other=0.0), dtype))
    elif program < first_B0:
        if A0_ptr is not None:
            index = (program - first_A0) * BLOCK + lane
            tl.store(out, cast(tl.load(A0_ptr + index, mask=index < size_A0, other=0.0), dtype))
    else:
        if B0_ptr is not None:
            index = (program - first_B0) * BLOCK + lane
            tl.store(out, cast(tl.load(B0_ptr + index, mask=index < size_B0, other=0.0), dtype))


def pack(adapter: Adapter, packed: Tensor) -> list[Launch]:
    """The launch that fills ``packed``, of :func:`packed_numel`; none where the matrices are read as they are."""
    if not packed.numel():
        return []
    A, router, B, A0, B0 = (None if matrix is None else matrix.contiguous() for matrix in _matrices(adapter))
    arguments = {"A_ptr": A, "router_ptr": router, "B_ptr": B, "A0_ptr": A0, "B0_ptr": B0, "out_ptr": packed}
    for name, matrix in (("A", A), ("router", router), ("B", B), ("A0", A0), ("B0", B0)):
        arguments[f"size_{name}"] = 0 if matrix is None else matrix.numel()
    constants = {"PARTS": _router_parts(adapter, packed.dtype), "BLOCK": _PACK.features}
    return [Launch(pack_adapter, (packed.numel() // _PACK.features,), arguments, constants, _PACK)]


def packed_numel(adapter: Adapter, compute: torch.dtype, T: int) -> int:
    """Elements of the packed adapter for T tokens of dtype ``compute``; 0 where the matrices are read as they are.

    Without a branch on T, which under torch.compile may be a symbol whose value only the data decide.
    """
    if all(matrix is None or matrix.dtype == compute for matrix in _matrices(adapter)):
        return 0
    read_as_they_are = FEW_TOKENS if adapter.seed is None else 0
    is_packed = torch.sym_min((T + FEW_TOKENS - 1 - read_as_they_are) // FEW_TOKENS, 1)
    whole = sum(blocks(size, _PACK.features) for size in _packed_sizes(adapter, compute)) * _PACK.features
    return whole * torch.sym_max(is_packed, 0)


def operands(adapter: Adapter, packed: Tensor) -> Operands:
    """The matrices in ``packed``, whose dtype is x's, or the adapter's own where that is empty."""
    parts = _router_parts(adapter, packed.dtype)
    if not packed.numel():
        contiguous = (None if matrix is None else matrix.contiguous() for matrix in _matrices(adapter))
        return Operands(*contiguous, stored_parts=1, parts=parts)
    views, offset = [], 0
    for matrix, size in zip(_matrices(adapter), _packed_sizes(adapter, packed.dtype), strict=True):
        if matrix is None:
            views.append(None)
        else:
            columns = matrix.shape[1]
            views.append(packed.as_strided((size // max(columns, 1), columns), (columns, 1), offset))
        offset += blocks(size, _PACK.features) * _PACK.features
    return Operands(*views, stored_parts=parts, parts=parts)


def _matrices(adapter: Adapter) -> tuple[Tensor | None, ...]:
    """A, router, B, A0, B0: the order in which they are packed.

    The pair comes last, because a backward without a gradient of x does not have it.
    """
    return adapter.lora_A, adapter.router, adapter.lora_B, adapter.residual_A, adapter.residual_B


def _packed_sizes(adapter: Adapter, compute: torch.dtype) -> list[int]:
    """Elements of each packed matrix, 0 for an absent one."""
    sizes = [0 if matrix is None else matrix.numel() for matrix in _matrices(adapter)]
    sizes[1] *= _router_parts(adapter, compute)
    return sizes


def _router_parts(adapter: Adapter, compute: torch.dtype) -> int:
    """A half-precision x meets a wider router as a high and a low part."""
    return 2 if compute.itemsize == 2 and adapter.router.dtype != compute else 1


def check_addresses(adapter: Adapter) -> None:
    """Kernels address the adapter's matrices, and sums of their gradients, in 32 bits; x, dY, y and dX in 64.

    Raises:
        ValueError: a matrix has 2^31 elements or more (lora_A together with both parts of the router).
    """
    sizes = {
        "lora_A and router": adapter.lora_A.numel() + 2 * adapter.router.numel(),
        "lora_B": adapter.lora_B.numel(),
        "residual[0]": 0 if adapter.residual_A is None else adapter.residual_A.numel(),
        "residual[1]": 0 if adapter.residual_B is None else adapter.residual_B.numel(),
    }
    for name, size in sizes.items():
        if size >= 2**31:
            raise ValueError(
                f"{name}: {size} elements, and the Triton kernels address fewer than 2^31; use backend='torch'"
            )


def scaling_arguments(adapter: Adapter) -> dict[str, Any]:
    """s, as one number or for each expert."""
    scaling_E = adapter.scaling_E
    return {"scaling_E_ptr": None if scaling_E is None else scaling_E.contiguous(), "scaling": adapter.scaling}


def dropout_arguments(adapter: Adapter | None) -> dict[str, Any]:
    """What kernels that drop need; ``seed_ptr`` is None without dropout, and where nothing is dropped (None)."""
    if adapter is None or adapter.seed is None:
        return {"seed_ptr": None, "keep_threshold": 0, "keep_scale": 1.0}
    threshold, scale = keep_threshold(adapter.dropout_p), keep_scale(adapter.dropout_p)
    return {"seed_ptr": adapter.seed.contiguous(), "keep_threshold": threshold, "keep_scale": scale}


def onto_arguments(bias_M: Tensor | None, base_output_TM: Tensor | None) -> tuple[dict[str, Any], str]:
    """(what y is added to, its name ONTO in the kernels); without either y goes onto nothing."""
    if base_output_TM is not None:
        stride_t, stride_m = base_output_TM.stride()
        return {"onto_ptr": base_output_TM, "stride_onto_t": stride_t, "stride_onto_m": stride_m}, "base"
    bias_M = None if bias_M is None else bias_M.contiguous()
    return {"onto_ptr": bias_M, "stride_onto_t": 0, "stride_onto_m": 1}, "" if bias_M is None else "bias"


def is_unaligned(compute: torch.dtype, widths: tuple[int, ...], ranks: tuple[int, ...]) -> bool:
    """Whether the compiler cannot tell that rows of half-precision matrices begin at multiples of 16 bytes.

    Args:
        compute: their dtype.
        widths: N or M of those that a kernel reads or writes: of a run-time number Triton knows whether 16 divides it.
        ranks: R and R0, which are constants.
    """
    return compute.itemsize == 2 and (any(width % 16 for width in widths) or any(rank % 8 for rank in ranks))
