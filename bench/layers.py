"""The layer's contenders on shared tensors, and the suites ``layer``, ``scaling`` and ``memory`` that measure them.

Adding a contender is adding an entry to ``CONTENDERS``. It comes with the function that it computes: "frozen", "lora",
or GOAT with the residual as "fold" or "path"; the check holds it to that, in float64 on these very tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import FORMS, BenchSettings, Case, copies_of
from bench.memory import peak_bytes, saved_bytes
from bench.steps import Candidate, measured, worst
from bench.timing import in_words
from goat_kernels.backends import why_not_auto
from goat_kernels.checks.problem import Problem, make_problem
from goat_kernels.linear import GoatLinear
from goat_kernels.numerics import relative_error
from goat_kernels.reference import goat_reference

#: s, of every contender.
SCALING = 2.0

#: Of the balance loss; the paper's.
BALANCE_COEFFICIENT = 1e-3

FROZEN = "frozen linear"
LORA, HALF_LORA = "PEFT LoRA", "PEFT LoRA, adapter in x's dtype"
GRAPH = ", CUDA graph"


def layer_problem(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """What all contenders of a shape share: the tensors of a "path" layer without dropout."""
    problem = make_problem(dataclasses.replace(case, dropout_p=0.0).layer(dtype, "path"), device)
    problem.x_TN.requires_grad_()
    return problem


def folded(p: Problem) -> Problem:
    """The same layer with W0 - B0 A0 in the weight's dtype, and no frozen pair."""
    correction_MN = p.adapter.residual_B.double() @ p.adapter.residual_A.double()
    weight_MN = (p.weight_MN.double() - correction_MN).to(p.weight_MN.dtype)
    adapter = p.adapter._replace(residual_A=None, residual_B=None)
    return dataclasses.replace(p, weight_MN=weight_MN, adapter=adapter)


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
    """

    name: str
    kind: str
    computes: str
    make: Callable[[Problem], nn.Module]
    backend: str | None = None
    graph: bool = False

    def runs(self, case: Case, settings: BenchSettings) -> bool:
        """Whether it is asked for: by the case's forms and dropout, by the settings, by the size of x's elements."""
        is_eager = self.kind in ("frozen", "lora", "torch", "triton") and not self.graph
        return (
            self.kind not in settings.without
            and (self.computes not in FORMS or self.computes in case.forms)
            and (not self.name.startswith(HALF_LORA) or settings.dtype.itemsize == 2)  # else it is LORA again
            and (not case.dropout_p or is_eager)
            and (not case.varied or self.kind != "compiled")  # which takes seconds for each shape
        )

    @property
    def ratios_to(self) -> dict[str, str]:
        """Quantity -> the contender that it refers to, launched in the same way; GOAT's to LoRA too."""
        graph = GRAPH if self.graph else ""
        to_lora = {"lora_ratio": LORA + graph, "half_lora_ratio": HALF_LORA + graph} if self.computes in FORMS else {}
        return {"ratio": FROZEN + graph, **to_lora}

    def skipped_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None, or why it cannot be timed here."""
        if self.graph and device.type != "cuda":
            return "CUDA graphs need a GPU"
        if self.kind == "compiled" and device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler on a CPU"
        return why_not(self.backend, device, dtype)


def why_not(backend: str | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why what runs on a backend of ours, or on none, cannot be timed here."""
    if backend == "triton" and device.type != "cuda":
        return "the Triton kernels run on a GPU; in Triton's interpreter there is nothing to time"
    return why_not_auto(backend or "torch", device, dtype)


# --- the contenders -------------------------------------------------------------------------------------------------


def _frozen(p: Problem) -> nn.Linear:
    """``nn.Linear`` around these very tensors, without gradients for them."""
    M, N = p.weight_MN.shape
    linear = nn.Linear(N, M, bias=p.bias_M is not None, device="meta")
    linear.weight = nn.Parameter(p.weight_MN, requires_grad=False)
    linear.bias = None if p.bias_M is None else nn.Parameter(p.bias_M, requires_grad=False)
    return linear


def _lora(p: Problem, *, half: bool = False) -> nn.Module:
    """PEFT's own LoRA layer with copies of A and B, in float32 or (``half``) in x's dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    A, B = (matrix.detach().clone().to(p.x_TN.dtype if half else matrix.dtype) for matrix in p.adapter[:2])
    R = A.shape[0]
    config = LoraConfig(r=R, lora_alpha=SCALING * R, lora_dropout=p.adapter.dropout_p, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(_frozen(p)))[0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(A), nn.Parameter(B)
    return layer


class ExpertLoop(nn.Module):
    """What the public implementation does (``TopKMoELayer`` of GOAT-PEFT), in our words.

    Softmax over all experts, ``topk``, weights renormalised; the first expert runs on all tokens to find the shape of
    the result; then for each expert ``torch.where`` finds its tokens (which makes the host wait for the GPU), gathers
    them, runs two small products and adds what comes out. The weight has W_res folded in. Adapter and router are
    float32 and x is cast to that, as PEFT does.

    Attributes:
        loss: the last forward's balance loss, which the trainer adds to its own.
    """

    loss: Tensor | None = None

    def __init__(self, p: Problem) -> None:
        super().__init__()
        lora_A, lora_B, router, *_ = p.adapter
        self.base, self.top_k = _frozen(folded(p)), p.adapter.top_k
        E = router.shape[0]
        self.lora_A = nn.ParameterList(A.detach().clone() for A in lora_A.chunk(E, dim=0))
        self.lora_B = nn.ParameterList(B.detach().contiguous().clone() for B in lora_B.chunk(E, dim=1))
        self.router = nn.ParameterList([router.detach().clone()])  # after A and B among the parameters

    def forward(self, x_TN: Tensor) -> Tensor:
        base_TM = self.base(x_TN)
        (router,) = self.router
        x_TN = x_TN.to(router.dtype)
        probs_TE = F.softmax(F.linear(x_TN, router), dim=-1)
        weights_TK, experts_TK = torch.topk(probs_TE, self.top_k)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        added_TM = torch.zeros_like(self._expert(0, x_TN))
        for expert in range(len(self.lora_A)):
            tokens, slots = torch.where(experts_TK == expert)
            added_TM[tokens] += weights_TK[tokens, slots, None] * self._expert(expert, x_TN[tokens])
        E = len(router)
        share_E = F.one_hot(experts_TK, E).float().mean(dim=0).sum(dim=0)
        self.loss = E * (share_E * probs_TE.mean(dim=0)).sum()
        return (base_TM + added_TM).to(base_TM.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A[index]), self.lora_B[index]) * SCALING


def goat_layer(p: Problem, form: str, backend: str) -> GoatLinear:
    """``GoatLinear`` around these tensors, without a singular value decomposition.

    "fold" is a layer over the folded weight that has no frozen pair: what a folded layer runs.
    """
    if form == "fold":
        p = folded(p)
    adapter = p.adapter
    layer = GoatLinear(
        *p.weight_MN.shape[::-1],
        r=adapter.rank,
        num_experts=adapter.num_experts,
        top_k=adapter.top_k,
        scaling=SCALING,
        init="goat" if form == "path" else "lora",
        residual=form,
        dropout=adapter.dropout_p,
        balance_coefficient=BALANCE_COEFFICIENT,
        backend=backend,
        device="meta",
        dtype=p.weight_MN.dtype,
    )
    values = {name: getattr(adapter, name).detach().clone() for name in ("lora_A", "lora_B", "router")}
    values |= {"weight": p.weight_MN, "bias": p.bias_M}
    if form == "path":
        values |= {"residual_A": adapter.residual_A, "residual_B": adapter.residual_B}
    layer.load_state_dict(values, assign=True, strict=False)
    return layer


def _goat(form: str, backend: str, kind: str) -> Contender:
    def make(p: Problem) -> nn.Module:
        layer = goat_layer(p, form, backend)
        # Whole or not at all: a part that silently runs as it is would be timed as compiled.
        return torch.compile(layer, fullgraph=True) if kind == "compiled" else layer

    suffix = {"compiled": ", compiled", "graph": GRAPH}.get(kind, "")
    return Contender(f"GOAT {form}, {backend}{suffix}", kind, form, make, backend=backend, graph=kind == "graph")


_half_lora = functools.partial(_lora, half=True)

CONTENDERS: tuple[Contender, ...] = (
    Contender(FROZEN, "frozen", "frozen", _frozen),
    Contender(FROZEN + GRAPH, "frozen", "frozen", _frozen, graph=True),
    Contender(LORA, "lora", "lora", _lora),
    Contender(HALF_LORA, "lora", "lora", _half_lora),
    Contender(LORA + GRAPH, "lora", "lora", _lora, graph=True),
    Contender(HALF_LORA + GRAPH, "lora", "lora", _half_lora, graph=True),
    Contender("expert loop", "loop", "fold", ExpertLoop),
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
        return torch.no_grad()(lambda: layer(x))
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


def expected_results(computes: str, p: Problem) -> list[Tensor]:
    """float64 [y, dX, dA, dB, drouter] of what a contender computes, as far as it has them."""
    exact = (folded(p) if computes == "fold" else p).double()
    adapter, weight, bias = exact.adapter, exact.weight_MN, exact.bias_M
    parameters = {"frozen": (), "lora": adapter[:2]}.get(computes, adapter[:3])
    x, *leaves = (leaf.detach().requires_grad_() for leaf in (exact.x_TN, *parameters))
    if computes in FORMS:
        residual = (adapter.residual_A, adapter.residual_B) if computes == "path" else None
        oracle = goat_reference(x, weight, *leaves, bias=bias, scaling=SCALING, top_k=adapter.top_k, residual=residual)
        y, balance_loss = oracle.output, oracle.balance_loss
    else:
        y, balance_loss = F.linear(x, weight, bias), 0.0
        if computes == "lora":
            y = y + SCALING * (x @ leaves[0].t()) @ leaves[1].t()
    objective = (y * exact.grad_y_TM).sum() + BALANCE_COEFFICIENT * balance_loss
    return [y.detach(), *torch.autograd.grad(objective, [x, *leaves])]


def layer_error(layer: nn.Module, p: Problem, expected: list[Tensor]) -> float:
    """The largest relative error of the layer's results; NaN where anything is NaN."""
    outputs, gradients = outputs_of(layer, p.x_TN, p.grad_y_TM)
    of_inputs = torch.autograd.grad(outputs, differentiated(layer, p.x_TN), gradients)
    return results_error([outputs[0].detach(), *of_inputs], p.adapter.num_experts, expected)


def results_error(results: list[Tensor], E: int, expected: list[Tensor]) -> float:
    """The largest relative error of [y, gradients of x and of the parameters], or of its first or last part."""
    if len(results) > 5:  # an expert's A and B are each a parameter of its own
        *first, router = results
        of_A, of_B = first[-2 * E : -E], first[-E:]
        results = [*first[: -2 * E], torch.cat(of_A), torch.cat(of_B, dim=1), router]
    return worst(relative_error(result, oracle) for result, oracle in zip(results, expected, strict=True))


# --- the suites -----------------------------------------------------------------------------------------------------


def layer_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """In every mode of the case: check each contender on the case's tensors, then time those that are right.

    With dropout contenders draw masks of their own, and no result of a step is compared: in its place stand the results
    of the same contender without dropout, on the same tensors.
    """
    first = layer_problem(case, settings.dtype, settings.device)
    # Of what the frozen layer reads in a step: the least that a rotation has to push out of the cache.
    problems = copies_of(first, first.x_TN.nbytes + first.weight_MN.nbytes + first.grad_y_TM.nbytes, settings)
    common = {"copies": len(problems)}
    if case.dropout_p:
        problems = [dataclasses.replace(p, adapter=p.adapter._replace(dropout_p=case.dropout_p)) for p in problems]
        common["checked"] = "without dropout"
    expected = functools.cache(lambda computes: expected_results(computes, first))
    layer_on = functools.cache(lambda contender, copy: contender.make(problems[copy]))

    @functools.cache
    def error_without_dropout(contender: Contender) -> float:
        return layer_error(contender.make(first), first, expected(contender.computes))

    def candidate(contender: Contender, mode: str) -> Candidate:
        def call(copy: int) -> Callable[[], object]:
            return call_of(mode, layer_on(contender, copy), problems[copy].x_TN, problems[copy].grad_y_TM)

        def error(_: int, results: Tensor | tuple[Tensor, ...]) -> float:
            """Of the output of a forward, else of the gradients."""
            if case.dropout_p:
                return error_without_dropout(contender)
            output, *gradients = expected(contender.computes)
            if isinstance(results, Tensor):
                return results_error([results], case.E, [output])
            return results_error(list(results), case.E, gradients)

        row = {"contender": contender.name}
        return Candidate(row, call, error, graph=contender.graph, ratios=contender.ratios_to)

    run, skipped = contenders_here(case, settings)
    if any(contender.kind == "compiled" for contender in run):
        torch._dynamo.reset()  # a further shape would otherwise have it compile for symbolic sizes
    yield from skipped
    for mode in case.modes:
        # What torch.compile makes of a backward does not run twice on one forward.
        candidates = (candidate(one, mode) for one in run if (one.kind, mode) != ("compiled", "backward"))
        for row in measured(candidates, len(problems), settings):
            yield {**common, "mode": mode, **row}
        gc.collect()  # graphs of autograd remember the streams that they ran on


def contenders_here(case: Case, settings: BenchSettings) -> tuple[list[Contender], list[dict]]:
    """The contenders of a case that can run here; rows that say why the others do not."""
    asked = [contender for contender in CONTENDERS if contender.runs(case, settings)]
    reasons = {contender: contender.skipped_reason(settings.device, settings.dtype) for contender in asked}
    skipped = [{"contender": one.name, "skipped": reason} for one, reason in reasons.items() if reason is not None]
    return [one for one, reason in reasons.items() if reason is None], skipped


def memory_rows(case: Case, settings: BenchSettings) -> Iterator[dict]:
    """Bytes that each eager contender saves for backward, and the peak of a forward and backward, results included."""
    p = layer_problem(case, settings.dtype, settings.device)
    run, _ = contenders_here(case, settings)
    for contender in run:
        if contender.graph or contender.kind == "compiled":  # a graph's memory is reserved as long as it lives
            continue
        row = {"mode": "both", "contender": contender.name}
        try:
            layer = contender.make(p)
            step = call_of("both", layer, p.x_TN, p.grad_y_TM)
            step()  # workspaces and constants that stay
            not_counted = [*layer.parameters(), *layer.buffers(), p.x_TN]
            row["saved_for_backward_bytes"] = saved_bytes(functools.partial(layer, p.x_TN), not_counted)
            row["peak_mib"] = round(peak_bytes(step, settings.device) / 2**20, 3)
            yield {**row, "x_bytes": p.x_TN.nbytes}
        except Exception as failure:  # whatever a peer or a driver raises is a result, and others follow
            yield {**row, "failed": in_words(failure)}
