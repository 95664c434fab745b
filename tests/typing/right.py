"""What users write, with the types they get. Checked by tests/test_packaging.py, not run."""

from typing import assert_type

import torch
from torch import Tensor, nn

from goat_kernels import (
    AdapterSettings,
    GoatConfig,
    GoatLinear,
    GoatOutput,
    ReferenceOutput,
    __version__,
    available_backends,
    goat_linear,
    goat_reference,
)
from goat_kernels.training import GoatCallback, RouterReport, RouterStatistics, router_report, router_statistics

x, weight, lora_A, lora_B, router = (torch.zeros(8, 8) for _ in range(5))  # noqa: N816
residual = (lora_A, lora_B)

# The layer as a function.
result = goat_linear(x, weight, lora_A, lora_B, router, scaling=2.0, top_k=2, residual=residual, backend="torch")
assert_type(result, GoatOutput)
assert_type(result.output, Tensor)
assert_type(result.balance_loss, Tensor)
output, balance_loss = goat_linear(x, weight, lora_A, lora_B, router, bias=None, scaling=torch.ones(8), top_k=1)
assert_type(output.mean() + 1e-3 * balance_loss, Tensor)
expected = goat_reference(x, weight, lora_A, lora_B, router, scaling=2.0, top_k=2)
assert_type(expected, ReferenceOutput)
assert_type(expected.output, Tensor)

# The layer as a module.
layer = GoatLinear(768, 3072, bias=False, r=32, num_experts=8, top_k=2, scaling=2, dtype=torch.bfloat16, device="cpu")
adapted = GoatLinear.from_linear(nn.Linear(8, 8), r=8, init="pissa", generator=torch.Generator())
assert_type(adapted, GoatLinear)
assert_type(adapted(x), Tensor)
assert_type(adapted.forward(x), Tensor)
assert_type(adapted.lora_A, nn.Parameter)
assert_type(adapted.router, nn.Parameter)
assert_type(adapted.weight, nn.Parameter)
assert_type(adapted.bias, nn.Parameter | None)
assert_type(adapted.residual_A, Tensor | None)
assert_type(adapted.expert_load, Tensor | None)
assert_type(adapted.balance_loss, Tensor | None)
assert_type(adapted.settings, AdapterSettings)
assert_type(adapted.settings.top_k, int)
assert_type(adapted.to_linear(), nn.Linear)
with adapted.disable_adapter() as pretrained:
    assert_type(pretrained, GoatLinear)
model = nn.Sequential(layer, nn.ReLU(), adapted)

# With PEFT.
config = GoatConfig(r=16, num_experts=8, top_k=2, target_modules="all-linear", task_type="CAUSAL_LM")
assert_type(config, GoatConfig)
assert_type(config.r, int)
assert_type(config.balance_coefficient, float)

# Training.
callback = GoatCallback(per_layer=False)
assert_type(router_report(model, heatmap="load.png"), RouterReport)
assert_type(router_statistics(model), dict[str, RouterStatistics])

assert_type(available_backends(), dict[str, str | None])
assert_type(__version__, str)
