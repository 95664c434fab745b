"""Mistakes that a type checker has to report, each on its line. Checked by tests/test_packaging.py, not run."""

import torch

import goat_kernels
import goat_kernels.training
from goat_kernels import GoatConfig, GoatLinear, available_backends, goat_linear

print(goat_kernels.GoatLiner)  # expect: attr-defined
print(goat_kernels.training.GoatCalback)  # expect: attr-defined

x = torch.zeros(8, 8)
layer = GoatLinear(8, 8)

GoatLinear("8", 8)  # expect: arg-type
GoatLinear(8, 8, rank=4)  # expect: call-arg
GoatLinear.from_linear(x)  # expect: arg-type
layer([1.0, 2.0])  # expect: arg-type
layer.expert_load.mean()  # expect: union-attr
goat_linear(x, x, x, x, x, scaling=1.0)  # expect: call-arg
print(goat_linear(x, x, x, x, x, scaling=1.0, top_k=2).loss)  # expect: attr-defined
goat_linear(x, x, x, x, x, scaling=1.0, top_k="2")  # expect: arg-type
GoatConfig(rank=8)  # expect: call-arg
GoatConfig(r="8")  # expect: arg-type
available_backends()["triton"].upper()  # expect: union-attr
