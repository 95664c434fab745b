"""Forward + backward of a GOAT layer over the frozen linear layer, beside PEFT's LoRA and the expert loop.

    python -m bench.layer                    the README's table, on this machine's CPU
    python -m bench.layer --rounds 31 --shape 512,2048,2048,16

All contenders see the same x, weight, bias and output gradient, float32, adapters of the same total rank R, E = 8,
K = 2, dropout off, balance loss on for GOAT. The frozen layer computes its output and dX. Before anything is timed,
each GOAT contender is checked against the oracle on these very inputs. What is reported is the median over the
rounds of (time / time of the frozen layer in the same round).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from bench.timing import Timing, machine_and_versions, time_interleaved
from goat_kernels import GoatLinear, goat_reference
from goat_kernels.numerics import TOLERANCES, relative_error

#: (T, N, M, R). The first three are the project's targets; the others were not looked at while the code was written.
TARGET_SHAPES = ((1536, 768, 768, 32), (1024, 768, 3072, 32), (512, 2048, 2048, 16))
OTHER_SHAPES = (
    (2048, 384, 1536, 16),
    (640, 1024, 1024, 64),
    (3200, 768, 768, 8),
    (768, 3072, 768, 32),
    (256, 4096, 4096, 8),
)

NUM_EXPERTS, TOP_K = 8, 2
FROZEN, LORA, ORACLE = "frozen linear", "PEFT LoRA", "expert loop"


def make_contenders(T: int, N: int, M: int, R: int) -> dict[str, Callable[[], None]]:
    """Name -> one forward + backward step on shared inputs; the GOAT layers have been checked."""
    torch.manual_seed(0)
    linear = nn.Linear(N, M).requires_grad_(False)
    x = torch.randn(T, N, requires_grad=True)
    grad_y = torch.randn(T, M)
    lora = inject_adapter_in_model(LoraConfig(r=R, target_modules=["0"]), nn.Sequential(_copy(linear)))
    options = {"r": R, "num_experts": NUM_EXPERTS, "top_k": TOP_K, "balance_coefficient": 1e-3}
    fold = GoatLinear.from_linear(_copy(linear), residual="fold", **options)
    path = GoatLinear.from_linear(_copy(linear), residual="path", **options)
    path.load_state_dict(fold.state_dict())
    for layer in (fold, path):
        _check(layer, x, grad_y)

    def step(layer: nn.Module) -> Callable[[], None]:
        parameters = [p for p in layer.parameters() if p.requires_grad]

        def run() -> None:
            torch.autograd.grad(layer(x), [x, *parameters], grad_y)

        return run

    return {
        FROZEN: step(linear),
        LORA: step(lora),
        "GOAT fold": step(fold),
        "GOAT path": step(path),
        ORACLE: step(ExpertLoop(path)),
    }


class ExpertLoop(nn.Module):
    """The algorithm of the public implementation: a Python loop over the experts (the oracle, on the folded weight)."""

    def __init__(self, layer: GoatLinear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight - layer.residual_B @ layer.residual_A)
        self.register_buffer("bias", layer.bias)
        self.lora_A, self.lora_B, self.router = (
            nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B, layer.router)
        )
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        return goat_reference(
            x, self.weight, self.lora_A, self.lora_B, self.router, bias=self.bias, scaling=self.scaling, top_k=TOP_K
        ).output


def _copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features)
    copy.load_state_dict(linear.state_dict())
    return copy.requires_grad_(False)


def _check(layer: GoatLinear, x: Tensor, grad_y: Tensor) -> None:
    """Raise unless output and gradients are within rounding of the oracle in float64."""
    parameters = (layer.lora_A, layer.lora_B, layer.router)
    output = layer(x)
    gradients = torch.autograd.grad(output, (x, *parameters), grad_y)
    x64, A, B, router = (t.detach().double().requires_grad_() for t in (x, *parameters))
    oracle = goat_reference(
        x64,
        layer.to_linear().weight.detach().double(),
        A,
        B,
        router,
        bias=layer.bias.double(),
        scaling=layer.scaling,
        top_k=TOP_K,
        residual=(layer.residual_A.double(), layer.residual_B.double()),
    )
    objective = (oracle.output * grad_y.double()).sum() + layer.balance_coefficient * oracle.balance_loss
    expected = torch.autograd.grad(objective, (x64, A, B, router))
    errors = [
        relative_error(a.detach(), b.detach())
        for a, b in zip((output, *gradients), (oracle.output, *expected), strict=True)
    ]
    bound = TOLERANCES[x.dtype].relative
    if not max(errors) <= bound:
        raise AssertionError(f"the layer is {max(errors):.1e} away from the oracle, allowed is {bound:.0e}; not timed")


def table(results: dict[tuple[int, int, int, int], dict[str, Timing]]) -> str:
    """Markdown: one row per shape, the median ratio to the frozen layer per contender, and GOAT over LoRA."""
    names = [n for n in next(iter(results.values())) if n != FROZEN]
    goat = [n for n in names if n.startswith("GOAT")]
    head = ["T", "N -> M", "R", "frozen, ms", *names, *(f"{n} / LoRA" for n in goat)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (T, N, M, R), timings in results.items():
        cells = [str(T), f"{N} -> {M}", str(R), f"{timings[FROZEN].median_ms:.1f}"]
        cells += [f"{timings[n].median_ratio:.2f}" for n in names]
        cells += [f"{_median_of_ratio(timings[n], timings[LORA]):.2f}" for n in goat]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median_of_ratio(one: Timing, other: Timing) -> float:
    ratios = sorted(a / b for a, b in zip(one.time_ms, other.time_ms, strict=True))
    return ratios[len(ratios) // 2]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="rounds per shape (default 31)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument(
        "--shape",
        action="append",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="T,N,M,R; may be given several times (default: the README's shapes)",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = {}
    for shape in options.shape or (*TARGET_SHAPES, *OTHER_SHAPES):
        contenders = make_contenders(*shape)
        results[shape] = time_interleaved(contenders, base=FROZEN, rounds=options.rounds, label=str(shape))
    print(f"\nmedian of {options.rounds} rounds, forward + backward, float32, {machine_and_versions()}\n")
    print(table(results))


if __name__ == "__main__":
    main()
