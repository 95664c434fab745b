"""What a run is given: its settings, and which shapes a suite runs. Adding a shape is adding a line."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from bench.machine import cache_bytes
from bench.timing import copies_for
from goat_kernels.checks.problem import LayerCase, Problem, name_of

#: What a layer is timed in: a training step's forward, its backward, both; or a forward without gradients.
TRAINING_MODES = ("forward", "backward", "both")

FORMS = ("fold", "path")


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        T, N, M, R: tokens, in_features, out_features, total rank.
        forms: of the residual.
        modes: of ``TRAINING_MODES``, or "inference".
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
    E: int = 8
    K: int = 2
    varied: str | None = None
    dropout_p: float = 0.0

    def layer(self, dtype: torch.dtype, form: str) -> LayerCase:
        """The same for ``goat_kernels.checks``."""
        sizes = {letter: getattr(self, letter) for letter in "TNMREK"}
        return LayerCase(**sizes, dtype=dtype, path=form == "path", dropout_p=self.dropout_p)

    def layers(self) -> tuple[Case, ...]:
        """The layers whose kernels it launches, which are compiled ahead."""
        return (self,)

    def row(self) -> dict:
        """The fields of a result that say which case it is."""
        row = {letter: getattr(self, letter) for letter in "TNMREK"}
        if self.varied is not None:
            row["varied"] = self.varied
        return {**row, "dropout_p": self.dropout_p} if self.dropout_p else row


@dataclass
class BenchSettings:
    """Settings of one run.

    Attributes:
        device, dtype: where, and of x and the base weight; adapters are float32.
        rounds: timed rounds of each comparison.
        quick: tiny sizes, which say nothing about speed; for tests.
        shapes: in place of the suites' own; empty for these.
        without: kinds of contenders to leave out.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    quick: bool = False
    shapes: tuple[Case, ...] = ()
    without: frozenset[str] = frozenset()

    @property
    def cases(self) -> str:
        """What a result says about its shapes: only "standard" ones enter the tables."""
        if self.quick:
            return "quick"
        return "custom" if self.shapes else "standard"

    @property
    def kind(self) -> str:
        """Which list of cases a suite runs: "quick", "cuda" or "cpu"."""
        return "quick" if self.quick else self.device.type

    def dtypes(self) -> dict:
        """The fields of a result that say what the dtypes are."""
        return {"dtype": name_of(self.dtype), "adapter_dtype": "float32"}


def copies_of(problem: Problem, input_bytes: int, settings: BenchSettings) -> list[Problem]:
    """The problem and copies of it in other memory, as many as a step rotates through; ``input_bytes`` of one."""
    copies = copies_for(input_bytes, 0 if settings.quick else cache_bytes(settings.device))
    return [problem, *(copy.deepcopy(problem) for _ in range(copies - 1))]


# --- shapes ---------------------------------------------------------------------------------------------------------

_BOTH = ("both",)

#: The shapes that have a target, forward and backward together; the two directions apart where a shape stands for many.
_GPU_TRAINED = (
    Case(8192, 4096, 4096, 32),
    Case(8192, 4096, 4096, 8, modes=_BOTH),
    Case(8192, 4096, 11008, 32, modes=_BOTH),
    Case(8192, 11008, 4096, 32, modes=_BOTH),
    Case(8192, 5120, 13824, 128, modes=_BOTH),
    Case(8192, 13824, 5120, 128, modes=_BOTH),
    Case(16384, 8192, 8192, 64, modes=_BOTH),
    Case(3200, 768, 768, 8),  # ViT-B/32, 64 images
    Case(3200, 768, 3072, 8, modes=_BOTH),
)

_QUICK = (Case(48, 32, 40, 16),)

#: Of the layer suite, by ``BenchSettings.kind``.
LAYERS = {
    "quick": _QUICK,
    "cpu": (  # the three that the torch backend was tuned for, then those that were not looked at while it was written
        Case(1536, 768, 768, 32),
        Case(1024, 768, 3072, 32),
        Case(512, 2048, 2048, 16),
        Case(2048, 384, 1536, 16, modes=_BOTH),
        Case(640, 1024, 1024, 64, modes=_BOTH),
        Case(3200, 768, 768, 8, modes=_BOTH),
        Case(768, 3072, 768, 32, modes=_BOTH),
        Case(256, 4096, 4096, 8, modes=_BOTH),
    ),
    "cuda": (
        *_GPU_TRAINED,
        *(Case(T, 4096, 4096, 32, modes=("inference",)) for T in (1, 16, 64)),  # decoding
        *(replace(case, modes=_BOTH, dropout_p=0.05) for case in _GPU_TRAINED),  # every training shape a second time
    ),
}

#: The same but for decoding and dropout.
MEMORY = {**LAYERS, "cuda": _GPU_TRAINED}

#: Each pass alone: the training shapes on a GPU, the three targets on a CPU.
KERNELS = {**MEMORY, "cpu": LAYERS["cpu"][:3]}

#: Of the search around the table's tiles: the ranks that the targets name.
TUNING = {
    "quick": _QUICK,
    "cpu": _QUICK,
    "cuda": (
        Case(8192, 4096, 4096, 32),
        Case(8192, 4096, 4096, 8),
        Case(8192, 5120, 13824, 128, forms=("fold",)),
        Case(16384, 8192, 8192, 64, forms=("path",)),
    ),
}

#: Where the host decides how fast a layer is: a ViT's layer, and decoding. The same without a GPU.
_HOST = Case(3200, 768, 768, 8, forms=("path",)), Case(1, 4096, 4096, 32, forms=("path",))
HOST = {"quick": _QUICK, "cpu": _HOST, "cuda": _HOST}


def _one_by_one(middle: Case, **values: tuple[int, ...]) -> tuple[Case, ...]:
    """T, N (= M), R, E and K one at a time from a middle."""
    return tuple(
        replace(middle, **({"N": value, "M": value} if name == "N" else {name: value}), modes=_BOTH, varied=name)
        for name, of_name in values.items()
        for value in of_name
    )


def _scaling(T: int, N: int) -> tuple[Case, ...]:
    """The middle is in each of the five."""
    Ts, Ns = (T // 4, T // 2, T, 2 * T, 4 * T), (N // 4, N // 2, N, 2 * N)
    Rs, Es = (8, 16, 32, 64, 128, 256), (2, 4, 8, 16, 32)
    return _one_by_one(Case(T, N, N, 32), T=Ts, N=Ns, R=Rs, E=Es, K=(1, 2, 4, 8))


SCALING = {
    "quick": _one_by_one(Case(32, 32, 32, 16), T=(32, 64), E=(4, 8)),
    "cpu": _scaling(512, 768),
    "cuda": _scaling(8192, 4096),
}
