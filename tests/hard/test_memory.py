"""Memory of a layer as formulas, to the byte (docs/numerics.md, Memory), and nothing that stays behind."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from drawn_layers import BF16, F16, F32, F64, observed_routing
from goat_problems import TRAINABLE, Problem, make_problem
from triton_cases import Recorder, audited

from bench.memory import peak_bytes, saved_bytes
from goat_kernels import goat_linear
from goat_kernels.backends import get_backend
from goat_kernels.functional import GoatOutput
from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target
from goat_kernels.kernels.launch import observed

CPU = torch.device("cpu")
ADAPTER = ("x", "lora_A", "lora_B", "router")


def forward(leaves: Problem, backend: str, **options) -> GoatOutput:
    tensors = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.router)
    options = {"bias": leaves.bias, "scaling": 1.7, "top_k": 2, "residual": leaves.residual, **options}
    return goat_linear(*tensors, backend=backend, training=True, **options)


def backward(result: GoatOutput) -> None:
    torch.autograd.backward(list(result), [torch.ones_like(part) for part in result])


@pytest.fixture
def _nothing_runs():
    """Kernels are launched for an H100 and run nowhere: what they would compute takes no part in memory."""
    with observed(lambda launch: None), forced_target(KNOWN_TARGETS["sm_90"]):
        yield


# --- what a forward keeps -----------------------------------------------------------------------------------------


def packed_elements(T: int, N: int, M: int, R: int, E: int, R0: int, dropout_p: float) -> int:
    """A, the router's two parts, B, and the residual pair, each rounded up to blocks of 1024."""
    if T <= 64 and not dropout_p:
        return 0
    return sum(-(-size // 1024) * 1024 for size in (R * N, 2 * E * N, M * R, R0 * N, M * R0))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", F64), *((backend, dtype) for backend in ("torch", "triton") for dtype in (F32, F16, BF16))],
    ids=str,
)
@pytest.mark.usefixtures("_nothing_runs")
def test_saved_for_backward_to_the_byte(backend, dtype, device):
    """Beside x and the layer's own tensors: h~, gate, probs, f, the seed and, on Triton, the packed adapter."""
    adapter_dtype = torch.promote_types(dtype, F32)
    for T, R0, dropout_p in ((5, 0, 0.0), (64, 8, 0.0), (65, 0, 0.0), (300, 8, 0.3), (17, 3, 0.3)):
        N, M, R, E = 40, 24, 8, 4
        problem = make_problem(T, N, M, R, E, R0=R0 or None, dtype=dtype, adapter_dtype=adapter_dtype)
        leaves = problem.map(lambda t: t.to(device)).leaves(TRAINABLE)
        own = [getattr(leaves, name) for name in TRAINABLE] + list(leaves.residual or ())
        saved = saved_bytes(lambda leaves=leaves, p=dropout_p: forward(leaves, backend, dropout_p=p), own)
        is_packed = backend == "triton" and dtype != adapter_dtype
        packed = packed_elements(T, N, M, R, E, R0, dropout_p) if is_packed else 0
        stats = adapter_dtype.itemsize
        expected = (T * R + packed) * dtype.itemsize + (2 * T * E + E) * stats + 8 * (dropout_p > 0)
        assert saved == expected, (T, R0, dropout_p)


def test_what_was_saved_goes_with_the_backward_even_while_the_output_lives(device):
    for backend in ("torch", "triton"):
        leaves = make_problem(9, R0=3, dtype=F32).map(lambda t: t.to(device)).leaves(TRAINABLE)
        for needs_backward in (True, False):
            with observed_routing(backend) as routings:
                result = forward(leaves, backend)
            kept = [weakref.ref(part) for part in (*routings[0][:3], routings[0].packed)]
            del routings[:]
            assert all(reference() is not None for reference in kept[:3])
            if needs_backward:
                backward(result)
            else:
                del result
            assert all(reference() is None for reference in kept), backend


# --- the peak -----------------------------------------------------------------------------------------------------

T, N, M, R, E = 2048, 512, 384, 8, 4
PEAK_SIZES = {
    **{"base": {}, "tokens": {"T": 4096}, "inputs": {"N": 640}, "outputs": {"M": 512}, "rank": {"R": 16}},
    "lora_B rides": {"T": 4096, "R": 4},
}


def measured_peaks(backend: str, dtype: torch.dtype, T, N, M, R, E) -> tuple[int, int, list[int]]:
    """(forward, backward, elements of the splits' partial sums), after one step that fills the caches."""
    leaves = make_problem(T, N, M, R, E, dtype=dtype, adapter_dtype=F32).leaves(ADAPTER)
    partial: list[int] = []

    def note(launch) -> None:
        if launch.name == "add_splits":
            sums = (launch.arguments["partial_B_ptr"], launch.arguments["partial_A_ptr"])
            partial.extend(tensor.numel() for tensor in sums if tensor is not None)

    with observed(note):
        backward(forward(leaves, backend))
    for name in ADAPTER:
        getattr(leaves, name).grad = None
    of_forward = peak_bytes(lambda: forward(leaves, backend), CPU)
    result = forward(leaves, backend)
    ones = [torch.ones_like(part) for part in result]
    return of_forward, peak_bytes(lambda: torch.autograd.backward(list(result), ones), CPU), partial


@pytest.mark.long
@pytest.mark.parametrize("change", PEAK_SIZES.values(), ids=PEAK_SIZES.keys())
@pytest.mark.usefixtures("_nothing_runs")
def test_the_peak_of_the_torch_backend_to_the_byte(change):
    size = {"T": T, "N": N, "M": M, "R": R, "E": E} | change
    t, n, m, r, e = size.values()
    # y, the columns of the product, h~, gate, probs; f and the loss. In half precision: x, upcast for the router.
    found = measured_peaks("torch", F32, **size)
    assert found[0] == 4 * (t * (m + 2 * r + 3 * e) + e + 1)
    # dX, [dh | dlogits], dlogits, the gradients, which are there when dX comes, and [lora_A; router] for it.
    assert found[1] == 4 * (t * (n + r + 2 * e) + m * r + 2 * (r + e) * n)
    found = measured_peaks("torch", BF16, **size)
    assert found[0] == 4 * t * (n + e) + 2 * t * r
    assert found[1] == 2 * t * (r + e) + 4 * t * (n + e) + 4 * (m * r + e * n)


@pytest.mark.parametrize("change", PEAK_SIZES.values(), ids=PEAK_SIZES.keys())
@pytest.mark.usefixtures("_nothing_runs")
def test_the_peak_of_the_triton_backend_to_the_byte(change, device):
    if device.type == "cuda":
        pytest.skip("a GPU's allocator rounds each tensor up; the shapes are the same")
    size = {"T": T, "N": N, "M": M, "R": R, "E": E} | change
    t, n, m, r, e = size.values()
    of_forward, of_backward, partial = measured_peaks("triton", F32, **size)
    blocks = -(-t // (16 if t < 3137 else 32))  # an H100's tiles
    assert of_forward == 4 * (t * (m + r + 2 * e) + e + 1 + blocks * 2 * e)
    # dX, dh, dlogits and the gradients; the splits' partial sums are gone when dX comes, and smaller.
    assert max(partial) < t * n
    assert of_backward == 4 * (t * (n + r + e) + m * r + (r + e) * n)


# --- over time ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own objects, looked at from outside
def test_a_thousand_steps_leave_nothing_behind(backend, device):
    """No tensor and no memory of Python: under Triton on the host side of every launch, without the kernels."""
    leaves = make_problem(6, R0=3, dtype=BF16, adapter_dtype=F32).map(lambda t: t.to(device)).leaves(ADAPTER)

    def step(i: int) -> None:
        backward(forward(leaves, backend, dropout_p=0.1 * (i % 2)))
        for name in ADAPTER:
            getattr(leaves, name).grad = None

    def living() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    with observed(lambda launch: None):
        for i in range(200):
            step(i)
        tensors, blocks = living(), sys.getallocatedblocks()
        for i in range(1000):
            step(i)
        assert living() <= tensors
        grown = sys.getallocatedblocks() - blocks
    assert grown < 900, f"{grown} more blocks of Python's memory after 1000 steps"  # lists of free objects still fill


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_leak_of_one_small_tensor_a_step_would_be_seen(monkeypatch):
    """The test above can fail: a pass that keeps one small tensor a step is noticed."""
    passes, kept = get_backend("torch"), []
    original = passes.weight_gradients

    def leaking(*arguments, **needs):
        kept.append(torch.zeros(1))
        return original(*arguments, **needs)

    monkeypatch.setattr(passes, "weight_gradients", leaking)
    with pytest.raises(AssertionError):
        test_a_thousand_steps_leave_nothing_behind("torch", CPU)
    assert kept


def test_nothing_is_kept_of_a_layer_that_is_gone(device):
    """Caches hold constants of a shape, never a layer's tensors."""
    for backend in ("torch", "triton"):
        leaves = make_problem(6, dtype=F32).map(lambda t: t.to(device)).leaves(ADAPTER)
        parameters = [weakref.ref(getattr(leaves, name)) for name in ADAPTER]
        with audited(observer=Recorder(run=False)):
            backward(forward(leaves, backend))
        del leaves
        gc.collect()
        assert [reference() for reference in parameters] == [None] * 4, backend
