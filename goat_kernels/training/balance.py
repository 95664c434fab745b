"""The scale that carries the balance loss through any trainer: what the trainer multiplies its loss by.

A routed layer adds ``balance_coefficient * balance_scale`` to the gradient of its balance loss in its own backward.
What is left is the factor that the trainer applies to its loss afterwards (1 / accumulation steps, the loss scale of
float16, the number of processes). :class:`BalanceScale` measures it: an identity on ``outputs.loss`` whose backward
receives exactly that factor, before any layer's backward runs.

    forward pre-hook    scale <- default (1, or what GoatCallback sets for trainers that compute their own loss)
    forward hook        outputs.loss <- identity(outputs.loss), a copy, since trainers edit the loss in place
    backward            scale <- the gradient that the identity receives * the batch's share (below); a gradient of
                        zero is that of a loss that the trainer did not use, and leaves the default
    each layer          reads the scale

Share: where a trainer hands ``num_items_in_batch`` to the model, the loss is a sum over tokens divided by the tokens
of all accumulated batches, and nothing is divided afterwards. The batch's own part of these tokens is then its share,
so the balance losses of the accumulated batches are averaged with the weights that their task losses have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goat_kernels.plain import is_transformed
from goat_kernels.routed_module import RoutedModule, routed_modules

_ATTRIBUTE = "goat_balance_scale"
_IGNORED_LABEL = -100


class BalanceScale:
    """One model's balance scale: a 0-d float32 tensor per device, shared by the routed modules there."""

    def __init__(self) -> None:
        self.default = 1.0  # the scale of a forward whose loss is not seen
        self._tensors: dict[torch.device, Tensor] = {}
        self._modules: list[RoutedModule] = []
        self._handles: list = []

    def reset(self) -> None:
        """Write the default."""
        # Through .data: torch.compile's saved graphs must see the new value, not an error about a changed input.
        for tensor in self._tensors.values():
            tensor.data.fill_(self.default)

    def _place(self) -> None:
        """Give each module the tensor of its device; devices may have changed since the last forward."""
        for module in self._modules:
            device = module.routing_device
            if device is None or device.type == "meta":
                continue
            if module.balance_scale is None or module.balance_scale is not self._tensors.get(device):
                if device not in self._tensors:
                    self._tensors[device] = torch.full((), self.default, device=device)
                module.balance_scale = self._tensors[device]

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            return
        compiling = torch.compiler.is_compiling()
        if is_transformed(compiling):
            # A tensor of the outside may not be written within torch.func's transforms, so the default is written past
            # them, and no loss is tapped there. An exporter's program has no scale.
            if not compiling and torch._C._get_tracing_state() is None:
                with torch._C._DisableFuncTorch():
                    self._place()
                    self.reset()
            return
        if not compiling:
            # A checkpoint around the whole model runs it again inside backward, where the scale is already right.
            if torch._C._current_graph_task_id() != -1:
                return
            self._place()
        self.reset()

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, outputs):
        if not torch.is_grad_enabled() or is_transformed(torch.compiler.is_compiling()):
            return None
        scales, share = list(self._tensors.values()), _batch_share(model, kwargs)
        if _is_loss(outputs):
            return _tap(outputs, scales, share)
        if isinstance(outputs, tuple):
            if outputs and _is_loss(outputs[0]):
                tapped = (_tap(outputs[0], scales, share), *outputs[1:])
                return outputs._make(tapped) if hasattr(outputs, "_make") else type(outputs)(tapped)
        elif isinstance(outputs, dict):
            if _is_loss(outputs.get("loss")):
                outputs["loss"] = _tap(outputs["loss"], scales, share)
        elif _is_loss(getattr(outputs, "loss", None)):
            outputs.loss = _tap(outputs.loss, scales, share)
        return None


def attach_balance_scale(model: nn.Module) -> BalanceScale:
    """Make the balance losses of ``model``'s routed layers follow whatever a trainer does to ``outputs.loss``.

    Call it on the module whose forward returns the loss; the PEFT tuner does so by itself. Scales attached earlier to
    submodules are replaced; calling it again takes in routed modules that were added since.

    Args:
        model: a module whose output is a 0-d loss, a dict, a ModelOutput or an object with ``loss``, or a tuple that
            starts with a 0-d loss. Where it is none of these, the scale keeps its default.

    Returns:
        The scale, also reachable by :func:`balance_scales`.
    """
    for module in model.modules():
        if module is not model and hasattr(module, _ATTRIBUTE):
            detach_balance_scale(module)
    scale = getattr(model, _ATTRIBUTE, None)
    if scale is None:
        scale = BalanceScale()
        setattr(model, _ATTRIBUTE, scale)
        scale._handles = [
            model.register_forward_pre_hook(scale._before_forward, with_kwargs=True),
            model.register_forward_hook(scale._after_forward, with_kwargs=True),
        ]
    scale._modules = [module for _, module in routed_modules(model)]
    scale._place()
    return scale


def detach_balance_scale(model: nn.Module) -> None:
    """Undo :func:`attach_balance_scale`; does nothing where it was not called."""
    scale = model.__dict__.pop(_ATTRIBUTE, None)
    if scale is not None:
        for handle in scale._handles:
            handle.remove()
        for module in scale._modules:
            module.balance_scale = None


def balance_scales(model: nn.Module) -> list[BalanceScale]:
    """Every scale attached to ``model`` or a submodule."""
    return [module.__dict__[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in module.__dict__]


# --- the tap, as operators so that torch.compile traces it --------------------------------------------------------

_library = torch.library.Library("goat_kernels_training", "DEF")
_library.define("tap(Tensor loss, Tensor[] scales, Tensor? share) -> Tensor")
_library.define("publish(Tensor gradient, Tensor(a!)[] scales, Tensor? share) -> ()")


def _publish(gradient, scales, share):
    # A loss that nobody used has a gradient of zero where something between it and the caller fills in what is
    # missing: DistributedDataParallel looking for unused parameters, a compiled graph. The default then stands.
    unused = gradient == 0
    value = gradient if share is None else gradient * share
    for scale in scales:
        scale.data.copy_(torch.where(unused.to(scale.device), scale, value.to(scale)))


def _setup(ctx, inputs, output):
    ctx.scales, ctx.share = inputs[1], inputs[2]


def _tap_backward(ctx, gradient):
    torch.ops.goat_kernels_training.publish(gradient.detach(), ctx.scales, ctx.share)
    return gradient, [None] * len(ctx.scales), None


_library.impl("tap", lambda loss, scales, share: loss.clone(), "CompositeExplicitAutograd")
_library.impl("publish", _publish, "CompositeExplicitAutograd")
torch.library.register_fake(
    "goat_kernels_training::tap", lambda loss, scales, share: torch.empty_like(loss), lib=_library
)
torch.library.register_fake("goat_kernels_training::publish", lambda gradient, scales, share: None, lib=_library)
torch.library.register_autograd("goat_kernels_training::tap", _tap_backward, setup_context=_setup, lib=_library)
_tap = torch.ops.goat_kernels_training.tap


def _is_loss(value) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad


def _batch_share(model: nn.Module, kwargs: dict) -> Tensor | None:
    """This batch's part of ``num_items_in_batch`` (0-d), counted as transformers.Trainer counts; None without it."""
    num_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if num_items is None or not isinstance(labels, Tensor):
        return None
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if isinstance(kwargs.get("shift_labels"), Tensor):
        labels = kwargs["shift_labels"]
    elif not encoder_decoder and LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss:
        labels = labels[..., 1:]  # position 0 is never a target of a causal language model
    items = labels.ne(_IGNORED_LABEL).sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(items.device).reshape(-1)[0]
    return items / num_items
