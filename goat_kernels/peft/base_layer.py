"""The layers that GOAT can adapt: which they are, their size, their pretrained weight, and which need no call."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
from collections.abc import Iterator

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.integrations import dequantize_module_weight
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goat_kernels.argument_checks import has_hooks, is_forward_of_linear

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INSTEAD = "name other modules in target_modules, or leave this one out with exclude_modules"


def check_base_layer(base: nn.Module, name: str) -> None:
    """Raise TypeError unless ``base``, called ``name``, is a linear layer whose forward the model really calls."""
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name} is the output projection inside an nn.MultiheadAttention, which reads its weight without calling "
            f"it, so an adapter there would have no effect; {_INSTEAD}"
        )
    if isinstance(base, nn.Linear | Conv1D):
        if instead := _instead_of_a_product(base):
            raise TypeError(
                f"{name} is a {kind} whose forward {instead}, so there is no [..., {base.out_features}] to add an "
                f"adapter's output to; {_INSTEAD}"
            )
        return
    backend = resolve_quantization_backend(base, get_apply_tensor_subclass=None)
    if backend is None or backend.layer_type != "linear":
        raise TypeError(
            f"{name} is a {kind}, but GOAT adapts linear layers alone (torch.nn.Linear, transformers' Conv1D and their "
            f"quantised forms); {_INSTEAD}"
        )


def _instead_of_a_product(base: nn.Linear | Conv1D) -> str | None:
    """What a forward of transformers' own does instead of [..., N] -> [..., M], as Llama 4's router does; else None.

    It is tried on the meta device, so that nothing is computed or moved. Forwards of others are not run before the
    model runs them: they may count, print, or refuse the meta device.
    """
    own = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
    if not own or not type(base).__module__.startswith("transformers."):
        return None
    if not has_plain_weight(base) and not is_meta(base):
        return None  # a format of its own, which the meta device may not know
    shape, tensors = (2, 3, base.in_features), itertools.chain(base.named_parameters(), base.named_buffers())
    on_meta = {f"base.{name}": torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    caller = nn.Module()  # calls what the class computes, without the hooks of the object
    caller.base = base
    caller.forward = functools.partial(type(base).forward, base)
    try:
        with torch.no_grad():
            x = torch.empty(shape, dtype=base.weight.dtype, device="meta")
            output = torch.func.functional_call(caller, on_meta, (x,))
    except Exception as error:
        return f"fails on an input of shape {list(shape)} ({type(error).__name__}: {str(error).splitlines()[0]})"
    if not isinstance(output, Tensor):
        return f"gives a {type(output).__name__}"
    expected = [*shape[:-1], base.out_features]
    return None if list(output.shape) == expected else f"gives {list(output.shape)} from an input of {list(shape)}"


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what is in ``model``, tuners' layers included, but not what is inside those."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(adapted):
            if isinstance(module, BaseTunerLayer):
                adapted = (*adapted, name + ".")
            yield name, module


def features(base: nn.Module) -> tuple[int, int]:
    """(in_features N, out_features M)."""
    N, M = _get_in_out_features(base)
    return int(N), int(M)


def pretrained_weight(base: nn.Module, name: str) -> Tensor:
    """W0 [M, N] as a float tensor; a quantised weight is dequantised, an offloaded or sharded one fetched.

    Raises:
        TypeError: the quantisation cannot be undone.
    """
    try:
        with _fetched(base):
            weight = _dequantised(base)
            if not weight.is_floating_point():
                raise TypeError(f"its weight is {weight.dtype}")
            if hasattr(weight, "full_tensor"):  # DTensor
                weight = weight.full_tensor()
            elif is_remote(base):
                weight = weight.clone()  # it leaves with the context
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise TypeError(
            f"{name} ({type(base).__qualname__}) is quantised in a way that PEFT cannot undo, so its singular values "
            f"are out of reach; use init='lora', or leave the module out (exclude_modules). ({error})"
        ) from error
    return weight.T if isinstance(base, Conv1D) else weight


def _dequantised(base: nn.Module) -> Tensor:
    if _is_packed_for_cpu(base):
        base = copy.deepcopy(base)
        unpack(base)
    before = getattr(base, "weight", None)
    weight = dequantize_module_weight(base).detach()
    # On a CPU, PEFT puts a copy in place of an 8-bit weight, without the statistics that the next forward needs.
    if before is not None and base.weight is not before:
        base.weight = before
    return weight


def _is_packed_for_cpu(base: nn.Module) -> bool:
    """Whether bitsandbytes has put a 4-bit weight into the order of its inference kernel for CPUs with AVX512-BF16.

    Its first forward in evaluation does that; its dequantisation takes no notice, and its kernel has no backward.
    """
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def unpack(base: nn.Module) -> None:
    """Have bitsandbytes undo that, as far as it does: the scales stay rounded to bfloat16."""
    if _is_packed_for_cpu(base):
        base.state_dict()  # saving needs the documented order, so this restores it in place


@contextlib.contextmanager
def _fetched(base: nn.Module):
    """The parameters of ``base`` present in full, to be read: gathered from all of DeepSpeed's ranks, which all have to
    come here, or fetched by accelerate's hook. What the caller gathered already is left alone.
    """
    partitioned = [p for p in base.parameters() if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
    gathered = contextlib.nullcontext()
    if partitioned:
        import deepspeed  # here, because it is there where such parameters are

        gathered = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None)
    hook = getattr(base, "_hf_hook", None)
    with gathered:
        if hook is not None:  # any hook: accelerate's own align_module_device knows one class of them
            hook.pre_forward(base)
        try:
            yield
        finally:
            if hook is not None:
                hook.post_forward(base, torch.tensor([]))


def is_remote(base: nn.Module) -> bool:
    """Whether the weights have to be fetched or gathered: accelerate's offloading, DeepSpeed's ZeRO-3."""
    return hasattr(base, "_hf_hook") or any(hasattr(parameter, "ds_id") for parameter in base.parameters())


def check_loading_of_base(model: nn.Module) -> None:
    """Raise where accelerate will fill FSDP2's shards from the first process: it can send parameters, but no buffers.

    It leaves models with bitsandbytes' 4-bit weights out of that.
    """
    asked = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if os.environ.get("FSDP_VERSION") != "2" or any(os.environ.get(name, "").lower() != "true" for name in asked):
        return
    if any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
        return
    raise ValueError(
        "fsdp_cpu_ram_efficient_loading=true loads the base weights in the first process alone, and accelerate's FSDP2 "
        "then sends parameters but no buffers, which the frozen residual pair and the scaling per expert are: set it "
        "to false, before the base model is loaded"
    )


def check_output_of_base(x: Tensor, output: Tensor, M: int, name: str) -> None:
    """Raise where the output of the base layer is no [..., M] to add to, or has lost the gradient to ``x``: adapters
    before it would train on a wrong one."""
    if not isinstance(output, Tensor) or output.shape != (*x.shape[:-1], M):
        found = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"{name} gives {found} for an input of shape {list(x.shape)}; GOAT adds to an output [..., {M}] alone: "
            "leave the module out (exclude_modules)"
        )
    if torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
        raise RuntimeError(
            f"the base layer of {name} gives its input no gradient (some quantised layers are for inference alone), so "
            "adapters before it would train on a wrong one; quantise the base in a way that can be trained through"
        )


def is_meta(base: nn.Module) -> bool:
    """Whether the weight is nowhere yet: on the meta device, without an accelerate hook that could fetch it."""
    weight = getattr(base, "weight", None)
    return weight is not None and weight.device.type == "meta" and not hasattr(base, "_hf_hook")


def adapter_device(base: nn.Module) -> torch.device:
    """Where the adapter of ``base`` belongs: the device that its forward runs on."""
    hook = getattr(base, "_hf_hook", None)
    if hook is not None and getattr(hook, "execution_device", None) is not None:
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    for name in ("weight", "qweight", "W_q"):
        tensor = getattr(base, name, None)
        if tensor is not None:
            return tensor.device
    return next(iter(base.parameters())).device


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """The adapter's master dtype: float64 for a float64 base, otherwise float32."""
    weight = getattr(base, "weight", None)
    return torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32


def is_plain(base: nn.Module) -> bool:
    """Whether ``base`` is nothing but x W^T + b, so that its product can run inside the routed operator.

    Hooks, accelerate's offloading, a replaced forward, subclasses and exotic weights all need ``base`` to be called.
    """
    return (
        type(base) is nn.Linear
        and not has_hooks(base)
        and is_forward_of_linear(base.__dict__.get("forward"))
        and "_hf_hook" not in base.__dict__
        and has_plain_weight(base)
    )


def offloading_hook(base: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook on an nn.Linear that is plain but for it: the product can run between its two halves."""
    hook = base.__dict__.get("_hf_hook")
    if type(base) is not nn.Linear or type(hook) is not AlignDevicesHook:
        return None
    return hook if is_forward_of_linear(base.__dict__.get("_old_forward")) and not has_hooks(base) else None


def has_plain_weight(base: nn.Module) -> bool:
    """Whether the weight is an ordinary float Parameter on a real device."""
    weight = base.weight
    return type(weight) is nn.Parameter and weight.dtype in _FLOAT_DTYPES and weight.device.type != "meta"


def check_foldable(base: nn.Module, name: str) -> None:
    """Raise unless ``residual="fold"`` can write the weight of ``base``."""
    special = type(base) not in (nn.Linear, Conv1D) or not has_plain_weight(base)
    if special or is_remote(base) or hasattr(base.weight, "full_tensor"):  # DTensor
        raise ValueError(
            f"residual='fold' writes the base weight, which must be a plain float tensor of an nn.Linear or Conv1D; "
            f"{name} is a {type(base).__qualname__} that is quantised, offloaded, sharded or special: use "
            "residual='path'"
        )
