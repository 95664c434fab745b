"""The layer as torch calls that autograd itself differentiates: for function transforms and exporters.

``torch.func`` (grad, vmap, jvp and what is made of them), ``torch.export``, ONNX and ``torch.jit.trace`` rewrite the
calls that they see, and see nothing inside a fused formula. In them every backend takes this path: the torch backend's
forward, with nothing written in place, and no backward of our own. It keeps more for the backward and is slower.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor

from goat_kernels.autocast import autocast_disabled
from goat_kernels.backends.torch_backend import prefill
from goat_kernels.forward_backward import Layer


def is_transformed(is_compiling: bool) -> bool:
    """Whether a transform of torch.func is active, or an exporter traces.

    ``is_compiling``: what ``torch.compiler.is_compiling()`` says, which the caller needs too and which takes time.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.compiler.is_exporting() if is_compiling else torch._C._get_tracing_state() is not None


def plain_forward(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """(y [..., M], balance loss []).

    Within torch.func the balance loss is injected as everywhere, with the value that ``balance_scale`` has now. An
    exported program has no injection, of which a warning tells.
    """
    weight, base_output, bias, adapter, balance_scale, balance_coefficient = layer
    quiet = contextlib.nullcontext()
    if torch._C._get_tracing_state() is not None:  # branches on sizes are the adapter's, which the trace contains
        quiet = warnings.catch_warnings(action="ignore", category=torch.jit.TracerWarning)
    with autocast_disabled(x.device.type), quiet:  # its casts have been done
        x_TN = x.reshape(-1, x.shape[-1])
        base_output_TM = None if base_output is None else base_output.reshape(-1, base_output.shape[-1])
        if adapter.residual_A is not None:  # constants, whatever they require
            adapter = adapter._replace(residual_A=adapter.residual_A.detach(), residual_B=adapter.residual_B.detach())
        y_TM, balance_loss, _ = prefill(x_TN, adapter, bias, base_output_TM, in_place=False)
        if weight is not None:
            y_TM = torch.addmm(y_TM, x_TN, weight.t())
        if balance_coefficient:
            if torch._C._are_functorch_transforms_active():
                injected = balance_loss.new_full((), balance_coefficient)
                if balance_scale is not None:
                    injected = injected * balance_scale.to(injected)
                y_TM = _Injection.apply(y_TM, balance_loss, injected)
            else:
                warnings.warn(_NOT_EXPORTED, stacklevel=2)
        return y_TM.reshape(*x.shape[:-1], y_TM.shape[1]), balance_loss


_NOT_EXPORTED = (
    "the program that is traced has no balance loss: its layers add it in a backward of their own, which no exporter "
    "sees. Export in eval mode, or set balance_coefficient=0, if the program is not to be trained"
)


class _Injection(torch.autograd.Function):
    """y, in whose backward ``injected`` is added to the gradient of the balance loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, balance_loss, injected):
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx, grad_y):
        (injected,) = ctx.saved_tensors
        return grad_y, injected.clone(), None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.clone()
