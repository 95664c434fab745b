"""The oracle: GOAT's forward and balance loss, expert by expert, as the paper writes them.

Plain PyTorch with plain autograd, one Python loop over the experts and nothing clever, so that it can be read
against the paper line by line. It imports nothing of the fast paths; every one of them is tested against it, in
float64. Slow on purpose: train with :class:`goat_kernels.GoatLinear`.

Symbols: T tokens, N in_features, M out_features, E experts, R total rank, D = R / E, K = top_k, s scaling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """What the oracle returns.

    Attributes:
        output: [..., M], dtype of x.
        balance_loss: 0-d, dtype of x; differentiates through the mean probabilities.
        selection: bool [T, E], True for the K experts that each token uses.
        gate: [T, E], the selected experts' weights; rows sum to 1.
    """

    output: Tensor
    balance_loss: Tensor
    selection: Tensor
    gate: Tensor


def select_top_k(logits: Tensor, top_k: int) -> Tensor:
    """The K largest logits of each token, ties to the lower index, NaN above every number.

    Args:
        logits: [T, E].
        top_k: K.

    Returns:
        bool [T, E] with K True in each row.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    selection = torch.zeros_like(logits, dtype=torch.bool)
    return selection.scatter(-1, order[:, :top_k], True)


def goat_reference(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor,
    top_k: int,
    residual: tuple[Tensor, Tensor] | None = None,
    selection: Tensor | None = None,
    dropout_masks: Tensor | None = None,
) -> ReferenceOutput:
    """GOAT's layer in the paper's own terms (docs/math.md; the residual is the paper's Thm 3.4).

    Args:
        x: [..., N], float32 or float64; every other tensor has the same dtype.
        weight: [M, N], W0 (with ``residual``) or the residual base weight W (without).
        lora_A: [R, N]; rows i*D..(i+1)*D-1 are expert i's A.
        lora_B: [M, R]; the same columns are expert i's B.
        router: [E, N].
        bias: [M] or None.
        scaling: s, one number or one per expert [E].
        top_k: K, experts per token.
        residual: None, or (A0 [R', N], B0 [M, R']) with W_res = B0 A0, treated as constants.
        selection: bool [T, E] to use instead of the router's own top K. The top K jumps, so two implementations
            are compared on one selection.
        dropout_masks: [E, T, N], what x is multiplied by before expert i's A (0, or 1 / (1 - p)); None is no dropout.

    Raises:
        TypeError: x is neither float32 nor float64.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64 for the reference, got {x.dtype}")
    E = router.shape[0]
    D = lora_A.shape[0] // E
    x_TN = x.reshape(-1, x.shape[-1])
    T = x_TN.shape[0]

    # Routing: softmax over the experts, its K largest entries kept and renormalised.
    logits = x_TN @ router.T
    probs = torch.softmax(logits, dim=-1)
    if selection is None:
        selection = select_top_k(logits.detach(), top_k)
    gate = torch.softmax(logits.masked_fill(~selection, float("-inf")), dim=-1)

    # y = W x + bias + sum_i gate_i * s_i * B_i A_i x
    y = F.linear(x_TN, weight, bias)
    for i in range(E):
        A_i = lora_A[i * D : (i + 1) * D]
        B_i = lora_B[:, i * D : (i + 1) * D]
        s_i = scaling[i] if isinstance(scaling, Tensor) else scaling
        x_i = x_TN if dropout_masks is None else x_TN * dropout_masks[i]
        y = y + gate[:, i : i + 1] * s_i * (x_i @ A_i.T) @ B_i.T

    # - W_res x, with W_res = B0 A0 frozen
    if residual is not None:
        A0, B0 = residual
        y = y - x_TN @ A0.detach().T @ B0.detach().T

    # balance loss = E * sum_i f_i P_i; f_i the share of tokens routed to i (a count), P_i its mean probability
    f = selection.to(x.dtype).sum(dim=0) / max(T, 1)
    P = probs.sum(dim=0) / max(T, 1)
    balance_loss = E * (f * P).sum()

    return ReferenceOutput(y.reshape(*x.shape[:-1], weight.shape[0]), balance_loss, selection, gate)
