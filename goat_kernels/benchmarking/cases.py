"""Which shapes a suite runs, on a GPU and on a CPU; ``quick`` ones are for tests. Adding a shape is adding a line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from goat_kernels.checks.problem import LayerCase

#: Of every suite that does not vary them.
NUM_EXPERTS, TOP_K = 8, 2

#: What a layer is timed in: a training step's forward, its backward, both; or a forward without gradients.
TRAINING_MODES = ("forward", "backward", "both")
MODES = (*TRAINING_MODES, "inference")

FORMS = ("fold", "path")


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        T, N, M, R: tokens, in_features, out_features, total rank.
        forms: of the residual.
        modes: of ``MODES``.
        E, K: experts, and how many a token uses.
        varied: what the scaling suite varies here.
        dropout_p: of x in front of the adapter; 0 is none.
    """

    T: int
    N: int
    M: int
    R: int
    forms: tuple[str, ...] = FORMS
    modes: tuple[str, ...] = TRAINING_MODES
    E: int = NUM_EXPERTS
    K: int = TOP_K
    varied: str | None = None
    dropout_p: float = 0.0

    def layer(self, dtype: torch.dtype, form: str) -> LayerCase:
        """The same for ``goat_kernels.checks``."""
        sizes = {letter: getattr(self, letter) for letter in "TNMREK"}
        return LayerCase(
            **sizes, dtype=dtype, adapter_dtype=torch.float32, path=form == "path", dropout_p=self.dropout_p
        )

    def row(self) -> dict:
        row = {letter: getattr(self, letter) for letter in "TNMREK"}
        if self.varied is not None:
            row["varied"] = self.varied
        return {**row, "dropout_p": self.dropout_p} if self.dropout_p else row

    def __str__(self) -> str:
        dropout = f" dropout={self.dropout_p:g}" if self.dropout_p else ""
        return f"T={self.T} {self.N}->{self.M} R={self.R} E={self.E} K={self.K}{dropout}"


#: The three that the torch backend was tuned for, then those that were not looked at while it was written.
_CPU_LAYERS = (
    Case(1536, 768, 768, 32),
    Case(1024, 768, 3072, 32),
    Case(512, 2048, 2048, 16),
    Case(2048, 384, 1536, 16, modes=("both",)),
    Case(640, 1024, 1024, 64, modes=("both",)),
    Case(3200, 768, 768, 8, modes=("both",)),
    Case(768, 3072, 768, 32, modes=("both",)),
    Case(256, 4096, 4096, 8, modes=("both",)),
)

#: The shapes that have a target, forward and backward together; the two directions apart where a shape stands for many.
_GPU_TRAINED = (
    Case(8192, 4096, 4096, 32),
    Case(8192, 4096, 4096, 8, modes=("both",)),
    Case(8192, 4096, 11008, 32, modes=("both",)),
    Case(8192, 11008, 4096, 32, modes=("both",)),
    Case(8192, 5120, 13824, 128, modes=("both",)),
    Case(8192, 13824, 5120, 128, modes=("both",)),
    Case(16384, 8192, 8192, 64, modes=("both",)),
    Case(3200, 768, 768, 8),  # ViT-B/32, 64 images
    Case(3200, 768, 3072, 8, modes=("both",)),
)

#: p of the second time that every training shape is measured.
DROPOUT_P = 0.05

_GPU_LAYERS = (
    *_GPU_TRAINED,
    *(Case(T, 4096, 4096, 32, modes=("inference",)) for T in (1, 16, 64)),  # decoding
    *(dataclasses.replace(case, modes=("both",), dropout_p=DROPOUT_P) for case in _GPU_TRAINED),
)

_QUICK = (Case(48, 32, 40, 16),)

#: The three of docs/design.md's table of floors.
_GPU_DESIGN = (
    Case(8192, 4096, 4096, 32),
    Case(8192, 5120, 13824, 128, forms=("fold",)),
    Case(8192, 13824, 5120, 128, forms=("fold",)),
)


def layer_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """Of the layer suite, and of the memory suite but for decoding."""
    if quick:
        return _QUICK
    return _GPU_LAYERS if device == "cuda" else _CPU_LAYERS


def memory_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    return tuple(case for case in layer_cases(device, quick=quick) if "both" in case.modes and not case.dropout_p)


def kernel_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """Each pass alone: the training shapes on a GPU, the three targets on a CPU."""
    cases = memory_cases(device, quick=quick)
    return cases if device == "cuda" else cases[:3]


def design_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """Of the comparison of orders in which base product and adapter can be computed."""
    if quick:
        return _QUICK
    return _GPU_DESIGN if device == "cuda" else _CPU_LAYERS[:3]


def tuning_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """Of the search around the table's tiles: the ranks that the targets name."""
    if quick or device != "cuda":
        return _QUICK
    return (
        Case(8192, 4096, 4096, 32),
        Case(8192, 4096, 4096, 8),
        Case(8192, 5120, 13824, 128, forms=("fold",)),
        Case(16384, 8192, 8192, 64, forms=("path",)),
    )


def host_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """Where the host decides how fast a layer is: a ViT's layer, and decoding. The same without a GPU."""
    if quick:
        return _QUICK
    return Case(3200, 768, 768, 8, forms=("path",)), Case(1, 4096, 4096, 32, forms=("path",))


def scaling_cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """T, N (= M), R, E and K one at a time from a middle; the middle is in each of the five."""
    middle = Case(8192, 4096, 4096, 32) if device == "cuda" else Case(512, 768, 768, 32)
    if quick:
        middle = Case(32, 32, 32, 16)
    T, N, R = middle.T, middle.N, middle.R
    values = {
        "T": (T // 4, T // 2, T, 2 * T, 4 * T),
        "N": (N // 4, N // 2, N, 2 * N),
        "R": (R // 4, R // 2, R, 2 * R, 4 * R, 8 * R),
        "E": (2, 4, 8, 16, 32),
        "K": (1, 2, 4, 8),
    }
    if quick:
        values = {"T": (T, 2 * T), "E": (4, 8)}
    return tuple(
        dataclasses.replace(
            middle, **({"N": value, "M": value} if name == "N" else {name: value}), modes=("both",), varied=name
        )
        for name, of_name in values.items()
        for value in of_name
    )
