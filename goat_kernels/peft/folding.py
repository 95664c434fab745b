"""``residual="fold"`` among PEFT's adapters: which of them, if any, is inside the base weight now."""

from __future__ import annotations

import threading

import torch
from transformers.pytorch_utils import Conv1D

from goat_kernels.residual import FoldedWeight

#: A first forward may come from several threads at once. Not the layer's own: it could be neither copied nor pickled.
_LOCK = threading.RLock()


class FoldingLayer:
    """Mixin of a tuner layer: keeps the base weight in the state that the active adapters need.

    ``settle()`` follows everything that may change that state, so that a forward, which a compiler may be tracing,
    finds it settled.
    """

    def __init__(self) -> None:
        self._folded: FoldedWeight | None = None
        self._folded_adapter: str | None = None

    def check_alone(self, adapter_names: list[str]) -> None:
        """Raise ValueError where several adapters would be active and one of them is folded into the weight."""
        here = [name for name in adapter_names if name in self.settings]
        folded = [name for name in here if self.settings[name].residual == "fold"]
        if folded and len(here) > 1:
            raise ValueError(
                f"adapters {here} cannot be active together: residual='fold' of {folded} changes the base weight that "
                "the others see; activate one, or create them with residual='path'"
            )

    def active_here(self) -> list[str]:
        """Active adapters that this layer has; none while they are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.goat_adapter]

    def is_settled(self) -> bool:
        """Whether every active adapter has its tensors and the weight is in the state that they need."""
        active = self.active_here()
        if not torch.compiler.is_compiling():
            self._check_folded_weight()
        return not (self._pending and self._pending.intersection(active)) and (
            self._folding_among(active) == self._folded_adapter
        )

    def settle(self) -> None:
        """Start the active adapters whose tensors never came, then fold the pair that belongs in the weight."""
        with _LOCK:
            if self.is_settled():
                return
            active = self.active_here()
            for name in active:
                self.initialise_pending(name)
            self.unfold()
            folding = self._folding_among(active)
            base = self.get_base_layer()
            if folding is None or base.weight.is_meta:
                return
            A0, B0 = self.goat_adapter[folding].residual_A, self.goat_adapter[folding].residual_B
            self._folded = FoldedWeight(base.weight)
            if isinstance(base, Conv1D):
                self._folded.fold(B0.T, A0.T)  # its weight is W0^T
            else:
                self._folded.fold(A0, B0)
            self._folded_adapter = folding

    def unfold(self) -> None:
        """Write W0 back, bit for bit."""
        self._check_folded_weight()
        if self._folded is not None:
            self._folded.restore()
            self._folded, self._folded_adapter = None, None

    def _check_folded_weight(self) -> None:
        """Raise where the base layer has another weight now than the one that was folded: W0 can no longer be put back,
        and "disabled" would silently mean W0 - W_res."""
        if self._folded is not None and self._folded.weight is not self.get_base_layer().weight:
            raise RuntimeError(
                f"the weight of {self.name} was replaced while an adapter was folded into it (fully_shard does that, "
                "and accelerate's dispatch_model); use residual='path'"
            )

    def _folding_among(self, names: list[str]) -> str | None:
        for name in names:
            if self.settings[name].residual == "fold" and self.goat_adapter[name].residual_A is not None:
                return name
        return None
