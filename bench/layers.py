"""The layer's contenders on shared tensors, and the check of each against float64 on these very tensors.

Adding a contender is adding an entry to ``CONTENDERS``. It comes with the function that it computes: "frozen", "lora",
or GOAT with the residual as "fold" or "path"; that is what the check holds it to.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import FORMS, Case
from bench.peers import ExpertLoop, UnslothLora, frozen_linear, peft_lora
from bench.steps import worst
from goat_kernels.backends import resolve_backend
from goat_kernels.checks.problem import make_problem
from goat_kernels.linear import GoatLinear
from goat_kernels.numerics import TOLERANCES, relative_error
from goat_kernels.reference import goat_reference

#: s, of every contender.
SCALING = 2.0

#: Of the balance loss; the paper's.
BALANCE_COEFFICIENT = 1e-3

FROZEN = "frozen linear"
LORA, HALF_LORA = "PEFT LoRA", "PEFT LoRA, adapter in x's dtype"


@dataclass(frozen=True)
class LayerTensors:
    """What all contenders of a shape share; ``folded_MN`` is W0 - B0 A0 in the weight's dtype, ``dropout_p`` is 0
    unless layers are made that drop."""

    x_TN: Tensor
    weight_MN: Tensor
    folded_MN: Tensor
    bias_M: Tensor
    grad_y_TM: Tensor
    lora_A: Tensor
    lora_B: Tensor
    router: Tensor
    residual_A: Tensor
    residual_B: Tensor
    top_k: int
    dropout_p: float = 0.0

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: torch.device) -> LayerTensors:
        """Random tensors of unit scale, with tokens whose choice of experts rounding cannot change."""
        problem = make_problem(case.layer(dtype, "path"), device)
        shared = ("lora_A", "lora_B", "router", "residual_A", "residual_B", "top_k")
        of_adapter = {name: getattr(problem.adapter, name) for name in shared}
        correction_MN = of_adapter["residual_B"].double() @ of_adapter["residual_A"].double()
        return cls(
            x_TN=problem.x_TN.requires_grad_(),
            weight_MN=problem.weight_MN,
            folded_MN=(problem.weight_MN.double() - correction_MN).to(dtype),
            bias_M=problem.bias_M,
            grad_y_TM=problem.grad_y_TM,
            **of_adapter,
        )

    def copy(self) -> LayerTensors:
        """The same values in other memory."""
        cloned = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        cloned["x_TN"].requires_grad_()
        return LayerTensors(**cloned)

    def dropping(self, dropout_p: float) -> LayerTensors:
        """The same tensors, of which layers are made that drop."""
        return dataclasses.replace(self, dropout_p=dropout_p)

    @property
    def input_bytes(self) -> int:
        """Of what the frozen layer reads in a step: the least that a rotation has to push out of the cache."""
        return sum(t.numel() * t.element_size() for t in (self.x_TN, self.weight_MN, self.grad_y_TM))


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        name: in results.
        kind: what ``--without`` names.
        computes: "frozen", "lora", "fold" or "path".
        make: tensors -> module; its trainable parameters are A, B and the router, in this order.
        backend: "torch" or "triton" of ours.
        graph: whether a CUDA graph of it is replayed.
        half: another contender than the one above it only where x has two bytes.
        needs: a package without which it is skipped.
    """

    name: str
    kind: str
    computes: str
    make: Callable[[LayerTensors], nn.Module]
    backend: str | None = None
    graph: bool = False
    half: bool = False
    needs: str | None = None

    @property
    def knows_dropout(self) -> bool:
        """Whether it drops x in front of its adapter, or has none."""
        return self.kind in ("frozen", "lora", "torch", "triton") and not self.graph

    @property
    def ratios_to(self) -> dict[str, str]:
        """Quantity -> the contender that it refers to, launched in the same way; GOAT's to LoRA too."""
        graph = ", CUDA graph" if self.graph else ""
        to_lora = {"lora_ratio": LORA + graph, "half_lora_ratio": HALF_LORA + graph} if self.computes in FORMS else {}
        return {"ratio": FROZEN + graph, **to_lora}

    def skipped_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None, or why it cannot be timed here."""
        if (self.graph or self.kind == "unsloth") and device.type != "cuda":
            return "CUDA graphs need a GPU" if self.graph else "it needs a GPU"
        if self.kind == "compiled" and device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler on a CPU"
        return why_not(self.needs, self.backend, device, dtype)

    def modes(self, modes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``modes`` that it can run: a compiled backward does not run twice on one forward."""
        return tuple(mode for mode in modes if self.kind != "compiled" or mode != "backward")


def why_not(needs: str | None, backend: str | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why something that needs a package and a backend of ours cannot be timed here."""
    if needs is not None and importlib.util.find_spec(needs) is None:
        return f"the package {needs} is not installed"
    if backend == "triton" and device.type != "cuda":
        return "the Triton kernels run on a GPU; in Triton's interpreter there is nothing to time"
    try:
        resolve_backend(backend or "torch", device, dtype)
    except RuntimeError as error:
        return str(error)
    return None


def _frozen(t: LayerTensors) -> nn.Module:
    return frozen_linear(t.weight_MN, t.bias_M)


def _lora(t: LayerTensors) -> nn.Module:
    return peft_lora(_frozen(t), t.lora_A, t.lora_B, SCALING, t.dropout_p)


def _half_lora(t: LayerTensors) -> nn.Module:
    return peft_lora(_frozen(t), t.lora_A.to(t.x_TN.dtype), t.lora_B.to(t.x_TN.dtype), SCALING, t.dropout_p)


def _loop(t: LayerTensors) -> nn.Module:
    return ExpertLoop(frozen_linear(t.folded_MN, t.bias_M), t.lora_A, t.lora_B, t.router, SCALING, t.top_k)


def _unsloth(t: LayerTensors) -> nn.Module:
    return UnslothLora(_frozen(t), t.lora_A, t.lora_B, SCALING)


def goat_layer(t: LayerTensors, form: str, backend: str) -> GoatLinear:
    """``GoatLinear`` around these tensors, without a singular value decomposition.

    "fold" is a layer over the folded weight that has no frozen pair: what a folded layer runs.
    """
    R, N = t.lora_A.shape
    layer = GoatLinear(
        N,
        t.lora_B.shape[0],
        r=R,
        num_experts=t.router.shape[0],
        top_k=t.top_k,
        scaling=SCALING,
        init="goat" if form == "path" else "lora",
        residual=form,
        dropout=t.dropout_p,
        balance_coefficient=BALANCE_COEFFICIENT,
        backend=backend,
        device="meta",
        dtype=t.weight_MN.dtype,
    )
    values = {name: getattr(t, name).detach().clone() for name in ("lora_A", "lora_B", "router")}
    values |= {"weight": t.weight_MN if form == "path" else t.folded_MN, "bias": t.bias_M}
    if form == "path":
        values |= {"residual_A": t.residual_A, "residual_B": t.residual_B}
    layer.load_state_dict(values, assign=True, strict=False)
    return layer


def _goat(form: str, backend: str, kind: str) -> Contender:
    def make(t: LayerTensors) -> nn.Module:
        layer = goat_layer(t, form, backend)
        # Whole or not at all: a part that silently runs as it is would be timed as compiled.
        return torch.compile(layer, fullgraph=True) if kind == "compiled" else layer

    suffix = {"compiled": ", compiled", "graph": ", CUDA graph"}.get(kind, "")
    return Contender(f"GOAT {form}, {backend}{suffix}", kind, form, make, backend=backend, graph=kind == "graph")


CONTENDERS: tuple[Contender, ...] = (
    Contender(FROZEN, "frozen", "frozen", _frozen),
    Contender(f"{FROZEN}, CUDA graph", "frozen", "frozen", _frozen, graph=True),
    Contender(LORA, "lora", "lora", _lora, needs="peft"),
    Contender(HALF_LORA, "lora", "lora", _half_lora, half=True, needs="peft"),
    Contender(f"{LORA}, CUDA graph", "lora", "lora", _lora, graph=True, needs="peft"),
    Contender(f"{HALF_LORA}, CUDA graph", "lora", "lora", _half_lora, graph=True, half=True, needs="peft"),
    Contender("Unsloth LoRA", "unsloth", "lora", _unsloth, needs="unsloth"),
    Contender("expert loop", "loop", "fold", _loop),
    *(
        _goat(form, backend, kind)
        for backend, kind in (("torch", "torch"), ("torch", "compiled"), ("triton", "triton"), ("triton", "graph"))
        for form in FORMS
    ),
)

KINDS = tuple(dict.fromkeys(contender.kind for contender in CONTENDERS))


# --- one call of a layer ----------------------------------------------------------------------------------------------


def outputs_of(layer: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(what the layer computed, the gradient of each): y, and the balance loss where the layer hands it out.

    ``GoatLinear`` injects its balance loss in backward; a layer that leaves it to the trainer has it as ``loss``.
    """
    y = layer(x)
    loss = getattr(layer, "loss", None)
    if loss is None:
        return [y], [grad_y]
    return [y, loss], [grad_y, torch.full_like(loss, BALANCE_COEFFICIENT)]


def differentiated(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """x and the trainable parameters, in the order in which the layer registered them."""
    return [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]


def call_of(mode: str, layer: nn.Module, x: Tensor, grad_y: Tensor) -> Callable[[], object]:
    """What is timed.

    Args:
        mode: "forward" keeps what the backward needs; "backward" has run the forward before; "both"; "inference"
            keeps nothing.
        layer: the contender.
        x: [T, N].
        grad_y: [T, M].
    """
    # A leaf of its own: autograd keeps, with a leaf, the stream on which it was first used, and a capture on another
    # stream would have to wait for that one.
    x = x.detach().requires_grad_()
    if mode == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return infer
    if mode == "forward":
        return lambda: layer(x)
    inputs = differentiated(layer, x)
    if mode == "backward":
        outputs, gradients = outputs_of(layer, x, grad_y)
        return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs, gradients = outputs_of(layer, x, grad_y)
        return torch.autograd.grad(outputs, inputs, gradients)

    return forward_and_backward


# --- the check ----------------------------------------------------------------------------------------------------


def expected_results(computes: str, t: LayerTensors) -> list[Tensor]:
    """float64 [y, dX, dA, dB, drouter] of what a contender computes, as far as it has them."""
    weight = t.folded_MN if computes == "fold" else t.weight_MN
    parameters = {"frozen": (), "lora": (t.lora_A, t.lora_B)}.get(computes, (t.lora_A, t.lora_B, t.router))
    x, *leaves = (leaf.detach().double().requires_grad_() for leaf in (t.x_TN, *parameters))
    weight, bias = weight.double(), t.bias_M.double()
    if computes in FORMS:
        residual = (t.residual_A.double(), t.residual_B.double()) if computes == "path" else None
        oracle = goat_reference(x, weight, *leaves, bias=bias, scaling=SCALING, top_k=t.top_k, residual=residual)
        y, balance_loss = oracle.output, oracle.balance_loss
    else:
        y, balance_loss = F.linear(x, weight, bias), 0.0
        if computes == "lora":
            y = y + SCALING * (x @ leaves[0].t()) @ leaves[1].t()
    objective = (y * t.grad_y_TM.double()).sum() + BALANCE_COEFFICIENT * balance_loss
    return [y.detach(), *torch.autograd.grad(objective, [x, *leaves])]


def layer_error(layer: nn.Module, t: LayerTensors, expected: list[Tensor]) -> float:
    """The largest relative error of the layer's results; NaN where anything is NaN."""
    outputs, gradients = outputs_of(layer, t.x_TN, t.grad_y_TM)
    of_inputs = torch.autograd.grad(outputs, differentiated(layer, t.x_TN), gradients)
    return results_error([outputs[0].detach(), *of_inputs], t, expected)


def results_error(results: list[Tensor], t: LayerTensors, expected: list[Tensor]) -> float:
    """The largest relative error of [y, gradients of x and of the parameters], or of its first or last part."""
    E = t.router.shape[0]
    if len(results) > 5:  # an expert's A and B are each a parameter of its own
        *first, router = results
        of_A, of_B = first[-2 * E : -E], first[-E:]
        results = [*first[: -2 * E], torch.cat(of_A), torch.cat(of_B, dim=1), router]
    return worst(relative_error(result, oracle) for result, oracle in zip(results, expected, strict=True))


def error_bound(dtype: torch.dtype) -> float:
    """On every contender's error."""
    return TOLERANCES[dtype].relative
