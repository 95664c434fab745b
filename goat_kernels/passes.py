"""The passes of a GOAT layer as a small interface, implemented once per backend.

``forward_backward.py`` strings them together; they hold everything but the base product, which is the vendor's matmul
whatever the backend. All of them work on flattened tokens. Dtypes: "compute" is x's dtype, "stats" is float32
(float64 for float64 x), "adapter" is whatever dtype the trainable tensors have.

Forward
    prefill             one read of x -> hidden, router logits, gate, balance-loss statistics, and the adapter's share
                        of y (plus bias, or plus the base's output), onto which the base product accumulates
Backward
    hidden_gradient     one read of dY -> gradients of the hidden columns and of the router's logits
    weight_gradients    dY^T h~, one read of dY; [dh | dlogits]^T x, one read of x
    input_prefill       [dh | dlogits | dh0] [lora_A; router; A0], onto which dY W accumulates

Symbols: T tokens, N in_features, M out_features, E experts, R total rank, R' (R0) frozen residual columns, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


def stats_dtype(x: Tensor) -> torch.dtype:
    """The dtype of router, gate and balance loss for inputs like x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Adapter(NamedTuple):
    """Everything of one adapter that a pass may need.

    lora_A [R, N], lora_B [M, R], router [E, N] in the adapter's dtype; residual_A [R', N] and residual_B [M, R'] or
    both None; s is ``scaling``, or (``scaling`` is 1 then) stats-dtype ``scaling_E`` [E]; seed int32 [2] or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    router: Tensor
    residual_A: Tensor | None
    residual_B: Tensor | None
    scaling: float
    scaling_E: Tensor | None
    top_k: int
    dropout_p: float
    seed: Tensor | None

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def expert_rank(self) -> int:
        return self.lora_A.shape[0] // self.router.shape[0]

    @property
    def residual_rank(self) -> int:
        return 0 if self.residual_A is None else self.residual_A.shape[0]


class Routing(NamedTuple):
    """What the forward keeps for the backward, beside x: about T*(R + 2E) numbers.

    weighted_TR: h~ = s expand(gate) h, compute dtype. h itself is not needed: gate_i dgate_i = <h~_i, dh~_i>.
    gate_ET: softmax over the K selected logits, zero elsewhere, stats dtype, expert-major.
    probs_ET: softmax over all logits, stats dtype, expert-major.
    load_E: f of the balance loss, the share of tokens routed to each expert (sums to K), stats dtype.
    packed: the adapter cast to the compute dtype, in the backend's own order; empty where it is read as it is.
    """

    weighted_TR: Tensor
    gate_ET: Tensor
    probs_ET: Tensor
    load_E: Tensor
    packed: Tensor


class HiddenGradient(Protocol):
    """What hidden_gradient hands to the weight and input gradients: dh, dlogits and dh0, in the backend's own layout.

    dlogits are in the stats dtype for the router's gradient: the balance loss's share of them is about 1e-3 / T per
    token, which float16 cannot hold. ``partial_B``: sums of lora_B's gradient that came with the same read of dY, for
    weight_gradients to finish, or None.
    """

    logits_ET: Tensor
    partial_B: Tensor | None

    def _replace(self, **changes: Tensor | None) -> HiddenGradient:
        """The same with other fields, as of a named tuple."""


class Passes(Protocol):
    """The passes, in the order in which they run; every method is deterministic and synchronises nothing."""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Hashable) -> Any:
        """``function(self, *arguments, **options)``, which strings passes together and does nothing else to a tensor.

        A backend may remember what that did and repeat it for arguments of the same shapes, strides, dtypes and
        options. ``arguments``: tensors, numbers, None, and tuples of them; so is the result.
        """

    def packed_numel(self, adapter: Adapter, compute: torch.dtype, T: int) -> int:
        """Elements of ``Routing.packed`` for T tokens of dtype ``compute``; looks only at shapes and dtypes."""

    def folds(self, x_TN: Tensor, weight_MN: Tensor, residual_A: Tensor) -> bool:
        """Whether forming W0 - B0 A0 for one product with x is cheaper than R' more hidden columns, and loses no bits.

        Looks only at shapes, dtypes, devices and types.
        """

    def folded_weight(self, weight_MN: Tensor, residual_A: Tensor, residual_B: Tensor) -> Tensor:
        """W0 - B0 A0, asked for where :meth:`folds` says so.

        The result may live in a workspace: it is valid until the next call in the same thread.
        """

    def prefill(
        self, x_TN: Tensor, adapter: Adapter, bias_M: Tensor | None, base_output_TM: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        """(y0 [T, M] compute dtype, balance loss 0-d stats dtype, routing).

        y0 = (s expand(gate) h) lora_B^T - (x A0^T) B0^T + bias, or + base_output in place of bias; a new tensor.
        """

    def hidden_gradient(
        self,
        grad_y_TM: Tensor,
        grad_balance: Tensor | float | None,
        adapter: Adapter,
        routing: Routing,
        *,
        with_residual: bool,
        needs_B: bool = False,
    ) -> HiddenGradient:
        """dh, dlogits and (``with_residual``) dh0, from dY and the gradient of the balance loss, if there is one.

        ``needs_B``: lora_B's gradient will be asked for; a backend may sum it up here if that is cheaper.
        """

    def weight_gradients(
        self,
        x_TN: Tensor,
        grad_y_TM: Tensor,
        adapter: Adapter,
        routing: Routing,
        gradient: HiddenGradient | None,
        *,
        needs_A: bool,
        needs_B: bool,
        needs_router: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of lora_A [R, N], lora_B [M, R] and router [E, N] in the adapter's dtype; None for what is not needed.

        From one read of x, and one of dY unless ``gradient`` brings lora_B's sums. ``gradient`` may be None where
        only lora_B's is needed.
        """

    def input_prefill(self, adapter: Adapter, routing: Routing, gradient: HiddenGradient) -> Tensor:
        """dX0 [T, N], compute dtype: the adapter's, router's and residual's share of the input gradient."""
