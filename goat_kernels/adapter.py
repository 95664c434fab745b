"""One adapter: its settings, its tensors, its routed product, and what it starts from where there is no SVD.

``GoatLinear`` is an :class:`AdapterModule` around a weight of its own; a PEFT layer holds one for each adapter name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goat_kernels.functional import RoutedOutput, routed_linear
from goat_kernels.initialisation import adapter_scaling, draw_uniform
from goat_kernels.settings import AdapterSettings

PARAMETERS = ("lora_A", "lora_B", "router")
BUFFERS = ("residual_A", "residual_B", "scaling")


class AdapterModule(nn.Module):
    """The tensors of one adapter, and what a call does with them.

    Attributes:
        settings: the hyper-parameters.
        balance_coefficient: weight of the balance loss, injected in backward while training.
        lora_A: [R, N]; [D, N] for ``hydralora``, whose experts share it.
        lora_B: [M, R].
        router: [E, N].
        residual_A, residual_B: the frozen pair [R, N], [M, R] with W_res = B0 A0, or None where W_res is zero.
        scaling: s, a float, or a float32 buffer [E] for ``scaling="goat_s"``.
    """

    def _register_adapter(self, settings: AdapterSettings, tensors: Mapping[str, Tensor]) -> None:
        """Register ``tensors``, whose names and shapes are those of ``settings.shapes``."""
        self.settings = settings
        self.balance_coefficient = settings.balance_coefficient
        for name in PARAMETERS:
            self.register_parameter(name, nn.Parameter(tensors[name]))
        self.register_buffer("residual_A", tensors.get("residual_A"))
        self.register_buffer("residual_B", tensors.get("residual_B"))
        if settings.per_expert_scaling:
            self.register_buffer("scaling", tensors["scaling"])
        else:
            self.scaling = adapter_scaling(settings, self.lora_A.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that the adapter has."""
        named = {**self._parameters, **self._buffers}
        return {name: named[name] for name in (*PARAMETERS, *BUFFERS) if named.get(name) is not None}

    @torch.no_grad()
    def start(self, values: Mapping[str, Tensor]) -> None:
        """Write ``values`` (name -> tensor) in place of whatever is there."""
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def expand(self, lora_A: Tensor) -> Tensor:
        """lora_A [R, N] from the parameter: ``hydralora`` repeats its one [D, N] for every expert."""
        return lora_A.repeat(self.settings.num_experts, 1) if self.settings.init == "hydralora" else lora_A

    def for_call(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor]:
        """(lora_A, lora_B, router, residual_A, residual_B, scaling) for one call."""
        parameters, buffers = self._parameters, self._buffers  # past nn.Module's slower look-up of attributes
        trained = (parameters["lora_A"], parameters["lora_B"], parameters["router"])
        return (*trained, buffers["residual_A"], buffers["residual_B"], self.scaling)

    def routed(self, x: Tensor, **of_call: Any) -> RoutedOutput:
        """The adapter on x [..., N].

        ``of_call``: weight, bias, base_output, balance_scale and backend of ``routed_linear``.
        """
        settings = self.settings
        lora_A, lora_B, router, residual_A, residual_B, scaling = self.for_call()
        with_residual = residual_A is not None and settings.residual == "path"
        return routed_linear(
            x,
            self.expand(lora_A),
            lora_B,
            router,
            scaling=scaling,
            top_k=settings.top_k,
            dropout_p=settings.dropout if self.training else 0.0,
            residual=(residual_A, residual_B) if with_residual else None,
            balance_coefficient=self._injected(router),
            **of_call,
        )

    def _injected(self, router: Tensor) -> float:
        """The balance coefficient where a call is to inject the balance loss: in training, where the router learns.

        Raises:
            RuntimeError: torch.compile traces a transform of torch.func, and would lose it without a word.
        """
        if not (self.balance_coefficient and self.training and torch.is_grad_enabled()):
            return 0.0
        if router.requires_grad:
            return self.balance_coefficient
        # In a transform that is compiled the router seems to require no gradient.
        if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.compile would lose the balance loss within a transform of torch.func, because it does not trace "
                "a backward there: compile in eval mode or with balance_coefficient=0, or leave the transform eager"
            )
        return 0.0

    def _apply(self, fn, recurse: bool = True):
        exact = self.scaling
        super()._apply(fn, recurse)
        if isinstance(exact, Tensor) and self.scaling.dtype != exact.dtype:
            self.scaling = exact.to(self.scaling.device)  # rounding s to bfloat16 would shift every output
        return self


# --- residual="fold" ------------------------------------------------------------------------------------------------


class FoldedWeight:
    """Overwrites a weight with W0 - B0 A0 in place and restores W0 exactly.

    The Parameter object stays the same, so optimisers, tied references and hooks keep seeing it. W0 is kept as a copy
    on the CPU: a subtraction in half precision cannot be undone by an addition.

    Attributes:
        weight: the parameter: float16, bfloat16, float32 or float64, on a real device.
        original: W0 [M, N] on the CPU while the weight holds W0 - W_res, else None.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.original: Tensor | None = None

    @property
    def folded(self) -> bool:
        """Whether the weight holds W0 - W_res."""
        return self.original is not None

    @torch.no_grad()
    def fold(self, A0: Tensor, B0: Tensor) -> None:
        """Overwrite the weight, which holds W0, with W0 - B0 A0, computed in float32 or better and rounded once.

        A0 [R', N]; B0 [M, R'], with every factor (s, 1/E) inside. RuntimeError on a folded weight: W0 would be lost.
        """
        if self.folded:
            raise RuntimeError("the weight is folded already; restore() it before folding another pair")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        W_res = B0.to(self.weight.device, wide) @ A0.to(self.weight.device, wide)
        self.original = self.weight.detach().to("cpu", copy=True)
        self.weight.copy_(self.weight.to(wide) - W_res)

    @torch.no_grad()
    def restore(self) -> None:
        """Write W0 back; does nothing on a weight that is not folded."""
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None


# --- tensors to start from ----------------------------------------------------------------------------------------


def placeholders(
    settings: AdapterSettings, N: int, M: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of the right shapes, for values that are still to come: NaN, so that none goes unnoticed."""
    return {
        name: torch.full(shape, math.nan, device=device, dtype=torch.float32 if name == "scaling" else dtype)
        for name, shape in settings.shapes(N, M).items()
    }


def start_from_pair(
    settings: AdapterSettings, residual_A: Tensor, residual_B: Tensor, scaling: float | Tensor
) -> dict[str, Tensor]:
    """Where an adapter with this frozen pair [R, N], [M, R] and s, a float or float32 [E], started, without an SVD.

    A0 is in the pair, and so is coefficient * s_i * B0_i; the router is drawn anew.
    """
    E = settings.num_experts
    s_E = scaling if isinstance(scaling, Tensor) else torch.full((E,), scaling)
    factor_R = (settings.w_res_coefficient * s_E.to(residual_B)).repeat_interleave(settings.expert_rank)
    start = {
        "lora_A": residual_A.clone(),
        "lora_B": residual_B / factor_R,
        "router": draw_uniform((E, residual_A.shape[1]), residual_A.device, residual_A.dtype),
        "residual_A": residual_A.clone(),
        "residual_B": residual_B.clone(),
    }
    return start | ({"scaling": scaling.clone()} if isinstance(scaling, Tensor) else {})


def random_start(
    settings: AdapterSettings, N: int, M: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What ``init_weights=False`` asks for: random A and B, s B of the size that PEFT's LoRA has there, W_res = 0.

    The same tensors exist as for a real start, so that either loads the other's.
    """
    # Without singular values every expert gets the scaling of the first.
    s = adapter_scaling(dataclasses.replace(settings, scaling="goat") if settings.per_expert_scaling else settings, N)
    bounds = {"lora_A": 1 / math.sqrt(N), "lora_B": 1 / (s * math.sqrt(settings.r)), "router": 1 / math.sqrt(N)}
    start = placeholders(settings, N, M, device, dtype)
    for name, tensor in start.items():
        if name in bounds:
            tensor.copy_(torch.empty(tensor.shape, dtype=dtype).uniform_(-bounds[name], bounds[name]))
        else:
            tensor.fill_(s if name == "scaling" else 0.0)
    return start
