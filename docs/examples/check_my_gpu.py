"""Is goat_kernels right on my GPU? One layer, forward and backward, against the formulas in float64.

    python check_my_gpu.py        a few seconds

Without a GPU the Triton kernels run in Triton's interpreter, on the CPU, which shows that they compute the right
numbers but not that they compile. `goat-kernels check` is the thorough version: every kernel, every dtype.
"""

import os
import sys

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before goat_kernels is used

from goat_kernels import available_backends, goat_linear, goat_reference  # noqa: E402

# 1. Where are we, and what can run here?
device = torch.device("cuda" if HAS_GPU else "cpu")
print(f"device: {torch.cuda.get_device_name() if HAS_GPU else 'CPU; Triton runs in its interpreter'}")
backends = available_backends()
for name, reason in backends.items():
    print(f"backend {name}: {'can run' if reason is None else reason}")

# 2. One layer: T tokens, N -> M features, rank R shared by E experts, of which each token uses K.
T, N, M, R, E, K = (4096, 1024, 1024, 32, 8, 2) if HAS_GPU else (64, 64, 64, 16, 8, 2)
torch.manual_seed(0)
shapes = {"x": (T, N), "weight": (M, N), "lora_A": (R, N), "lora_B": (M, R), "router": (E, N)}
tensors = {name: torch.randn(shape, device=device) / shape[-1] ** 0.5 for name, shape in shapes.items()}
tensors["x"] *= N**0.5
names = [name for name in tensors if name != "weight"]  # the weight is frozen


def output_and_gradients(function, dtype, **options):
    """What `function` computes of the tensors in `dtype`: the output, and the gradient of everything that trains."""
    inputs = {name: value.to(dtype, copy=True).requires_grad_(name in names) for name, value in tensors.items()}
    output = function(**inputs, scaling=2.0, top_k=K, **options).output
    output.square().mean().backward()
    return {"output": output.detach(), **{f"gradient of {name}": inputs[name].grad for name in names}}


# 3. Compare. Products of float32 are exact to its rounding: PyTorch and the kernels use TF32 only where you ask for it.
expected = output_and_gradients(goat_reference, torch.float64)
passed = True
for backend in [name for name, reason in backends.items() if reason is None]:
    for name, value in output_and_gradients(goat_linear, torch.float32, backend=backend).items():
        error = ((value - expected[name]).norm() / expected[name].norm()).item()
        passed &= error < 1e-4
        print(f"{backend:6}  {name:20}  relative error {error:.1e}  {'ok' if error < 1e-4 else 'WRONG'}")
sys.exit(0 if passed else 1)
