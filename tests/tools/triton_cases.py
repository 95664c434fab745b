"""What a launch of each Triton kernel means, in plain torch and float64, and an observer that holds launches to it.

:class:`Audit` runs each launch twice. The first run is in quarantine: all tensors are copied between guard bands of
NaN, the outputs hold nothing but NaN. Afterwards the guards and the inputs are as they were, every output element is
written, and the outputs are the float64 meaning of the inputs. The second run is in place, onto zeros: same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from goat_problems import Outcome, Problem, assert_outcomes_agree, evaluate, selection_mismatch
from torch import Tensor

from goat_kernels import goat_linear
from goat_kernels.dropout import expert_slots, keep_masks, keep_scale
from goat_kernels.functional import GoatOutput, routed_linear
from goat_kernels.kernels.common import INTERPRETED, LOW_PART_SCALE, route
from goat_kernels.kernels.configs import Target, forced_target, forced_tile
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.tiles import Tile
from goat_kernels.numerics import SELECTION_GAP, relative_error
from goat_kernels.reference import select_top_k

#: One multiprocessor is full at any size, so the fused kernels run; no GPU has so many that a few rows fill it; with
#: four the walks over columns are divided, and still walks.
ONE_PROCESSOR = Target("sm90", 1, 232448)
FOUR_PROCESSORS = Target("sm90", 4, 232448)
MANY_PROCESSORS = Target("sm90", 1 << 20, 232448)

#: What surrounds the tensors of a launch in quarantine. All bits set is NaN in every floating dtype: what is read from
#: outside an input spoils results, and what an output holds at first. Around outputs is what no kernel would write.
GUARD_BYTES, NAN_BYTE, GUARD_BYTE = 1 << 18, 0xFF, 0x5A

#: What float32 accumulation over some hundreds of terms may lose, relative to the result's norm.
ACCUMULATION = 2e-6


# --- which arguments a launch writes ------------------------------------------------------------------------------


def written(launch: Launch) -> tuple[str, ...]:
    """The arguments that ``launch`` writes; all others it must leave as they are."""
    constants = launch.constants
    if launch.name == "route_and_prefill":
        names = ["gate_ptr", "probs_ptr", "partial_ptr"]
        names += ["weighted_ptr"] if constants["WITH_HIDDEN"] else []
        names += ["y_ptr"] if constants["WITH_PREFILL"] else []
        names += ["residual_ptr"] if constants["R0"] and not constants["WITH_PREFILL"] else []
        names += ["load_ptr", "balance_ptr"] if constants["BALANCE"] else []
        return tuple(names)
    if launch.name in ("weight_gradient", "add_splits"):
        wanted = {name: launch.arguments[name] is not None for name in WEIGHT_OUTPUTS}
    elif launch.name.endswith("hidden_gradient"):
        has_partial = launch.arguments.get("partial_ptr") is not None
        wanted = {
            "hidden_ptr": True,
            "logits_ptr": True,
            "residual_ptr": constants["R0"] > 0,
            "partial_ptr": has_partial,
        }
    else:
        wanted = dict.fromkeys(OUTPUTS[launch.name], True)
    return tuple(name for name, is_written in wanted.items() if is_written)


WEIGHT_OUTPUTS = ("out_B_ptr", "out_A_ptr", "out_router_ptr")

OUTPUTS = {
    "pack_adapter": ("out_ptr",),
    "fused_forward": ("y_ptr", "weighted_ptr", "gate_ptr", "probs_ptr", "partial_ptr"),
    "finish_balance": ("load_ptr", "balance_ptr"),
    "project": ("out_ptr",),
    "dropped_hidden": ("weighted_ptr",),
    "expand_columns": ("out_ptr",),
}


# --- what each kernel means ---------------------------------------------------------------------------------------


class Check(NamedTuple):
    """``result`` is float64 ``expected``, rounded once to its own dtype.

    scale: the norm that errors are relative to, where cancellation makes ``expected`` small.
    extra: a relative error that is part of the kernel's documented meaning.
    """

    name: str
    result: Tensor
    expected: Tensor
    scale: float = 0.0
    extra: float = 0.0


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to ``dtype``, in float64."""
    return tensor.to(dtype).double()


def half_eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def router_parts(router: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(high, low * LOW_PART_SCALE) of a wider router, float64 with the values of ``dtype``."""
    whole = router.float().double()
    high = rounded(whole, dtype)
    return high, rounded((whole - high) * LOW_PART_SCALE, dtype)


def joined_router(v: SimpleNamespace) -> Tensor:
    """[E, N] from a router that is packed as PARTS * E rows."""
    parts = v.router_ptr.double().view(v.PARTS, v.E, -1)
    return parts[0] if v.PARTS == 1 else parts[0] + parts[1] / LOW_PART_SCALE


def scaling_of(v: SimpleNamespace) -> Tensor | float:
    """[E] or a number."""
    return v.scaling if v.scaling_E_ptr is None else v.scaling_E_ptr.double()


def factor_of(v: SimpleNamespace, gate_TE: Tensor) -> Tensor:
    """s expand(gate), [T, R]."""
    return (gate_TE * scaling_of(v)).repeat_interleave(v.D, dim=1)


def routing(logits_TE: Tensor, gate_ET: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(selection, gate, probs), [T, E]: on the kernel's own selection, which must be exact but for near ties."""
    chosen, exact = gate_ET.t() > 0, select_top_k(logits_TE, top_k)
    selection = torch.where(chosen.sum(dim=1, keepdim=True) == top_k, chosen, exact)  # a tiny gate may underflow
    assert selection_mismatch(logits_TE, selection, top_k) <= SELECTION_GAP[torch.float32]
    gate = torch.softmax(logits_TE.masked_fill(~selection, float("-inf")), dim=1)
    return selection, gate, torch.softmax(logits_TE, dim=1)


def in_slots(v: SimpleNamespace, gate_ET: Tensor, N: int, D: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each slot: what multiplies x (0 or the scale), [T, N], and which hidden columns it serves, [T, R]."""
    dropout_p = v.keep_threshold / 65536
    assert v.keep_scale == keep_scale(dropout_p)
    slots_TR = expert_slots(gate_ET.t()).repeat_interleave(D, dim=1)
    for slot, keep in enumerate(keep_masks(v.seed_ptr, gate_ET.shape[1], N, v.TOP_K, dropout_p)):
        yield keep.double() * v.keep_scale, (slots_TR == slot).double()


def hidden_of(v: SimpleNamespace, x: Tensor, A: Tensor, gate_ET: Tensor) -> Tensor:
    """h [T, R], with dropout where there is a seed."""
    if v.seed_ptr is None:
        return x @ A.t()
    return sum(((x * keep) @ A.t()) * columns for keep, columns in in_slots(v, gate_ET, x.shape[1], v.D))


def onto_of(v: SimpleNamespace) -> Tensor | float:
    return 0.0 if v.ONTO == "" else v.onto_ptr.double()


def statistics(v: SimpleNamespace, probs_TE: Tensor, selection: Tensor) -> list[Check]:
    """The row blocks' partial sums, and load and loss where the kernel writes them."""
    means = torch.stack([block.sum(dim=0) for block in probs_TE.split(v.BT)])
    counts = torch.stack([block.double().sum(dim=0) for block in selection.split(v.BT)])
    checks = [Check("sums of probs", v.partial_ptr[:, 0], means), Check("counts", v.partial_ptr[:, 1], counts)]
    assert torch.equal(v.partial_ptr[:, 1].double(), counts), "counts are exact"
    if getattr(v, "BALANCE", ""):
        checks += balance(v, means, counts)
    return checks


def balance(v: SimpleNamespace, sums: Tensor, counts: Tensor) -> list[Check]:
    load, mean = counts.sum(dim=0) / v.T, sums.sum(dim=0) / v.T
    loss = v.E * (load * mean).sum()
    assert torch.equal(v.load_ptr, load.float()), "shares of counts are rounded to nearest"
    return [Check("load", v.load_ptr, load), Check("balance loss", v.balance_ptr, loss)]


def pack_adapter(v: SimpleNamespace) -> list[Check]:
    dtype, expected = v.out_ptr.dtype, []
    names = [name for name in vars(v) if name.endswith("_ptr") and name != "out_ptr"]  # packed in this order
    matrices = [getattr(v, name) for name in names if getattr(v, name) is not None]
    for matrix in matrices:
        parts = [rounded(matrix, dtype)]
        if matrix is v.router_ptr and v.PARTS == 2:
            parts = router_parts(matrix, dtype)
        flat = torch.cat([part.flatten() for part in parts])
        expected += [flat, flat.new_zeros(-flat.numel() % v.BLOCK)]
    expected = torch.cat(expected)
    if all(matrix.dtype != torch.float64 for matrix in matrices):
        assert torch.equal(v.out_ptr.double(), expected), "casts are exact"
    return [Check("packed", v.out_ptr, expected, extra=half_eps(dtype))]


def fused_forward(v: SimpleNamespace) -> list[Check]:
    x, dtype = v.x_ptr.double(), v.x_ptr.dtype
    selection, gate, probs = routing(x @ joined_router(v).t(), v.gate_ptr, v.TOP_K)
    weighted = factor_of(v, gate) * hidden_of(v, x, v.A_ptr.double(), v.gate_ptr)
    y = v.weighted_ptr.double() @ v.B_ptr.double().t() + onto_of(v)
    if v.R0:
        y = y - rounded(x @ v.A0_ptr.double().t(), dtype) @ v.B0_ptr.double().t()
    return [
        Check("h~", v.weighted_ptr, weighted),
        Check("gate", v.gate_ptr, gate.t()),
        Check("probs", v.probs_ptr, probs.t()),
        Check("y0", v.y_ptr, y),
        *statistics(v, probs, selection),
    ]


def finish_balance(v: SimpleNamespace) -> list[Check]:
    partial = v.partial_ptr.double()
    return balance(v, partial[:, 0], partial[:, 1])


def project(v: SimpleNamespace) -> list[Check]:
    x, dtype = v.x_ptr.double(), v.x_ptr.dtype
    matrices = {}
    if v.PARTS:
        stored = v.router_ptr
        parts = [stored] if v.PARTS == 1 else list(stored.view(2, v.E, -1)) if v.STORED_PARTS == 2 else None
        parts = router_parts(stored, dtype) if parts is None else [rounded(part, dtype) for part in parts]
        matrices |= {"router, high": parts[0]} | ({"router, low": parts[1]} if v.PARTS == 2 else {})
    matrices |= {"W1": rounded(v.W1_ptr, dtype)} if v.C1 else {}
    matrices |= {"W2": rounded(v.W2_ptr, dtype)} if v.C2 else {}
    width, checks, first = v.split_steps * v.BN, [], 0
    for name, matrix in matrices.items():
        products = [a @ b.t() for a, b in zip(x.split(width, dim=1), matrix.split(width, dim=1), strict=True)]
        result = v.out_ptr[:, :, first : first + matrix.shape[0]]
        checks.append(Check(name, result, torch.stack(products)))
        first += matrix.shape[0]
    assert first == v.out_ptr.shape[2]
    return checks


def dropped_hidden(v: SimpleNamespace) -> list[Check]:
    x, A = v.x_ptr.double(), rounded(v.A_ptr, v.x_ptr.dtype)
    return [Check("h~", v.weighted_ptr, factor_of(v, v.gate_ptr.t().double()) * hidden_of(v, x, A, v.gate_ptr))]


def route_and_prefill(v: SimpleNamespace) -> list[Check]:
    raw, dtype, R = v.raw_ptr.double().sum(dim=0), v.weighted_ptr.dtype, v.E * v.D
    columns = raw.split([v.E] * v.PARTS + ([R] if v.WITH_HIDDEN else []) + [v.R0], dim=1)
    logits = columns[0] if v.PARTS == 1 else columns[0] + columns[1] / LOW_PART_SCALE
    selection, gate, probs = routing(logits, v.gate_ptr, v.TOP_K)
    checks = [Check("gate", v.gate_ptr, gate.t()), Check("probs", v.probs_ptr, probs.t())]
    if v.WITH_HIDDEN:
        checks.append(Check("h~", v.weighted_ptr, factor_of(v, gate) * columns[v.PARTS]))
    if v.R0 and not v.WITH_PREFILL:
        checks.append(Check("h0", v.residual_ptr, -columns[-1]))
    if v.WITH_PREFILL:
        y = v.weighted_ptr.double() @ rounded(v.B_ptr, dtype).t() + onto_of(v)
        if v.R0:
            y = y - rounded(columns[-1], dtype) @ rounded(v.B0_ptr, dtype).t()
        checks.append(Check("y0", v.y_ptr, y))
    return checks + statistics(v, probs, selection)


def hidden_gradient(v: SimpleNamespace, grad_weighted: Tensor, grad_residual: Tensor | None) -> list[Check]:
    gate, T = v.gate_ptr.t().double(), v.T
    q = (v.weighted_ptr.double() * grad_weighted).view(T, v.E, v.D).sum(dim=2)
    grad_logits, scale = q - gate * q.sum(dim=1, keepdim=True), q.norm()
    if v.HAS_BALANCE:
        b = v.balance_gradient if v.grad_balance_ptr is None else v.grad_balance_ptr.double()
        probs, c = v.probs_ptr.t().double(), b * v.E / T * v.load_E_ptr.double()
        grad_logits = grad_logits + probs * (c - (probs @ c)[:, None])
        scale = scale + (probs * c).norm()
    checks = [
        Check("dh", v.hidden_ptr, factor_of(v, gate) * grad_weighted),
        Check("dlogits", v.logits_ptr, grad_logits.t(), scale=float(scale)),
    ]
    return checks if grad_residual is None else [*checks, Check("dh0", v.residual_ptr, -grad_residual)]


def fused_hidden_gradient(v: SimpleNamespace) -> list[Check]:
    grad_y, dtype = v.grad_y_ptr.double(), v.grad_y_ptr.dtype
    residual = grad_y @ rounded(v.B0_ptr, dtype) if v.R0 else None
    checks = hidden_gradient(v, grad_y @ rounded(v.B_ptr, dtype), residual)
    if v.partial_ptr is not None:
        blocks = zip(grad_y.split(v.BT), v.weighted_ptr.double().split(v.BT), strict=True)
        sums = torch.stack([(dy.t() @ h).flatten() for dy, h in blocks])
        checks.append(Check("sums of dY^T h~", v.partial_ptr, sums))
    return checks


def finish_hidden_gradient(v: SimpleNamespace) -> list[Check]:
    grad_weighted, residual = v.raw_ptr.double().sum(dim=0).split([v.E * v.D, v.R0], dim=1)
    return hidden_gradient(v, grad_weighted, residual if v.R0 else None)


def weight_gradient(v: SimpleNamespace) -> list[Check]:
    R, splits, checks = v.E * v.D, max(1, -(-v.T // v.split_T)), []
    of_A, of_router = v.out_A_ptr is not None, v.out_router_ptr is not None
    of_split = (R * of_A + v.E * of_router) * v.N

    def sums(columns: Tensor, source: Tensor) -> Tensor:
        pairs = zip(columns.split(v.split_T), source.split(v.split_T), strict=True)
        return torch.stack([a.t() @ b for a, b in pairs])

    def written_to(out: Tensor, rows: int, columns: int, stride: int) -> Tensor:
        return out.as_strided((splits, rows, columns), (stride, columns, 1), out.storage_offset())

    if v.out_B_ptr is not None:
        result = written_to(v.out_B_ptr, v.M, R, v.M * R)
        checks.append(Check("lora_B", result, sums(v.grad_y_ptr.double(), v.weighted_ptr.double())))
    if not (of_A or of_router):
        return checks
    x, dtype = v.x_ptr.double(), v.x_ptr.dtype
    if of_A:
        hidden = v.hidden_ptr.double()
        if v.seed_ptr is None:
            expected = sums(hidden, x)
        else:
            expected = sum(sums(hidden * c, x * keep) for keep, c in in_slots(v, v.gate_ptr, x.shape[1], v.D))
        checks.append(Check("lora_A", written_to(v.out_A_ptr, R, v.N, of_split), expected))
    if of_router:
        result = written_to(v.out_router_ptr, v.E, v.N, of_split)
        if dtype == torch.float16:  # scaled block by block, then rounded
            check = Check("router", result, sums(v.logits_ptr.t().double(), x), extra=half_eps(dtype))
        else:
            check = Check("router", result, sums(rounded(v.logits_ptr.t(), dtype), x))
        checks.append(check)
    return checks


def add_splits(v: SimpleNamespace) -> list[Check]:
    checks = []
    if v.partial_B_ptr is not None:
        checks.append(Check("lora_B", v.out_B_ptr.flatten(), v.partial_B_ptr.double().sum(dim=0)))
    if v.partial_A_ptr is not None:
        sums = v.partial_A_ptr.double().sum(dim=0).split([v.size_A, v.size_router])
        results = {"lora_A": v.out_A_ptr, "router": v.out_router_ptr}
        checks += [
            Check(name, result.flatten(), total)
            for (name, result), total in zip(results.items(), sums, strict=True)
            if result is not None
        ]
    return checks


def expand_columns(v: SimpleNamespace) -> list[Check]:
    dtype, (R, N) = v.out_ptr.dtype, v.W_ptr.shape
    hidden, W = v.hidden_ptr.double(), rounded(v.W_ptr, dtype)
    if v.seed_ptr is None:
        y = hidden @ W
    else:
        y = sum(((hidden * c) @ W) * keep for keep, c in in_slots(v, v.gate_ptr, N, R // v.E))
    if v.R0:
        y = y + v.residual_ptr.double() @ rounded(v.V_ptr, dtype)
    if v.logits_ptr is not None:
        y = y + rounded(v.logits_ptr.t(), dtype) @ rounded(v.router_ptr[: v.E], dtype)
    return [Check("out", v.out_ptr, y + onto_of(v))]


MEANINGS: dict[str, Callable[[SimpleNamespace], list[Check]]] = {
    function.__name__: function
    for function in (
        *(pack_adapter, fused_forward, finish_balance, project, dropped_hidden, route_and_prefill),
        *(fused_hidden_gradient, finish_hidden_gradient, weight_gradient, add_splits, expand_columns),
    )
}


# --- the observer -------------------------------------------------------------------------------------------------


class Audit:
    """An observer that holds every launch to its meaning; see the module's docstring. ``launches`` are in order."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    @property
    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]

    def of(self, name: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.name == name]

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)
        outputs = {_storage(launch.arguments[name]) for name in written(launch)}
        copies = _quarantined(launch, outputs)
        _check_copies(launch, copies, outputs)
        for name in written(launch):
            _bytes_of(launch.arguments[name]).zero_()
        launch.run()
        for name in written(launch):
            tensor = launch.arguments[name]
            assert torch.equal(_bytes_of(tensor), copies[_storage(tensor)][GUARD_BYTES:-GUARD_BYTES]), (
                f"{launch.name}: {name} depends on what was there before, or differs from run to run"
            )


class Recorder(Audit):
    """An observer that only runs and remembers launches; with ``run=False`` it does not even run them."""

    def __init__(self, run: bool = True) -> None:
        super().__init__()
        self.run = run

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)
        if self.run:
            launch.run()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _quarantined(launch: Launch, outputs: set[int]) -> dict[int, Tensor]:
    """Run a copy of ``launch`` whose tensors lie between guards; check guards, inputs and outputs' meaning."""
    copies: dict[int, Tensor] = {}
    arguments = dict(launch.arguments)
    for name, tensor in launch.arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        key, content = _storage(tensor), _bytes_of(tensor)
        if key not in copies:
            copies[key] = content.new_full((content.numel() + 2 * GUARD_BYTES,), NAN_BYTE)
            if key in outputs:
                copies[key][:GUARD_BYTES] = copies[key][-GUARD_BYTES:] = GUARD_BYTE
            else:
                copies[key][GUARD_BYTES:-GUARD_BYTES] = content
        elements = copies[key][: copies[key].numel() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        offset = tensor.storage_offset() + GUARD_BYTES // tensor.itemsize
        arguments[name] = elements.as_strided(tensor.shape, tensor.stride(), offset)
    with _addresses_inside(launch.name, list(copies.values())):
        replace(launch, arguments=arguments).run()
    for name in written(launch):
        assert not bool(arguments[name].isnan().any()), f"{launch.name} left elements of {name} unwritten, or NaN"
    for check in MEANINGS[launch.name](SimpleNamespace(**arguments, **launch.constants)):
        assert_means(launch, check)
    return copies


@contextlib.contextmanager
def _addresses_inside(name: str, copies: list[Tensor]) -> Iterator[None]:
    """In the interpreter every load and store must stay between the guards, even where its result is thrown away."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    first = np.sort(np.array([copy.data_ptr() + GUARD_BYTES for copy in copies], dtype=np.uint64))
    size = {copy.data_ptr() + GUARD_BYTES: copy.numel() - 2 * GUARD_BYTES for copy in copies}
    end = first + np.array([size[int(address)] for address in first], dtype=np.uint64)
    outside: list[str] = []

    def checked(what: str, mask_at: int):
        original = getattr(InterpreterBuilder, what)

        def run(self, *operands):
            mask = np.broadcast_to(operands[mask_at].data, operands[0].data.shape)
            addresses = operands[0].data[mask]
            region = np.searchsorted(first, addresses, side="right").astype(np.int64) - 1
            if ((region < 0) | (addresses >= end[region])).any():
                outside.append(what)
            return original(self, *operands)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for what, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
            patch.setattr(InterpreterBuilder, what, checked(what, mask_at))
        yield
    assert not outside, f"{name} reads or writes outside its tensors: {outside[0]}"


def _check_copies(launch: Launch, copies: dict[int, Tensor], outputs: set[int]) -> None:
    for name, tensor in launch.arguments.items():
        if isinstance(tensor, Tensor):
            key = _storage(tensor)
            copy = copies[key]
            inside = copy[GUARD_BYTES:-GUARD_BYTES]
            guards = torch.cat([copy[:GUARD_BYTES], copy[-GUARD_BYTES:]])
            assert bool((guards == (GUARD_BYTE if key in outputs else NAN_BYTE)).all()), (
                f"{launch.name} writes outside {name}"
            )
            if key in outputs:
                assert not bool(inside.view(tensor.dtype).isnan().any()), (
                    f"{launch.name} left parts of {name} unwritten"
                )
            else:
                assert torch.equal(inside, _bytes_of(tensor)), f"{launch.name} writes to {name}"


def assert_means(launch: Launch, check: Check) -> None:
    """The norm of the error is what one rounding gives on average, no element is off by more than a few roundings."""
    result, expected = check.result.double(), check.expected
    where = f"{launch.name}, {check.name} {tuple(result.shape)} {check.result.dtype}"
    assert result.shape == expected.shape, f"{where}: meant to be {tuple(expected.shape)}"
    if not result.numel():
        return
    unit = half_eps(check.result.dtype)
    extra = check.extra + ACCUMULATION + (2e-3 if launch.constants.get("PRECISION") == "tf32" else 0.0)
    average = 0.6 if result.numel() >= 64 else 1.0
    norm = max(float(expected.norm()), check.scale)
    error = float((result - expected).norm())
    assert error <= (average * unit + extra) * norm, f"{where}: relative error {error / max(norm, 1e-300):.3g}"
    largest = max(float(expected.abs().max()), check.scale / result.numel() ** 0.5)
    allowed = 2 * unit * (expected.abs() + expected.abs().mean()) + 2 * extra * largest
    worst = (result - expected).abs() - allowed
    assert float(worst.max()) <= 0, (
        f"{where}: element {int(worst.argmax())} is off by {float(worst.max()):.3g} too much"
    )


@contextlib.contextmanager
def audited(target: Target | None = None, observer: Audit | None = None) -> Iterator[Audit]:
    """Every launch inside is audited (or given to ``observer``), with tiles chosen as for ``target``."""
    observer = Audit() if observer is None else observer
    with observed(observer), contextlib.nullcontext() if target is None else forced_target(target):
        yield observer


@contextlib.contextmanager
def forced_tiles(tiles: dict[str, Tile]) -> Iterator[None]:
    """These tiles for these kernels, aligned or not, whatever the table says."""
    with contextlib.ExitStack() as stack:
        for kernel, tile in tiles.items():
            for variant in (kernel, f"{kernel}.unaligned"):
                stack.enter_context(forced_tile(variant, tile))
        yield


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    """PyTorch's own switch for float32 products on a GPU."""
    previous, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, value
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


# --- running goat_linear where the kernels run ---------------------------------------------------------------------


def moved(value, device: torch.device):
    """A tensor, or a tuple of them, on ``device``, with its strides; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def goat_on(device: torch.device, backend: str = "triton") -> Callable[..., GoatOutput]:
    """``goat_linear`` that computes on ``device``; arguments and results are on the CPU."""

    def function(*tensors, **options) -> GoatOutput:
        options = {name: moved(value, device) for name, value in options.items()}
        result = goat_linear(*moved(tensors, device), backend=backend, **options)
        return GoatOutput(*(tensor.cpu() for tensor in result))

    return function


def onto_base_output(device: torch.device, backend: str = "triton") -> Callable[..., GoatOutput]:
    """The same by ``routed_linear`` onto the output of a base layer that ran elsewhere."""

    def function(x, weight, *adapter, bias, training=False, **options) -> GoatOutput:
        options = {name: moved(value, device) for name, value in options.items()}
        base = F.linear(x, weight, bias).to(device)
        kept = base.detach().clone()
        routed = routed_linear(*moved((x, *adapter), device), base_output=base, backend=backend, **options)
        assert torch.equal(base, kept), "the base layer's output was modified"
        return GoatOutput(routed.output.cpu(), routed.balance_loss.cpu())

    return function


def run_triton(
    problem: Problem,
    device: torch.device,
    target: Target | None = None,
    *,
    observer: Audit | None = None,
    onto_base: bool = False,
    tiles: dict[str, Tile] | None = None,
    **options,
) -> tuple[Outcome, Audit]:
    """(what ``evaluate`` gives on the Triton backend, the audit of its launches)."""
    function = onto_base_output(device) if onto_base else goat_on(device)
    with forced_tiles(tiles or {}), audited(target, observer) as audit:
        return evaluate(function, problem, **options), audit


def selection_of(audit: Audit, problem: Problem) -> Tensor:
    """bool [T, E], what the forward in ``audit`` selected; exact but for near ties."""
    logits = problem.logits_TE
    if not logits.shape[0]:
        return logits > 0
    (gate_ET,) = [v.arguments["gate_ptr"] for v in audit.launches if v.name in ("fused_forward", "route_and_prefill")]
    return routing(logits, gate_ET.cpu(), problem.top_k)[0]


def expert_masks(selection: Tensor, N: int, seed: Tensor, dropout_p: float) -> Tensor:
    """[E, T, N]: what x is multiplied by in front of each expert, for the oracle."""
    T, E = selection.shape
    masks = torch.zeros(E, T, N, dtype=torch.float64)
    slots = expert_slots(selection.double())
    count = int(selection.sum(dim=1).max()) if T else 0
    for slot, keep in enumerate(keep_masks(seed.cpu(), T, N, count, dropout_p)):
        masks += (slots == slot).t()[:, :, None] * keep.double() * keep_scale(dropout_p)
    return masks


def assert_same_kernels(first: Outcome, second: Outcome, dtype: torch.dtype) -> None:
    """Bit for bit what the Triton kernels alone write: the balance loss and the adapter's gradients.

    The output and the other gradients agree as results of ``dtype`` do: where strides differ, the vendor's product may
    take another kernel.
    """
    assert_outcomes_agree(first, second, dtype)
    assert torch.equal(first.balance_loss, second.balance_loss)
    for name in {"lora_A", "lora_B", "router"} & first.gradients.keys():
        assert torch.equal(first.gradients[name], second.gradients[name]), name


def errors(outcome: Outcome, oracle: Outcome) -> dict[str, float]:
    """Relative error of the output, the balance loss and each gradient."""
    found = {"output": outcome.output, "balance_loss": outcome.balance_loss} | outcome.gradients
    meant = {"output": oracle.output, "balance_loss": oracle.balance_loss} | oracle.gradients
    return {name: relative_error(found[name], meant[name]) for name in found if meant[name] is not None}


# --- device functions that have no kernel of their own ------------------------------------------------------------


@triton.jit
def _route_rows(
    logits_ptr,
    gate_ptr,
    probs_ptr,
    selected_ptr,
    T,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    BT: tl.constexpr,
):
    rows = tl.arange(0, BT)
    expert = tl.arange(0, E_PAD)
    mask = (rows < T)[:, None] & (expert < E)[None, :]
    offsets = rows[:, None] * E + expert[None, :]
    gate, probs, selected = route(tl.load(logits_ptr + offsets, mask=mask, other=0.0), E, E_PAD, TOP_K)
    tl.store(gate_ptr + offsets, gate, mask=mask)
    tl.store(probs_ptr + offsets, probs, mask=mask)
    tl.store(selected_ptr + offsets, selected.to(tl.int32), mask=mask)


def route_rows(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, probs, selection), each [T, E], as the kernels compute them from float32 logits."""
    T, E = logits_TE.shape
    gate, probs = torch.empty_like(logits_TE), torch.empty_like(logits_TE)
    selected = torch.empty_like(logits_TE, dtype=torch.int32)
    BT, E_PAD = triton.next_power_of_2(T), triton.next_power_of_2(E)
    _route_rows[(1,)](logits_TE, gate, probs, selected, T, E=E, E_PAD=E_PAD, TOP_K=top_k, BT=BT)
    return gate, probs, selected.bool()
