"""What only a GPU can show of the Triton backend: sizes of real use, repetition bit for bit, CUDA graphs, streams.

Everything in the other ``test_triton_*`` files runs on the GPU too, where there is one, through the ``device`` fixture.
"""

from __future__ import annotations

import pytest
import torch
from goat_problems import Problem, assert_close, make_problem, selection_mismatch
from triton_cases import MANY_PROCESSORS, ONE_PROCESSOR, Recorder, audited, matmul_precision, routing

from goat_kernels import goat_linear, goat_reference
from goat_kernels.backends import resolve_backend
from goat_kernels.numerics import SELECTION_GAP, TOLERANCES, relative_error
from goat_kernels.reference import select_top_k

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "router")
ADAPTER = ("x", "lora_A", "lora_B", "router")


def large_problem(device, dtype=BF16, *, T=4096, N=1024, M=1024, R=32, R0=32, K=2, **options) -> Problem:
    """A layer of real size with float32 adapters, on ``device``; nothing requires grad."""
    problem = make_problem(T, N, M, R, E=8, K=K, R0=R0, dtype=dtype, adapter_dtype=F32, **options)
    return problem.map(lambda tensor: tensor.to(device))


def gradient_like(output: torch.Tensor, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(output.device).manual_seed(seed)
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=F32).to(output.dtype)


def require(problem: Problem, names=NAMES) -> list[torch.Tensor]:
    """The named tensors, which require grad from now on."""
    return [getattr(problem, name).requires_grad_() for name in names]


def step(problem: Problem, inputs, grad_y, *, function=goat_linear, balance_share=0.7, **options) -> dict:
    """Forward and backward: output, balance loss, and the gradient of each of ``inputs``."""
    result = function(
        *(problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router),
        bias=problem.bias,
        scaling=problem.scaling,
        top_k=problem.top_k,
        residual=problem.residual,
        **options,
    )
    share = torch.full_like(result.balance_loss, balance_share)
    gradients = torch.autograd.grad([result.output, result.balance_loss], inputs, [grad_y, share])
    return {"output": result.output.detach(), "balance": result.balance_loss.detach(), "gradients": list(gradients)}


def flat(results: dict) -> list[torch.Tensor]:
    return [results["output"], results["balance"], *results["gradients"]]


def gate_of(recorder: Recorder) -> torch.Tensor:
    """[E, T], as the one forward of ``recorder`` wrote it."""
    (launch,) = [v for v in recorder.launches if v.name in ("fused_forward", "route_and_prefill")]
    return launch.arguments["gate_ptr"]


def assert_same_kernels(first: dict, second: dict, dtype=BF16) -> None:
    """What the Triton kernels alone write, bit for bit; the vendor's products may take another algorithm."""
    for name, a, b in zip(("output", "balance", *NAMES), flat(first), flat(second), strict=True):
        if name in ("balance", "lora_A", "lora_B", "router"):
            assert torch.equal(a, b), name
        else:
            assert_close(name, a, b, dtype)


def assert_identical(first: dict, second: dict) -> None:
    for number, (a, b) in enumerate(zip(flat(first), flat(second), strict=True)):
        assert torch.equal(a, b), number


# --- real sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["default", "fused", "staged"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_large_layers_agree_with_the_oracle_and_err_at_most_twice_as_much_as_torch(dtype, form, device):
    problem = large_problem(device, dtype, T=2048, N=1024, M=768, per_expert=form == "staged")
    inputs = require(problem)
    grad_y = gradient_like(torch.empty(2048, 768, device=device, dtype=dtype))
    target = {"default": None, "fused": ONE_PROCESSOR, "staged": MANY_PROCESSORS}[form]
    with audited(target, Recorder()) as recorder:
        found = step(problem, inputs, grad_y, backend="triton")
    torchs = step(problem, inputs, grad_y, backend="torch")

    logits = problem.x.detach().double() @ problem.router.detach().double().t()
    selection, _, _ = routing(logits, gate_of(recorder), problem.top_k)
    exact = problem.double()
    oracle = step(exact, require(exact), grad_y.double(), function=goat_reference, selection=selection)
    floor = 8 * torch.finfo(F32).eps  # sums of a thousand terms, in an order of their own
    for name, a, b, c in zip(("output", "balance", *NAMES), flat(found), flat(torchs), flat(oracle), strict=True):
        error, of_torch = relative_error(a, c), relative_error(b, c)
        assert error <= TOLERANCES[F32 if name == "balance" else dtype].relative, (name, error)
        # A token or two of torch's own selection may differ from the oracle's, which only makes its error larger.
        assert error <= max(2 * of_torch, floor), (name, error, of_torch)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_large_routers_select_as_float64_does_but_for_ties_of_float32(dtype, device):
    problem = large_problem(device, dtype, T=16384, N=4096, M=16, R=8, R0=None)
    with torch.no_grad(), audited(observer=Recorder()) as recorder:
        goat_linear(
            *(problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router),
            scaling=1.0,
            top_k=2,
            backend="triton",
        )
    gate_ET = gate_of(recorder)
    logits = torch.cat([x.double() @ problem.router.double().t() for x in problem.x.split(2048)])
    chosen = gate_ET.t() > 0
    assert bool((chosen.sum(dim=1) == 2).all())
    assert selection_mismatch(logits, chosen, 2) <= SELECTION_GAP[F32]
    assert int((chosen != select_top_k(logits, 2)).any(dim=1).sum()) <= 2


@pytest.mark.parametrize("target", [ONE_PROCESSOR, MANY_PROCESSORS], ids=["fused", "staged"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_many_inputs_do_not_make_a_half_precision_router_less_exact_than_float32(dtype, target, device):
    """Matrix units cut off, always towards zero: one chain of products along so many inputs would be past the bound."""
    problem = large_problem(device, dtype, T=2048, N=16384, M=16, R=8, R0=None)
    with torch.no_grad(), audited(target, Recorder()) as recorder:
        goat_linear(
            *(problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router),
            scaling=1.0,
            top_k=2,
            backend="triton",
        )
    (launch,) = [v for v in recorder.launches if v.name in ("fused_forward", "route_and_prefill")]
    gate_ET, probs_ET = launch.arguments["gate_ptr"], launch.arguments["probs_ptr"]
    logits = problem.x.double() @ problem.router.double().t()
    _, gate, probs = routing(logits, gate_ET, 2)
    assert relative_error(probs_ET.t(), probs) <= TOLERANCES[F32].relative
    assert relative_error(gate_ET.t(), gate) <= TOLERANCES[F32].relative


@pytest.mark.parametrize("wide", ["inputs", "outputs"])
def test_tensors_of_more_than_two_to_the_31_elements(wide, device):
    free, _ = torch.cuda.mem_get_info()
    if free < 48 * 2**30:
        pytest.skip("needs 48 GiB of GPU memory")
    T, N, M = (131_077, 16_400, 48) if wide == "inputs" else (131_077, 48, 16_400)
    assert T * max(N, M) > 2**31
    problem = large_problem(device, T=1, N=N, M=M, R=16, R0=16)
    x = torch.randn(T, N, device=device, dtype=BF16)
    grad_y = torch.randn(T, M, device=device, dtype=BF16)
    parameters = [getattr(problem, name).requires_grad_() for name in ("lora_A", "lora_B", "router")]

    def run(x, grad_y, backend):
        x = x.detach().requires_grad_()
        output, _ = goat_linear(
            *(x, problem.weight, *parameters),
            bias=problem.bias,
            scaling=problem.scaling,
            top_k=2,
            residual=problem.residual,
            backend=backend,
        )
        return output.detach(), *torch.autograd.grad(output, [x, *parameters], grad_y)

    output, grad_x, *found = run(x, grad_y, "triton")
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, T, 16_384):
        rows = slice(start, start + 16_384)
        expected_output, expected_grad_x, *gradients = run(x[rows], grad_y[rows], "torch")
        assert_close(f"output from row {start}", output[rows], expected_output, BF16)
        assert_close(f"gradient of x from row {start}", grad_x[rows], expected_grad_x, BF16)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    for name, gradient, total in zip(("lora_A", "lora_B", "router"), found, sums, strict=True):
        assert_close(name, gradient, total, BF16)


# --- repetition, graphs, streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_two_runs_are_bitwise_equal(dtype, dropout_p, device):
    problem = large_problem(device, dtype)
    inputs = require(problem)
    grad_y = gradient_like(torch.empty(4096, 1024, device=device, dtype=dtype))
    runs = []
    for _ in range(3):
        torch.manual_seed(3)
        runs.append(step(problem, inputs, grad_y, backend="triton", dropout_p=dropout_p, training=True))
        torch.rand(1 << 22, device=device)  # other memory is in the allocator's hands the next time
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])


def captured(function):
    """(graph, what ``function`` returned while it was captured), after three runs to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("T", [16, 64, 65, 4096])
@pytest.mark.parametrize("R0", [None, 32], ids=["fold", "path"])
def test_a_cuda_graph_of_a_step_replays_to_what_eager_computes(R0, T, device):
    problem = large_problem(device, T=T, R0=R0)
    inputs = require(problem)
    grad_y = gradient_like(torch.empty(T, 1024, device=device, dtype=BF16))
    graph, results = captured(lambda: step(problem, inputs, grad_y, backend="triton"))
    for seed in (5, 6):
        with torch.no_grad():
            problem.x.copy_(gradient_like(problem.x, seed))
            problem.lora_B.mul_(1.5)
        graph.replay()
        replayed = {
            "output": results["output"].clone(),
            "balance": results["balance"].clone(),
            "gradients": [gradient.clone() for gradient in results["gradients"]],
        }
        assert_same_kernels(replayed, step(problem, inputs, grad_y, backend="triton"))


def mask_disagreement(output, grad_y, parameters, gradients) -> float:
    """How far <dY, y> is from <lora_A, dlora_A> and <lora_B, dlora_B>, of a y that is linear in each of them.

    In units of what <dY, y> would be for independent entries, which is also what two different masks would differ by.
    """
    by_output = float((output.double() * grad_y.double()).sum())
    pairs = zip(parameters, gradients, strict=True)
    by_gradients = [float((parameter.detach().double() * gradient.double()).sum()) for parameter, gradient in pairs]
    unit = float(output.double().norm() * grad_y.double().norm()) / output.numel() ** 0.5
    return max(abs(by_output - by_gradient) for by_gradient in by_gradients) / unit


@pytest.mark.parametrize("K", [2, 3])
def test_every_replay_drops_anew_and_its_backward_drops_the_same(K, device):
    problem = large_problem(device, T=512, R0=None, K=K, bias=False)
    problem.weight.zero_()  # what is left is linear in lora_A and in lora_B
    inputs = require(problem, ("lora_A", "lora_B"))
    grad_y = gradient_like(torch.empty(512, 1024, device=device, dtype=BF16))
    options = {"backend": "triton", "dropout_p": 0.5, "training": True, "balance_share": 0.0}
    graph, results = captured(lambda: step(problem, inputs, grad_y, **options))
    outputs, others = [], []
    for _ in range(3):
        graph.replay()
        outputs.append(results["output"].clone())
        assert mask_disagreement(outputs[-1], grad_y, inputs, results["gradients"]) < 0.05
        others.append(mask_disagreement(outputs[0], grad_y, inputs, results["gradients"]))
    assert max(others) > 0.1, "the test would not notice another mask in the backward"
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("T", [16, 4096])
def test_no_step_synchronises(T, dropout_p, device):
    problem = large_problem(device, T=T, per_expert=True)
    inputs = require(problem)
    grad_y = gradient_like(torch.empty(T, 1024, device=device, dtype=BF16))
    options = {"backend": "triton", "dropout_p": dropout_p, "training": True}
    step(problem, inputs, grad_y, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(problem, inputs, grad_y, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_is_respected(device):
    problem = large_problem(device)
    inputs = require(problem)
    grad_y = gradient_like(torch.empty(4096, 1024, device=device, dtype=BF16))
    expected = step(problem, inputs, grad_y, backend="triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows must wait on this stream, not run on another
        found = step(problem, inputs, grad_y, backend="triton")
    stream.synchronize()
    assert_same_kernels(found, expected)


def test_tensors_on_another_device_than_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for index in (0, 1):
        problem = large_problem(torch.device("cuda", index), T=300)
        inputs = require(problem)
        grad_y = gradient_like(torch.empty(300, 1024, dtype=BF16)).to(problem.x.device)
        with torch.cuda.device(0):
            found = step(problem, inputs, grad_y, backend="triton")
            assert torch.cuda.current_device() == 0
        assert {tensor.device.index for tensor in flat(found)} == {index}
        results.append([tensor.cpu() for tensor in flat(found)])
    for number, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(str(number), a, b, BF16)


# --- what a compiler specialises on ---------------------------------------------------------------------------------


def test_the_number_of_tokens_compiles_nothing_anew(device, monkeypatch):
    import triton

    compiled = []

    def remember(*arguments, **options) -> None:
        compiled.append(options.get("repr", arguments))

    def run(T):
        problem = large_problem(device, T=T)
        step(problem, require(problem), gradient_like(problem.x), backend="triton")

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", remember)
    for T in (40_000, 40_001, 40_016):
        run(T)
    known = len(compiled)
    for T in (40_003, 40_032, 41_984, 44_001):
        run(T)
    assert compiled[known:] == []


@pytest.mark.parametrize("T", [17, 300])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tensors_that_begin_at_odd_addresses(dtype, T, device):
    problem = large_problem(device, dtype, T=T, N=256, M=256)
    grad_y = gradient_like(torch.empty(T, 256, device=device, dtype=dtype))
    expected = step(problem, require(problem), grad_y, backend="triton")

    def shifted(tensor):
        begins_odd = torch.empty(tensor.numel() + 1, device=device, dtype=tensor.dtype)[1:].view(tensor.shape)
        assert begins_odd.data_ptr() % 16
        return begins_odd.copy_(tensor.detach())

    other = problem.map(lambda tensor: shifted(tensor) if tensor.ndim == 2 else tensor.detach().clone())
    found = step(other, require(other), shifted(grad_y), backend="triton")
    for name, a, b in zip(("output", "balance", *NAMES), flat(found), flat(expected), strict=True):
        assert_close(name, a, b, F32 if dtype == F32 else BF16)


# --- choices ------------------------------------------------------------------------------------------------------


def test_auto_picks_triton_on_a_gpu_and_torch_for_float64(device):
    for dtype in (F32, F16, BF16):
        assert resolve_backend("auto", device, dtype) == "triton"
    assert resolve_backend("auto", device, torch.float64) == "torch"
    problem = large_problem(device, T=100)
    with torch.no_grad(), audited(observer=Recorder()) as recorder:
        goat_linear(*(problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router), scaling=1.0, top_k=2)
    assert recorder.launches


@pytest.mark.parametrize("target", [ONE_PROCESSOR, MANY_PROCESSORS], ids=["fused", "staged"])
def test_tf32_is_taken_where_pytorch_allows_it_but_not_for_the_router(target, device):
    problem = large_problem(device, F32, T=1024)
    inputs = require(problem)
    grad_y = gradient_like(torch.empty(1024, 1024, device=device))
    exact = problem.double()
    results, gates = {}, {}
    for precision in ("ieee", "tf32"):
        with matmul_precision(precision), audited(target, Recorder()) as recorder:
            results[precision] = step(problem, inputs, grad_y, backend="triton")
        kinds = {v.constants["PRECISION"] for v in recorder.launches if "PRECISION" in v.constants}
        assert kinds == {precision}
        gates[precision] = gate_of(recorder)
    assert torch.equal(gates["ieee"], gates["tf32"]), "the router's logits keep their bits"
    selection = gates["ieee"].t() > 0
    oracle = step(exact, require(exact), grad_y.double(), function=goat_reference, selection=selection)
    for name, a, b, c in zip(
        ("output", "balance", *NAMES), flat(results["ieee"]), flat(results["tf32"]), flat(oracle), strict=True
    ):
        assert relative_error(a, c) <= TOLERANCES[F32].relative, name
        assert relative_error(b, c) <= 4e-3, name  # tf32 has float16's 10 bits
        if name in ("output", "lora_A", "lora_B"):
            assert not torch.equal(a, b), f"{name}: tf32 was allowed and not taken"
