"""How an adapter's tensors are made and kept: their shapes from the settings alone, and where they start."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from goat_kernels.initialisation import InitialAdapter, adapter_scaling
from goat_kernels.settings import AdapterSettings


class Float32BufferDict(BufferDict):
    """Buffers that move with the module but stay float32: rounding s to bfloat16 would shift every output."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != torch.float32:
                self._buffers[name] = before[name].to(buffer.device)
        return self


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of one adapter.

    lora_A [R, N] ([D, N] for hydralora), lora_B [M, R], router [E, N]; scaling a float or float32 [E]; residual a pair
    ([R, N], [M, R]) or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    router: Tensor
    scaling: float | Tensor
    residual: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, initial: InitialAdapter) -> AdapterTensors:
        return cls(initial.lora_A, initial.lora_B, initial.router, initial.scaling, initial.residual)


def pending_tensors(
    settings: AdapterSettings, N: int, M: int, *, has_residual: bool, device: torch.device, dtype: torch.dtype
) -> AdapterTensors:
    """Tensors of the right shapes that wait to be loaded: NaN, which no adapter worth loading has."""

    def nan(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, math.nan, device=device, dtype=dtype)

    per_expert = settings.per_expert_scaling
    return AdapterTensors(
        lora_A=nan(_rows_of_A(settings), N),
        lora_B=nan(M, settings.r),
        router=nan(settings.num_experts, N),
        scaling=nan(settings.num_experts, dtype=torch.float32) if per_expert else adapter_scaling(settings, N, None),
        residual=(nan(settings.r, N), nan(M, settings.r)) if has_residual else None,
    )


def random_tensors(
    settings: AdapterSettings, N: int, M: int, *, has_residual: bool, device: torch.device, dtype: torch.dtype
) -> AdapterTensors:
    """What ``init_weights=False`` asks for: random A and B, s B of the size that PEFT's LoRA has there, W_res = 0.

    The same tensors exist as for a real start, so that either loads the other's.
    """

    def uniform(*shape: int, bound: float) -> Tensor:
        return torch.empty(shape, dtype=dtype).uniform_(-bound, bound).to(device)

    zeros = functools.partial(torch.zeros, device=device, dtype=dtype)

    # Without singular values every expert gets the scaling of the first.
    per_expert = settings.per_expert_scaling
    rule = "goat" if per_expert else settings.scaling
    scaling = adapter_scaling(AdapterSettings(**{**vars(settings), "scaling": rule}), N, None)
    return AdapterTensors(
        lora_A=uniform(_rows_of_A(settings), N, bound=1 / math.sqrt(N)),
        lora_B=uniform(M, settings.r, bound=1 / (scaling * math.sqrt(settings.r))),
        router=uniform(settings.num_experts, N, bound=1 / math.sqrt(N)),
        scaling=torch.full((settings.num_experts,), scaling, device=device) if per_expert else scaling,
        residual=(zeros(settings.r, N), zeros(M, settings.r)) if has_residual else None,
    )


def _rows_of_A(settings: AdapterSettings) -> int:
    return settings.expert_rank if settings.init == "hydralora" else settings.r
