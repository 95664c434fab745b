"""``GoatAdapter``: one adapter on one layer, and which of its tensors are still to be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from goat_kernels.adapter import BUFFERS, PARAMETERS, AdapterModule
from goat_kernels.settings import AdapterSettings

#: Name of a tensor in adapters that were saved by versions before 0.2 -> its name now. Both are read.
FORMER_NAMES = {
    "goat_A": "goat_adapter.lora_A",
    "goat_B": "goat_adapter.lora_B",
    **{f"goat_{name}": f"goat_adapter.{name}" for name in (*PARAMETERS, *BUFFERS) if not name.startswith("lora_")},
}


def present_name(key: str) -> str:
    """A key of an adapter's file under the name that its tensor has now."""
    module, _, tensor = key.rpartition(".")
    return f"{module}.{FORMER_NAMES[tensor]}" if module and tensor in FORMER_NAMES else key


class GoatAdapter(AdapterModule):
    """One adapter on one layer of a PEFT model.

    It is a module with parameters ``lora_A`` and ``lora_B`` because TRL, LoRA+ and accelerate's offloading go by that.
    It starts from ``tensors`` (name -> tensor); ``pending`` says that they are placeholders for values that are to be
    loaded, and ``may_start`` that the layer may start the adapter afresh where those never come.
    """

    def __init__(
        self, settings: AdapterSettings, tensors: Mapping[str, Tensor], *, pending: bool, may_start: bool
    ) -> None:
        super().__init__()
        self._register_adapter(settings, tensors)
        self.may_start = may_start
        # Tensors that have not come yet: the placeholder itself, so that one put in its place is noticed.
        self._placeholders: dict[str, Tensor] = dict(self.tensors()) if pending else {}

    def forward(self):
        """What :meth:`AdapterModule.for_call` returns, as accelerate's hook has placed it."""
        return super().for_call()

    def for_call(self):
        """Through a module's call only where a hook of accelerate needs one: DeepSpeed's ZeRO-3 would take the
        parameters away again behind such a call."""
        return self() if "_hf_hook" in self.__dict__ else super().for_call()

    # --- loading --------------------------------------------------------------------------------------------------

    def is_on_meta(self) -> bool:
        """Whether tensors of the adapter are nowhere yet."""
        return any(tensor.device.type == "meta" for tensor in self.tensors().values())

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
    def pending(self) -> bool:
        """Whether tensors are still to be loaded, as far as :meth:`missing` has looked."""
        return bool(self._placeholders)

    def start(self, values: Mapping[str, Tensor]) -> None:
        """Write ``values`` (name -> tensor) in place of whatever is there; nothing is to be loaded any more."""
        super().start(values)
        self._placeholders.clear()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in list(self._placeholders):
            if prefix + name in state_dict:
                del self._placeholders[name]

    def _apply(self, fn, recurse=True):
        missing = self.missing()
        super()._apply(fn, recurse)
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
