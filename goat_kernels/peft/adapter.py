"""``GoatAdapter``: the tensors of one adapter on one layer, and which of them are still to be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from goat_kernels.peft.tensors import AdapterTensors

_PARAMETERS = ("lora_A", "lora_B", "router")
_BUFFERS = ("residual_A", "residual_B", "scaling")

#: Name of a tensor in adapters that were saved by versions before 0.2 -> its name now. Both are read.
FORMER_NAMES = {
    "goat_A": "goat_adapter.lora_A",
    "goat_B": "goat_adapter.lora_B",
    "goat_router": "goat_adapter.router",
    "goat_residual_A": "goat_adapter.residual_A",
    "goat_residual_B": "goat_adapter.residual_B",
    "goat_scaling": "goat_adapter.scaling",
}


def present_name(key: str) -> str:
    """A key of an adapter's file under the name that its tensor has now."""
    module, _, tensor = key.rpartition(".")
    return f"{module}.{FORMER_NAMES[tensor]}" if module and tensor in FORMER_NAMES else key


class GoatAdapter(nn.Module):
    """One adapter's tensors on one layer.

    It is a module, and its parameters are called ``lora_A`` and ``lora_B``, because other libraries go by that: TRL
    copies the parameters whose names contain ``.default.``, LoRA+ trains those with ``lora_B`` in their names faster,
    and accelerate fetches offloaded tensors for a module that is called.

    Parameters: ``lora_A`` [R, N] ([D, N] for hydralora), ``lora_B`` [M, R], ``router`` [E, N]. Buffers, each None where
    there is none: ``residual_A`` [R, N] and ``residual_B`` [M, R], the frozen pair; ``scaling`` float32 [E].

    Args:
        tensors: the values; a scaling that is a float is not kept here.
        pending: whether they are placeholders for values that are to be loaded.

    Attributes:
        may_start: whether the layer may start the adapter afresh where the values never come.
    """

    def __init__(self, tensors: AdapterTensors, *, pending: bool = False) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(tensors.lora_A)
        self.lora_B = nn.Parameter(tensors.lora_B)
        self.router = nn.Parameter(tensors.router)
        residual_A, residual_B = tensors.residual or (None, None)
        self.register_buffer("residual_A", residual_A)
        self.register_buffer("residual_B", residual_B)
        self.register_buffer("scaling", tensors.scaling if isinstance(tensors.scaling, Tensor) else None)
        self.may_start = True
        # Tensors that have not come yet: the placeholder itself, so that one put in its place is noticed.
        self._placeholders: dict[str, Tensor] = dict(self.tensors()) if pending else {}
        self._awaited = len(self._placeholders)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that the adapter has."""
        named = {**self._parameters, **self._buffers}
        return {name: named[name] for name in (*_PARAMETERS, *_BUFFERS) if named[name] is not None}

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(lora_A, lora_B, router, residual_A, residual_B, scaling), as accelerate's hook has placed them."""
        parameters, buffers = self._parameters, self._buffers
        return (
            parameters["lora_A"],
            parameters["lora_B"],
            parameters["router"],
            buffers["residual_A"],
            buffers["residual_B"],
            buffers["scaling"],
        )

    def fetched(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What :meth:`forward` returns, without a module's call where no hook of accelerate needs one.

        DeepSpeed's ZeRO-3 would take the parameters away again behind such a call.
        """
        return self() if "_hf_hook" in self.__dict__ else self.forward()

    # --- loading --------------------------------------------------------------------------------------------------

    def missing(self) -> list[str]:
        """Names of the tensors that were to be loaded and have not come.

        A tensor has come when a state dict brought it, whatever its values are, or another tensor was put in its place
        (``assign=True``, transformers' loader), or somebody wrote into the placeholder, which is all NaN.
        """
        for name, placeholder in list(self._placeholders.items()):
            tensor = getattr(self, name)
            written = tensor.device.type != "meta" and not bool(torch.isnan(tensor).all())
            if tensor is not placeholder or written:
                del self._placeholders[name]
        return list(self._placeholders)

    @property
    def loaded_in_part(self) -> bool:
        """Whether some of the tensors that were to be loaded have come and others have not."""
        return 0 < len(self.missing()) < self._awaited

    @torch.no_grad()
    def start(self, values: Mapping[str, Tensor]) -> None:
        """Write ``values`` (name -> tensor) in place of whatever is there; nothing is to be loaded any more."""
        for name, value in values.items():
            getattr(self, name).copy_(value)
        self._placeholders.clear()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in list(self._placeholders):
            if prefix + name in state_dict:
                del self._placeholders[name]

    def _apply(self, fn, recurse=True):
        missing = self.missing()
        exact = self.scaling
        super()._apply(fn, recurse)
        if exact is not None and self.scaling.dtype != exact.dtype:
            self.scaling = exact.to(self.scaling.device)  # rounding s to bfloat16 would shift every output
        for name in missing:
            placeholder = getattr(self, name)
            if self._placeholders[name].is_meta and not placeholder.is_meta:
                placeholder.data.fill_(math.nan)  # to_empty leaves whatever was in memory
            self._placeholders[name] = placeholder
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())


class AdapterDict(nn.ModuleDict):
    """Adapters by name, any name: nn.ModuleDict refuses those of its own methods, such as "pop" and "keys"."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name == "" or "." in name:
            raise ValueError(f"adapter_name={name!r} must be neither empty nor contain a dot, to be part of a name")
        self._modules[name] = module
