"""Where the Triton backend ends and what surrounds it: large offsets, no tokens, ranks and GPUs, launches and memory.

Nothing synchronises, sorts or uses atomics; what torch offers around a layer works (autocast, inference mode, compiled
graphs, two uses in one graph), and what the backend does not compute is refused by name.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import goat_problems
import pytest
import torch
from goat_problems import (
    TRAINABLE,
    assert_close,
    assert_outcomes_agree,
    assert_outcomes_identical,
    evaluate,
    make_problem,
    output_weights,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import MANY_PROCESSORS, ONE_PROCESSOR, Recorder, audited, goat_on, matmul_precision, moved, run_triton

import goat_kernels
from goat_kernels import GoatLinear, available_backends, backends, goat_linear
from goat_kernels.backends import resolve_backend, why_not_auto
from goat_kernels.forward_backward import Layer
from goat_kernels.functional import routed_linear
from goat_kernels.kernels.configs import KNOWN_TARGETS, invalid_reason
from goat_kernels.kernels.staged_forward import PREFILLED_COLUMNS
from goat_kernels.operators import (
    _backward,
    _forward,
    backward_operator,
    flattened,
    forward_operator,
)
from goat_kernels.passes import Adapter

PACKAGE = Path(goat_kernels.__file__).parent
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
HALF = {"dtype": BF16, "adapter_dtype": F32}
CPU = torch.device("cpu")


def tensors_of(problem) -> tuple:
    return problem.x, problem.weight, problem.lora_A, problem.lora_B, problem.router


def options_of(problem) -> dict:
    return {
        **{"bias": problem.bias, "scaling": problem.scaling, "top_k": problem.top_k, "residual": problem.residual},
        "backend": "triton",
    }


# --- offsets beyond 2^31 ------------------------------------------------------------------------------------------

#: Run in a process of its own, which dies where a kernel's offsets overflow. What it passed, it prints.
BEYOND_INT32 = '''
import mmap, sys
sys.path[:0] = "@tests@".split(":")
import torch
from goat_problems import make_problem
from test_triton_kernels import adapter_of
from triton_cases import MANY_PROCESSORS, ONE_PROCESSOR, Recorder, audited
from goat_kernels.kernels.passes import TritonPasses
from goat_kernels.numerics import relative_error

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def sparse(elements):
    """float16 memory whose pages do not exist before they are touched."""
    if device.type == "cuda":
        return torch.zeros(elements, dtype=torch.float16, device=device)
    no_reserve = 0x4000
    memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.float16)

def run(problem, target, T, x, grad_y, base, dropout_p):
    passes, (adapter, _) = TritonPasses(), adapter_of(problem, device, dropout_p)
    with audited(target, Recorder()) as recorder:
        y0, balance, routing = passes.prefill(x, adapter, None, base)
        gradient = passes.hidden_gradient(grad_y, None, adapter, routing, with_residual=True)
        needs = dict.fromkeys(("needs_A", "needs_B", "needs_router"), True)
        grads = passes.weight_gradients(x, grad_y, adapter, routing, gradient, **needs)
        grad_x = passes.input_prefill(adapter, routing, gradient)
    hidden = (gradient.grad_hidden_TR, gradient.logits_ET, gradient.residual_TR0)
    return recorder.names, [y0, balance, *routing, *hidden, *grads, grad_x]

def compare(form, target, T, N, M, strides, expected, K=2, dropout_p=0.0):
    problem = make_problem(T, N, M, R0=3, K=K, dtype=torch.float16, adapter_dtype=torch.float32)
    shift = 1 << 12  # the three tensors interleave in one allocation
    widest = max(N, M)
    flat = sparse((T - 1) * strides[0] + (widest - 1) * strides[1] + 3 * shift)
    assert (T - 1) * strides[0] + (widest - 1) * strides[1] > 2**31
    plain = [problem.x.to(device), *(torch.randn(T, M, dtype=torch.float16).to(device) for _ in range(2))]
    far = []
    for i, tensor in enumerate(plain):
        far.append(flat.as_strided(tensor.shape, strides, i * shift))
        for row in range(T):
            far[-1][row].copy_(tensor[row])
    names, results = run(problem, target, T, *far, dropout_p)
    assert set(expected) <= set(names), names
    for number, (found, meant) in enumerate(zip(results, run(problem, target, T, *plain, dropout_p)[1], strict=True)):
        assert relative_error(found, meant) < 1e-3, (form, number)
    print(form, flush=True)

@calls@
'''
ROWS = """
far = (2**26, 1)
compare("few", None, 5, 20, 12, (2**30, 1), ["project", "route_and_prefill", "finish_hidden_gradient"])
compare("fused", ONE_PROCESSOR, 70, 20, 12, far, ["fused_forward", "fused_hidden_gradient", "weight_gradient"])
compare("staged", MANY_PROCESSORS, 70, 20, 12, far, ["project", "expand_columns", "finish_hidden_gradient"])
compare("dropout", MANY_PROCESSORS, 5, 20, 12, (2**30, 1), ["dropped_hidden"], K=3, dropout_p=0.3)
"""
COLUMNS = """
far = (1, 2**25)
compare("few", None, 3, 140, 139, far, ["project", "route_and_prefill", "finish_hidden_gradient"])
compare("fused", ONE_PROCESSOR, 66, 140, 139, far, ["fused_forward", "fused_hidden_gradient", "weight_gradient"])
compare("staged", MANY_PROCESSORS, 66, 140, 139, far, ["project", "expand_columns", "finish_hidden_gradient"])
compare("dropout", MANY_PROCESSORS, 3, 140, 139, far, ["dropped_hidden"], K=3, dropout_p=0.3)
"""


@pytest.mark.long
@pytest.mark.parametrize("calls", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_strides_may_pass_two_to_the_31_elements(calls, device):
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    folders = os.pathsep.join([str(Path(goat_problems.__file__).parent), str(Path(__file__).parent)])
    code = BEYOND_INT32.replace("@tests@", folders).replace("@calls@", calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=600)
    assert done.stdout.split() == ["few", "fused", "staged", "dropout"], (done.returncode, done.stderr[-2000:])
    assert done.returncode == 0, done.stderr[-2000:]


# --- shapes at the ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "training": True}], ids=["plain", "dropout"])
def test_without_tokens_only_gradients_that_must_be_zero_are_launched(options, leading, device):
    for dtypes in (HALF, {"dtype": F32}):
        problem = make_problem(leading=leading, R0=3, **dtypes)
        outcome, recorder = run_triton(problem, device, observer=Recorder(), **options)
        assert recorder.names == ["weight_gradient"] * (2 if "dropout_p" in options else 1)
        assert outcome.output.shape == (*leading, 11) and float(outcome.balance_loss) == 0
        for name in TRAINABLE:
            assert outcome.gradients[name].shape == getattr(problem, name).shape
            assert not bool(outcome.gradients[name].any()), name
        _, recorder = run_triton(problem, device, observer=Recorder(), needs=("x",), **options)
        assert recorder.names == []


SIZES = [
    {"R": R, "E": E, "R0": R0}
    for E, ranks in {1: (1, 8, 512), 5: (5, 15, 510), 8: (8, 32, 128, 512), 64: (64, 512)}.items()
    for R in ranks
    for R0 in (None, R)
]


@pytest.mark.long
@pytest.mark.parametrize("dtypes", [HALF, {"dtype": F16}, {"dtype": F32}], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", KNOWN_TARGETS.values(), ids=KNOWN_TARGETS.keys())
def test_every_rank_up_to_512_has_valid_tiles_on_every_known_gpu(target, dtypes, device):
    for size in SIZES:
        for T, dropout_p in ((1, 0.0), (65, 0.0), (65, 0.1), (5000, 0.0), (5000, 0.1)):
            problem = make_problem(T, N=16, M=16, K=1 + (size["E"] > 1), **size, **dtypes)
            recorder = Recorder(run=False)
            run_triton(problem, device, target, observer=recorder, dropout_p=dropout_p, training=True)
            columns = size["R"] + (size["R0"] or 0)
            for launch in recorder.launches:
                if launch.name not in ("pack_adapter", "finish_balance", "add_splits"):
                    reason = invalid_reason(launch.name, launch.tile, columns, problem.x.dtype.itemsize, target)
                    assert reason is None, (size, T, launch.name, reason)


def test_a_rank_that_no_program_holds_is_refused_by_name(device):
    problem = make_problem(T=3, N=2, M=2, R=8192, E=8, dtype=F32)
    with pytest.raises(ValueError, match=r"lora_A.*rank.*backend='torch'"):
        run_triton(problem, device, observer=Recorder(run=False), needs=())


# --- launches, synchronisation, memory, repetition ------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [HALF, {"dtype": F16}, {"dtype": F32}], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "case",
    [
        *({}, {"R": 32, "E": 8, "R0": 32, "per_expert": True}, {"R": 64, "E": 64, "bias": False}),
        *({"R": 128, "E": 8, "R0": 128}, {"R": 256, "E": 8, "R0": 256}),
    ],
    ids=["small", "typical", "64-experts", "rank-128", "rank-256"],
)
def test_a_decoding_forward_takes_two_launches(case, dtypes, device):
    found = {}
    for T, onto_base in ((1, False), (16, True), (17, False), (33, True), (64, False)):
        recorder = Recorder(run=False)
        problem = make_problem(T, N=40, M=300, **case, **dtypes)
        run_triton(problem, device, KNOWN_TARGETS["sm_90"], observer=recorder, onto_base=onto_base, needs=())
        found[T] = recorder.names
    # More columns than leave registers for a block of y take a launch of their own for it.
    separately = ["expand_columns"] * (case.get("R", 0) + case.get("R0", 0) > PREFILLED_COLUMNS)
    assert found == {key: ["project", "route_and_prefill", *separately] for key in found}


@pytest.mark.parametrize("dtypes", [HALF, {"dtype": F16}, {"dtype": F32}], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("R0", [None, 32], ids=["fold", "path"])
def test_a_large_forward_takes_at_most_three_launches_and_a_backward_four(R0, dtypes, device):
    problem = make_problem(T=8500, N=48, M=40, R=32, E=8, R0=R0, **dtypes)
    for dropout_p in (0.0, 0.1):
        recorder = Recorder(run=False)
        options = {"observer": recorder, "dropout_p": dropout_p, "training": True}
        run_triton(problem, device, KNOWN_TARGETS["sm_90"], needs=(), **options)
        packs = ["pack_adapter"] * (dtypes == HALF)
        assert recorder.names == [*packs, "fused_forward", "finish_balance"]
        run_triton(problem, device, KNOWN_TARGETS["sm_90"], needs=("x", "lora_A", "lora_B", "router"), **options)
        assert len(recorder.names) - 2 * len([*packs, 1, 1]) <= 4 + bool(dropout_p)
        assert recorder.of("fused_hidden_gradient")


def attributes_called(path: Path) -> set[str]:
    """What a file calls or reads by name: ``a.b.c`` as "a.b.c", and "c"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names |= {ast.unparse(node), node.attr}
    return names


def test_no_kernel_sorts_draws_or_uses_atomics_and_no_pass_synchronises():
    forbidden_in_kernels = {"sort", "topk", "rand", "randn", "randint", "philox"}
    synchronising = {
        "item",
        "cpu",
        "tolist",
        "numpy",
        "nonzero",
        "synchronize",
        "unique",
        "masked_select",
        "is_nonzero",
    }
    for path in (PACKAGE / "kernels").glob("*.py"):
        used = attributes_called(path)
        assert not synchronising & used, path.name
        assert not {name for name in used if "atomic" in name or name.startswith("inline_asm")}, path.name
        assert not {f"tl.{name}" for name in forbidden_in_kernels} & used, path.name


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.item.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{function} waits for the GPU"
        inside = {forward_operator: _forward, backward_operator: _backward}.get(function)
        if inside is not None:  # a mode sees the passes as one operator: look into it
            with self:
                return inside(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("T", [5, 70])
def test_no_operation_of_a_step_waits_for_the_device(T, dropout_p, device):
    problem = make_problem(T, R0=3, per_expert=True, **HALF)
    leaves = problem.map(lambda t: t.to(device)).leaves(TRAINABLE)
    scale = torch.tensor(1.0, device=device)
    with audited(ONE_PROCESSOR, Recorder(run=False)), NoSynchronisation():
        routed = routed_linear(
            *(leaves.x, leaves.lora_A, leaves.lora_B, leaves.router),
            **{"weight": leaves.weight, **options_of(leaves)},
            dropout_p=dropout_p,
            balance_coefficient=0.1,
            balance_scale=scale,
        )
        torch.autograd.backward([routed.output, routed.balance_loss], [torch.ones_like(routed.output), scale])


@pytest.mark.parametrize("target", [ONE_PROCESSOR, MANY_PROCESSORS], ids=["fused", "staged"])
def test_float32_products_follow_pytorchs_switch_and_half_precision_ones_do_not(target, device):
    for dtypes, precision, expected in (
        *(({"dtype": F32}, "tf32", "tf32"), ({"dtype": F32}, "ieee", "ieee"), ({"dtype": F32}, "none", "ieee")),
        (HALF, "tf32", "ieee"),
    ):
        recorder = Recorder(run=False)
        with matmul_precision(precision):
            run_triton(make_problem(T=70, **dtypes), device, target, observer=recorder)
        found = [launch.constants["PRECISION"] for launch in recorder.launches if "PRECISION" in launch.constants]
        assert len(found) >= 4 and set(found) == {expected}


@pytest.mark.parametrize("dtypes", [HALF, {"dtype": F16}, {"dtype": F32}], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("R0", [None, 8], ids=["fold", "path"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saved_for_backward_is_the_input_and_little_more(dropout_p, R0, dtypes, device):
    T, N, M, R, E = 512, 64, 48, 8, 4
    leaves = make_problem(T, N, M, R, E, R0=R0, **dtypes).map(lambda t: t.to(device)).leaves(TRAINABLE)
    known = [getattr(leaves, name) for name in TRAINABLE] + list(leaves.residual or ())
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with audited(observer=Recorder(run=False)), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        goat_linear(*tensors_of(leaves), **options_of(leaves), dropout_p=dropout_p, training=True)
    x = leaves.x
    packed = 0
    if dtypes == HALF:  # A, the router twice, B and the residual, each rounded up to blocks of 1024
        packed = (R * N + 2 * E * N + M * R + ((R0 or 0) * (N + M)) + 5 * 1024) * 2
    routing = T * R * x.dtype.itemsize + (2 * T * E + E) * 4
    assert sum(saved.values()) <= routing + packed + (8 if dropout_p else 0)


@pytest.mark.long
@pytest.mark.parametrize("target", [ONE_PROCESSOR, MANY_PROCESSORS], ids=["fused", "staged"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore")
def test_two_runs_are_bitwise_equal_and_read_no_uninitialised_memory(dropout_p, target, device):
    problem = make_problem(T=70, N=33, M=29, R=16, E=8, R0=5, **HALF)
    outcomes = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)  # fills every torch.empty with NaN
        try:
            torch.manual_seed(1)
            options = {"observer": Recorder(), "dropout_p": dropout_p, "training": True}
            outcomes.append(run_triton(problem, device, target, **options)[0])
        finally:
            torch.use_deterministic_algorithms(False)
    assert_outcomes_identical(*outcomes)


# --- where it runs ------------------------------------------------------------------------------------------------


def test_auto_never_picks_the_interpreter(monkeypatch):
    assert resolve_backend("auto", CPU, F32) == "torch"
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "auto")
    assert resolve_backend("auto", CPU, F32) == "torch"
    assert available_backends()["triton"] is None, "a GPU or the interpreter is there"


def test_auto_never_picks_the_interpreter_on_a_gpu_either(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "triton_unavailable", lambda: None)
    for interpreted, picked in ((True, False), (False, True)):
        monkeypatch.setattr(backends, "_interpreted", lambda interpreted=interpreted: interpreted)
        assert (why_not_auto("triton", gpu, F32) is None) == picked


@pytest.mark.parametrize("capabilities", [[(7, 5)], [(7, 0), (7, 5)], [(7, 5), (8, 0)]], ids=str)
def test_a_machine_whose_gpus_are_all_too_old_has_no_triton_backend(capabilities, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    reason = available_backends()["triton"]
    assert (reason is None) if (8, 0) in capabilities else ("older than NVIDIA's Ampere" in reason)
    assert available_backends()["torch"] is None


def test_the_environment_variable_chooses_it_and_a_call_overrules(monkeypatch, device):
    problem = make_problem(dtype=F32).map(lambda t: t.to(device))
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "triton")
    with audited(observer=Recorder()) as recorder:
        goat_linear(*tensors_of(problem), scaling=1.0, top_k=2)
        assert recorder.names == ["project", "route_and_prefill"]
        goat_linear(*tensors_of(problem), scaling=1.0, top_k=2, backend="torch")
        GoatLinear(13, 11, r=8, device=device)(problem.x)
    assert len(recorder.names) == 4


@pytest.mark.parametrize("by_environment", [False, True], ids=["argument", "environment"])
def test_float64_is_refused_by_name(by_environment, device, monkeypatch):
    problem = make_problem().map(lambda t: t.to(device))
    options = {"backend": "triton"}
    if by_environment:
        monkeypatch.setenv("GOAT_KERNELS_BACKEND", "triton")
        options = {}
    with pytest.raises(RuntimeError, match=r"triton.*cannot run.*float32, float16 and bfloat16, not torch.float64"):
        goat_linear(*tensors_of(problem), scaling=1.0, top_k=2, **options)


def test_other_devices_are_refused_by_name(device):
    problem = make_problem(dtype=F32).map(lambda t: t.to("meta"))
    with pytest.raises(RuntimeError, match=r"GPUs, not on 'meta'"):
        goat_linear(*tensors_of(problem), scaling=1.0, top_k=2, backend="triton")
    if device.type == "cuda":
        with pytest.raises(RuntimeError, match=r"on the CPU.*TRITON_INTERPRET"):
            goat_linear(*tensors_of(make_problem(dtype=F32)), scaling=1.0, top_k=2, backend="triton")


# --- graphs, modes, autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_input_is_modified_and_the_output_may_be(dropout_p, device):
    problem = make_problem(R0=3, per_expert=True, dtype=F32).map(lambda t: t.to(device))
    leaves = problem.leaves(TRAINABLE)
    result = goat_linear(*tensors_of(leaves), **options_of(leaves), dropout_p=dropout_p, training=True)
    kept = output_weights(result.output).to(result.output)
    grad_y = kept.clone()
    result.output.mul_(2.0).backward(grad_y)
    assert torch.equal(grad_y, kept)
    for name in TRAINABLE:
        assert torch.equal(getattr(leaves, name), getattr(problem, name)) and getattr(leaves, name)._version == 0, name
    assert all(torch.equal(a, b) for a, b in zip(leaves.residual, problem.residual, strict=True))


@pytest.mark.parametrize("T", [33, 70], ids=["few", "many"])
def test_autocast_equals_an_explicit_cast(T, device):
    problem = make_problem(T, R0=3, dtype=F32)
    with torch.autocast(device.type, dtype=BF16):
        outcome, recorder = run_triton(problem, device, observer=Recorder())
    assert outcome.output.dtype == BF16 and outcome.balance_loss.dtype == F32
    assert [v.arguments["x_ptr"].dtype for v in recorder.launches if v.name == "weight_gradient"] == [BF16]
    rounded = replace(problem, **{name: getattr(problem, name).to(BF16) for name in ("x", "weight", "bias")})
    expected, _ = run_triton(rounded, device, observer=Recorder())
    for name in TRAINABLE:
        assert outcome.gradients[name].dtype == F32, name
    gradients = {name: gradient.float() for name, gradient in expected.gradients.items()}
    assert_outcomes_identical(outcome, replace(expected, gradients=gradients))


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_on(device, counter="aot_eager", **options):
    """``goat_on(device)`` whose goat_linear is compiled."""
    function = torch.compile(goat_linear, fullgraph=True, backend=counter, **options)

    def run(*tensors, **arguments):
        arguments = {name: moved(value, device) for name, value in arguments.items()}
        result = function(*moved(tensors, device), backend="triton", **arguments)
        return type(result)(*(tensor.cpu() for tensor in result))

    return run


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        *({}, {"R0": 3, "per_expert": True}, {"leading": (2, 3, 2), "K": 4, "bias": False}),
        *({"T": 70, **HALF}, {"needs": ("lora_B",)}, {"needs": ("x", "router"), "R0": 3, **HALF}),
    ],
    ids=["plain", "residual", "batch", "packed", "lora_B-alone", "x-and-router"],
)
@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.filterwarnings("ignore")
def test_goat_linear_compiles_to_what_eager_computes(case, device):
    case = {"dtype": F32, **case}
    needs = {"needs": case.pop("needs")} if "needs" in case else {}
    problem = make_problem(**case)
    expected, _ = run_triton(problem, device, observer=Recorder(), **needs)
    assert_outcomes_agree(evaluate(compiled_on(device), problem, **needs), expected, F32)


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.filterwarnings("ignore")
def test_dropout_compiles(device):
    problem = make_problem(R0=3, **HALF)
    outcomes = []
    for function in (goat_on(device), compiled_on(device)):
        torch.manual_seed(3)
        outcomes.append(evaluate(function, problem, dropout_p=0.3, training=True))
    assert_outcomes_agree(*outcomes, F32)


@pytest.mark.long
@pytest.mark.parametrize(
    ("dynamic", "tokens"), [(None, (5, 7, 64, 65, 30)), (True, (6, 70))], ids=["automatic", "dynamic"]
)
@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.filterwarnings("ignore")
def test_the_number_of_tokens_is_dynamic(dynamic, tokens, device):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled_on(device, counter, dynamic=dynamic)
    graphs = []
    for T in tokens:
        problem = make_problem(T, R0=3, **HALF)
        expected, _ = run_triton(problem, device, observer=Recorder())
        assert_outcomes_agree(evaluate(function, problem), expected, F32)
        graphs.append(counter.frame_count)
    first = 1 if dynamic is None else 0  # left to itself, the compiler takes the first size for the only one
    assert graphs[-1] - graphs[first] <= 1, f"at most one more where the adapter begins to be packed: {graphs}"


@pytest.mark.long
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.filterwarnings("ignore")
def test_a_number_of_tokens_that_the_data_decide_compiles(dropout_p, device):
    problem = make_problem(T=70, **HALF)
    counter = CompileCounterWithBackend("aot_eager")

    def on_chosen(function, chosen):
        def run(*tensors, **arguments):
            torch.manual_seed(3)
            arguments = {name: moved(value, device) for name, value in arguments.items()}
            result = function(chosen.to(device), *moved(tensors, device), backend="triton", **arguments)
            return type(result)(*(tensor.cpu() for tensor in result))

        return evaluate(run, problem, dropout_p=dropout_p, training=True)

    def eager(chosen, x, *tensors, **arguments):
        return goat_linear(x[chosen.nonzero().squeeze(-1)], *tensors, **arguments)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(eager, fullgraph=True, backend=counter)
        for tokens in (40, 70, 64, 65, 1):
            chosen = torch.arange(70) < tokens
            assert_outcomes_agree(on_chosen(compiled, chosen), on_chosen(eager, chosen), F32)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.filterwarnings("ignore")
def test_a_layer_compiles_with_inductor(device, monkeypatch):
    monkeypatch.setenv("GOAT_KERNELS_BACKEND", "triton")
    model = torch.nn.Sequential(GoatLinear(16, 12, r=8, num_experts=4), torch.nn.ReLU()).to(device)
    x = torch.randn(6, 16, device=device)
    runs = []
    with torch._inductor.config.patch(compile_threads=1):  # a pool of processes would take longer than the work
        for run in (model, torch.compile(model, fullgraph=True)):
            model.zero_grad(set_to_none=True)
            leaf = x.clone().requires_grad_()
            output = run(leaf)
            (output * output_weights(output).to(output)).sum().backward()
            runs.append([output.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for found, expected in zip(*runs, strict=True):
        assert_close("tensor", found, expected, F32)


def operator_arguments(requires_grad: bool, device, *, T=6, R0=3, base_output=False, dropout_p=0.0, dtype=BF16):
    leaves = make_problem(T, R0=R0, dtype=dtype, adapter_dtype=F32).map(lambda t: t.to(device))
    leaves = leaves.leaves(TRAINABLE if requires_grad else ())
    base = torch.randn(T, 11, dtype=dtype, device=device, requires_grad=requires_grad) if base_output else None
    residual = leaves.residual if R0 is not None else (None, None)
    seed = torch.tensor([1, 2], dtype=torch.int32, device=device) if dropout_p else None
    scaling_E = (torch.rand(4) + 0.5).to(device)
    adapter = Adapter(leaves.lora_A, leaves.lora_B, leaves.router, *residual, 1.0, scaling_E, 2, dropout_p, seed)
    own = (leaves.weight, None, leaves.bias) if base is None else (None, base, None)
    return leaves.x, Layer(*own, adapter, torch.tensor(0.5, device=device), 0.1)


OPERATOR_CASES = {
    "path": {},
    "packed": {"T": 66},
    "fold-float32": {"R0": None, "dtype": F32},
    "base-output": {"base_output": True},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "requires_grad"),
    [*((case, False) for case in OPERATOR_CASES.values()), (OPERATOR_CASES["path"], True)],
    ids=[*OPERATOR_CASES, "grad"],
)
@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_both_operators(case, requires_grad, device):
    x, layer = operator_arguments(requires_grad, device, **case)
    flat = flattened(layer)
    torch.library.opcheck(torch.ops.goat_kernels.forward.default, (x, *flat, "triton"))
    with torch.no_grad():
        y, balance_loss, *routing = torch.ops.goat_kernels.forward.default(x, *flat, "triton")
    own = layer.weight is not None
    needs = [True, own, own, True, True, True]
    flat = flattened(layer._replace(base_output=None, bias=None))
    arguments = (torch.randn_like(y), torch.full_like(balance_loss, 0.7), x, routing, *flat, needs, "triton")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not requires_grad:  # this test differentiates, and a second derivative raises
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.goat_kernels.backward.default, arguments, test_utils=tests)
