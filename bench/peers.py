"""Other people's layers on our tensors: PEFT's LoRA, the public implementation's loop over experts, Unsloth's LoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frozen_linear(weight_MN: Tensor, bias_M: Tensor | None) -> nn.Linear:
    """nn.Linear around these very tensors, without gradients for them."""
    M, N = weight_MN.shape
    linear = nn.Linear(N, M, bias=bias_M is not None, device="meta")
    linear.weight = nn.Parameter(weight_MN, requires_grad=False)
    linear.bias = None if bias_M is None else nn.Parameter(bias_M, requires_grad=False)
    return linear


def peft_lora(linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float = 0.0) -> nn.Module:
    """PEFT's own LoRA layer over ``linear``, with copies of lora_A [R, N] and lora_B [M, R] in their dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = lora_A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, lora_dropout=dropout_p, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(linear))[0]
    layer.lora_A["default"].weight = nn.Parameter(lora_A.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(lora_B.detach().clone())
    return layer


class ExpertLoop(nn.Module):
    """What the public implementation does (``TopKMoELayer`` of GOAT-PEFT), in our words.

    Softmax over all experts, ``topk``, weights renormalised; the first expert runs on all tokens to find the shape of
    the result; then for each expert ``torch.where`` finds its tokens (which makes the host wait for the GPU), gathers
    them, runs two small products and adds what comes out. The weight has W_res folded in. Adapter and router are
    float32 and x is cast to that, as PEFT does.

    Attributes:
        loss: the last forward's balance loss, which the trainer adds to its own.
    """

    loss: Tensor | None = None

    def __init__(
        self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, router: Tensor, scaling: float, top_k: int
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.top_k = linear, scaling, top_k
        E = router.shape[0]
        self.lora_A = nn.ParameterList(A.detach().clone() for A in lora_A.chunk(E, dim=0))
        self.lora_B = nn.ParameterList(B.detach().contiguous().clone() for B in lora_B.chunk(E, dim=1))
        self.router = nn.ParameterList([router.detach().clone()])  # after A and B among the parameters

    def forward(self, x_TN: Tensor) -> Tensor:
        base_TM = self.base(x_TN)
        (router,) = self.router
        x_TN = x_TN.to(router.dtype)
        probs_TE = F.softmax(F.linear(x_TN, router), dim=-1)
        weights_TK, experts_TK = torch.topk(probs_TE, self.top_k)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        added_TM = torch.zeros_like(self._expert(0, x_TN))
        for expert in range(len(self.lora_A)):
            tokens, slots = torch.where(experts_TK == expert)
            added_TM[tokens] += weights_TK[tokens, slots, None] * self._expert(expert, x_TN[tokens])
        self.loss = self._balance_loss(probs_TE, experts_TK)
        return (base_TM + added_TM).to(base_TM.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A[index]), self.lora_B[index]) * self.scaling

    def _balance_loss(self, probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
        E = probs_TE.shape[1]
        share_E = F.one_hot(experts_TK, E).float().mean(dim=0).sum(dim=0)
        return E * (share_E * probs_TE.mean(dim=0)).sum()


class UnslothLora(nn.Module):
    """Unsloth's fused LoRA of one projection, ``LoRA_W``, with the adapter in x's dtype: a plain LoRA, no experts.

    It has no bias, so that is added.
    """

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        from unsloth.kernels.fast_lora import LoRA_W

        self._function, self.base, self.scaling = LoRA_W, linear, scaling
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().to(linear.weight.dtype)) for p in (lora_A, lora_B))

    def forward(self, x_TN: Tensor) -> Tensor:
        y = self._function.apply(x_TN[None], self.base.weight, None, self.lora_A, self.lora_B, self.scaling)[0]
        return y if self.base.bias is None else y + self.base.bias
