"""GOAT computed as PEFT computes a LoRA with float32 adapters over a half-precision base: what other users' errors are.

The base's output is rounded to x's dtype; x is cast up, everything of the adapter is float32, and the sum is rounded
once more (PEFT's ``lora.Linear.forward``). docs/numerics.md sets the fused layer's errors beside these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from goat_kernels.reference import ReferenceOutput, goat_reference


def goat_as_lora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_masks: Tensor | None = None,
    **options,
) -> ReferenceOutput:
    """:func:`goat_kernels.reference.goat_reference` for x [T, N] in half precision and a float32 adapter.

    ``options`` are the oracle's own; ``dropout_masks`` are cast to float32.
    """
    nothing = torch.zeros(lora_B.shape[0], x.shape[-1], dtype=torch.float32, device=x.device)
    masks = None if dropout_masks is None else dropout_masks.float()
    adapter = goat_reference(x.float(), nothing, lora_A, lora_B, router, dropout_masks=masks, **options)
    output = F.linear(x, weight, bias) + adapter.output
    return adapter._replace(output=output.to(x.dtype))
