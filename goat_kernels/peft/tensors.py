"""How an adapter's tensors are made and kept: their shapes from the settings alone, and where they start."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from goat_kernels.initialisation import InitialAdapter, adapter_scaling, draw_router
from goat_kernels.settings import AdapterSettings


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

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that there are."""
        residual_A, residual_B = self.residual or (None, None)
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "router": self.router}
        named |= {"residual_A": residual_A, "residual_B": residual_B, "scaling": self.scaling}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def pending_tensors(
    settings: AdapterSettings, N: int, M: int, *, has_residual: bool, device: torch.device, dtype: torch.dtype
) -> AdapterTensors:
    """Placeholders of the right shapes, for tensors that are to be loaded: NaN, so that none goes unnoticed."""

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


def start_from_pair(
    settings: AdapterSettings, residual_A: Tensor, residual_B: Tensor, scaling: float | Tensor
) -> AdapterTensors:
    """Where an adapter with this frozen pair started, without a second SVD: A0 is in the pair, and so is
    coefficient * s_i * B0_i; the router is drawn anew.

    Args:
        settings: of both adapters.
        residual_A, residual_B: [R, N] and [M, R], copied into the new adapter.
        scaling: s, a float or float32 [E].
    """
    E = settings.num_experts
    s_E = scaling if isinstance(scaling, Tensor) else torch.full((E,), scaling)
    factor_R = (settings.w_res_coefficient * s_E.to(residual_B)).repeat_interleave(settings.expert_rank)
    return AdapterTensors(
        lora_A=residual_A.clone(),
        lora_B=residual_B / factor_R,
        router=draw_router(E, residual_A.shape[1], residual_A.device, residual_A.dtype),
        scaling=scaling.clone() if isinstance(scaling, Tensor) else scaling,
        residual=(residual_A.clone(), residual_B.clone()),
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
