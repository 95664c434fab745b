"""The adapter as the kernels read it: its widths in registers, its matrices in the compute dtype."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_kernels.backends.base import Adapter
from goat_kernels.backends.dropout import keep_scale, keep_threshold
from goat_kernels.kernels.common import padded
from goat_kernels.kernels.configs import Target
from goat_kernels.kernels.launch import blocks, launch
from goat_kernels.kernels.pack import pack_adapter
from goat_kernels.kernels.tiles import Tile

#: Up to here (decoding) a forward reads the adapter as it is and takes two launches; above, it is packed if need be.
FEW_TOKENS = 64

#: The most splits of a product that is short of programs: more would fill the GPU better, and take longer to add up.
MOST_SPLITS = 32

#: See :func:`split_stages`.
FEW_SPLITS, MOST_SPLIT_STAGES = 4, 8

#: The kernels that go through memory element by element have nothing to choose.
ELEMENTWISE = Tile(rows=16, columns=1024, warps=4, stages=1)


class Widths(NamedTuple):
    """E, D, R0 and the powers of two that hold an adapter's columns in registers (``kernels/routing.py``)."""

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
    """The adapter's matrices: packed in the compute dtype, or as they are.

    router is [stored_parts * E, N], the high and the low part where 2; ``parts`` is how many its product with x needs.
    """

    A: Tensor
    router: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None
    stored_parts: int
    parts: int

    def read_width(self, *, with_router: bool) -> int:
        """Bytes of the widest element among them, as they are read."""
        matrices = [self.A, self.B, self.A0, self.B0] + [self.router] * with_router
        return max(matrix.element_size() for matrix in matrices if matrix is not None)


def router_parts(adapter: Adapter, compute: torch.dtype) -> int:
    """A half-precision x meets a wider router as a high and a low part."""
    return 2 if compute.itemsize == 2 and adapter.router.dtype != compute else 1


def _matrices(adapter: Adapter) -> tuple[Tensor | None, ...]:
    """A, router, B, A0, B0: the order in which they are packed.

    The pair comes last, because a backward without a gradient of x does not have it.
    """
    return adapter.lora_A, adapter.router, adapter.lora_B, adapter.residual_A, adapter.residual_B


def _packed_sizes(adapter: Adapter, compute: torch.dtype) -> list[int]:
    """Elements of each packed matrix, 0 for an absent one."""
    sizes = [0 if matrix is None else matrix.numel() for matrix in _matrices(adapter)]
    sizes[1] *= router_parts(adapter, compute)
    return sizes


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


def packed_numel(adapter: Adapter, compute: torch.dtype, T: int) -> int:
    """Elements of the packed adapter for T tokens of dtype ``compute``; 0 where the matrices are read as they are.

    Without a branch on T, which under torch.compile may be a symbol whose value only the data decide.
    """
    if all(matrix is None or matrix.dtype == compute for matrix in _matrices(adapter)):
        return 0
    read_as_they_are = FEW_TOKENS if adapter.seed is None else 0
    is_packed = torch.sym_min((T + FEW_TOKENS - 1 - read_as_they_are) // FEW_TOKENS, 1)
    whole = sum(blocks(size, ELEMENTWISE.columns) for size in _packed_sizes(adapter, compute)) * ELEMENTWISE.columns
    return whole * torch.sym_max(is_packed, 0)


def pack(adapter: Adapter, x_TN: Tensor) -> Tensor:
    """The matrices in x's dtype one after the other, or an empty tensor where they are read as they are."""
    packed = x_TN.new_empty(packed_numel(adapter, x_TN.dtype, x_TN.shape[0]))
    if packed.numel():
        A, router, B, A0, B0 = (None if matrix is None else matrix.contiguous() for matrix in _matrices(adapter))
        arguments = {"A_ptr": A, "router_ptr": router, "B_ptr": B, "A0_ptr": A0, "B0_ptr": B0, "out_ptr": packed}
        for name, matrix in (("A", A), ("router", router), ("B", B), ("A0", A0), ("B0", B0)):
            arguments[f"size_{name}"] = 0 if matrix is None else matrix.numel()
        constants = {"PARTS": router_parts(adapter, x_TN.dtype), "BLOCK": ELEMENTWISE.columns}
        launch(pack_adapter, (packed.numel() // ELEMENTWISE.columns,), ELEMENTWISE, arguments, constants)
    return packed


def operands(adapter: Adapter, packed: Tensor) -> Operands:
    """The matrices in ``packed``, whose dtype is x's, or the adapter's own where that is empty."""
    compute = packed.dtype
    parts = router_parts(adapter, compute)
    if not packed.numel():
        contiguous = (None if matrix is None else matrix.contiguous() for matrix in _matrices(adapter))
        return Operands(*contiguous, stored_parts=1, parts=parts)
    views, offset = [], 0
    for matrix, size in zip(_matrices(adapter), _packed_sizes(adapter, compute), strict=True):
        if matrix is None:
            views.append(None)
        else:
            columns = matrix.shape[1]
            views.append(packed.as_strided((size // max(columns, 1), columns), (columns, 1), offset))
        offset += blocks(size, ELEMENTWISE.columns) * ELEMENTWISE.columns
    return Operands(*views, stored_parts=parts, parts=parts)


def precision(compute: torch.dtype) -> str:
    """How float32 operands are multiplied: by PyTorch's own switch. The router's forward is always "ieee"."""
    if compute == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def is_unaligned(compute: torch.dtype, widths: tuple[int, ...], ranks: tuple[int, ...]) -> bool:
    """Whether the compiler cannot tell that rows of half-precision matrices begin at multiples of 16 bytes.

    Args:
        compute: their dtype.
        widths: N or M of those that a kernel reads or writes: of a run-time number Triton knows whether 16 divides it.
        ranks: R and R0, which are constants.
    """
    return compute.itemsize == 2 and (any(width % 16 for width in widths) or any(rank % 8 for rank in ranks))


def splits_of(
    programs: int, steps: int, target: Target, least_steps: int = 4, most_splits: int | None = None, fill: int = 2
) -> tuple[int, int]:
    """(splits, steps of each) of a loop: enough to fill the GPU ``fill`` times, of ``least_steps`` or more."""
    most = most_splits or steps
    wanted = max(1, min(fill * target.multiprocessors // max(programs, 1), steps // least_steps, most))
    per_split = max(1, blocks(steps, wanted))
    return max(1, blocks(steps, per_split)), per_split


def split_stages(splits: int, elements: int, target: Target) -> int:
    """How deep a loop that adds up splits is pipelined: loads are that many splits, less one, ahead of the additions.

    Without that every split would wait for a round trip through memory. The splits under way, of ``elements``
    float32 each, may take a third of the shared memory. A few splits do not pay for the way through it, nor do large
    ones, whose own loads are many.
    """
    ahead = min(target.shared_bytes // 3 // (4 * elements), MOST_SPLIT_STAGES - 1)
    return 1 if splits <= FEW_SPLITS or ahead < 3 else 1 + ahead


def dropout_arguments(adapter: Adapter) -> dict[str, Any]:
    """What kernels that drop need; ``seed_ptr`` is None without dropout."""
    return {
        "seed_ptr": adapter.seed,
        "keep_threshold": keep_threshold(adapter.dropout_p),
        "keep_scale": keep_scale(adapter.dropout_p),
    }


def onto(bias_M: Tensor | None, base_output_TM: Tensor | None) -> tuple[Tensor | None, str]:
    """What the prefill of y is added to, and its name in the kernels."""
    if base_output_TM is not None:
        return base_output_TM, "base"
    return (None, "") if bias_M is None else (bias_M.contiguous(), "bias")


def with_contiguous_vectors(adapter: Adapter) -> Adapter:
    """The same with a scaling per expert and a seed that can be read without strides."""
    if adapter.scaling_E is not None:
        adapter = adapter._replace(scaling_E=adapter.scaling_E.contiguous())
    return adapter if adapter.seed is None else adapter._replace(seed=adapter.seed.contiguous())


def is_current(device: torch.device) -> bool:
    """Whether Triton would launch on ``device``: it launches on the current one."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which launches go to the tensor's device."""
    return contextlib.nullcontext() if is_current(tensor.device) else torch.cuda.device(tensor.device)
