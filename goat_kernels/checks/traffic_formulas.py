"""What each launch should move, in bytes: one formula for each kernel, exact for every shape, from its tiles alone.

A plan counts what programs ask for, before any cache: what another program reads again counts again, lanes that are
masked off do not. Its kinds of tensors are

    in, out   the wide tensors: x or dY that a pass reads, y or dX that it writes
    x, dY     where one launch reads both
    onto      the bias or the base's output that y is added to
    adapter   lora_A, lora_B, the router's parts, the frozen pair, and their packed copies
    hidden    what is as narrow as the hidden columns: h~, dh, dlogits, gate, probs, and partial sums of them
    gradient  of the adapter, and the partial sums of it
    scalars   seed, scaling per expert, load and balance loss; most plans leave them out

A new kernel, or another way through memory in an old one, is an entry in ``FORMULAS``; ``traffic.py`` counts the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor

from goat_kernels.kernels.launch import Launch, blocks

_FLOAT = 4

# Each plan takes a launch's arguments and constants as attributes, a pointer ``x_ptr`` as ``x_bytes``, the bytes of one
# of its elements (0 where it is None), and returns kind -> (bytes read, bytes written).


def _pack_adapter(v) -> dict:
    sizes = (v.size_A, v.PARTS * v.size_router, v.size_A0, v.size_B, v.size_B0)
    widths = (v.A_bytes, v.router_bytes, v.A0_bytes, v.B_bytes, v.B0_bytes)
    read = sum(size * width for size, width in zip(sizes, widths, strict=True))
    return {"adapter": (read, sum(blocks(size, v.BLOCK) for size in sizes) * v.BLOCK * v.out_bytes)}


def _fused_forward(v) -> dict:
    R, row_blocks = v.E * v.D, blocks(v.T, v.BT)
    first = (R * v.A_bytes + v.PARTS * v.E * v.router_bytes + v.R0 * v.A0_bytes) * v.N
    last = (R * v.B_bytes + v.R0 * v.B0_bytes) * v.M
    return {
        "in": (v.T * v.N * v.x_bytes, 0),
        "adapter": (row_blocks * (first + last), 0),
        "onto": (_onto(v, v.M), 0),
        "out": (0, v.T * v.M * v.y_bytes),
        "hidden": (0, v.T * R * v.weighted_bytes + _FLOAT * 2 * v.E * (v.T + row_blocks)),
    }


def _onto(v, M: int) -> int:
    """A bias is read by every row block, a base output once."""
    return {"": 0, "bias": blocks(v.T, v.BT) * M, "base": v.T * M}[v.ONTO] * v.onto_bytes


def _finish_balance(v) -> dict:
    return {"hidden": (_FLOAT * 2 * v.E * v.programs, 0), "scalars": (0, v.E * v.load_bytes + v.balance_bytes)}


def _project(v) -> dict:
    row_blocks, rank_blocks = blocks(v.T, v.BT), blocks(v.PARTS * v.E, v.BC) + blocks(v.C1 + v.C2, v.BC)
    columns = v.PARTS * v.E * v.router_bytes + v.C1 * v.W1_bytes + v.C2 * v.W2_bytes
    raw = blocks(v.N, v.split_steps * v.BN) * v.T * (v.PARTS * v.E + v.C1 + v.C2)
    return {
        "in": (rank_blocks * v.T * v.N * v.x_bytes, 0),
        "adapter": (row_blocks * columns * v.N, 0),
        "hidden": (0, _FLOAT * raw),
    }


def _route_and_prefill(v) -> dict:
    R, row_blocks = v.E * v.D, blocks(v.T, v.BT)
    raw = v.splits * v.T * (v.PARTS * v.E + R * v.WITH_HIDDEN + v.R0)
    kept = v.T * R * v.weighted_bytes * v.WITH_HIDDEN + v.T * v.R0 * v.residual_bytes
    kept += _FLOAT * 2 * v.E * (v.T + row_blocks)
    if not v.WITH_PREFILL:
        return {"hidden": (_FLOAT * raw, kept)}
    return {
        "hidden": (blocks(v.M, v.BM) * _FLOAT * raw, kept),  # every program of a row block routes it
        "adapter": (row_blocks * (R * v.B_bytes + v.R0 * v.B0_bytes) * v.M, 0),
        "onto": (_onto(v, v.M), 0),
        "out": (0, v.T * v.M * v.y_bytes),
    }


def _dropped_hidden(v) -> dict:
    R = v.E * v.D
    rank_blocks = blocks(R, v.BC)
    return {
        "in": (v.TOP_K * rank_blocks * v.T * v.N * v.x_bytes, 0),
        "adapter": (v.TOP_K * blocks(v.T, v.BT) * R * v.N * v.A_bytes, 0),
        "hidden": (_FLOAT * v.T * (rank_blocks * v.E + R), v.T * R * v.weighted_bytes),
    }


def _expand_columns(v) -> dict:
    row_blocks, steps = blocks(v.T, v.BT), blocks(v.N, v.BN)
    programs = blocks(steps, v.chunk_steps)  # along N
    # The first block of hidden columns stays in registers, further ones are read again at every step.
    kept, kept0 = min(v.R, v.BC), min(v.R0, v.BC0)
    columns = (kept * programs + (v.R - kept) * steps) * v.hidden_bytes
    columns += (kept0 * programs + (v.R0 - kept0) * steps) * v.residual_bytes
    slots = (programs + steps * (blocks(v.R, v.BC) - 1)) * v.E * v.gate_bytes
    router = v.E * v.N * v.router_bytes if v.logits_bytes else 0
    matrices = (v.R * v.W_bytes + v.R0 * v.V_bytes) * v.N + router
    return {
        "hidden": (v.T * (columns + slots + programs * v.E * v.logits_bytes), 0),
        "adapter": (row_blocks * matrices, 0),
        "onto": (_onto(v, v.N), 0),
        "out": (0, v.T * v.N * v.out_bytes),
    }


def _hidden_gradient_epilogue(v) -> tuple[int, int]:
    """(read, written) of h~, gate and probs; dh, dlogits and dh0."""
    R = v.E * v.D
    read = R * v.weighted_bytes + _FLOAT * v.E * (1 + v.HAS_BALANCE)
    return v.T * read, v.T * (R * v.hidden_bytes + _FLOAT * v.E + v.R0 * v.residual_bytes)


def _fused_hidden_gradient(v) -> dict:
    R, row_blocks = v.E * v.D, blocks(v.T, v.BT)
    read, written = _hidden_gradient_epilogue(v)
    if v.partial_bytes:  # lora_B's gradient rides along, and needs h~ before the epilogue
        read += v.T * R * v.weighted_bytes
    return {
        "in": (v.T * v.M * v.grad_y_bytes, 0),
        "adapter": (row_blocks * (R * v.B_bytes + v.R0 * v.B0_bytes) * v.M, 0),
        "hidden": (read, written),
        "gradient": (0, row_blocks * v.M * R * v.partial_bytes),
    }


def _finish_hidden_gradient(v) -> dict:
    read, written = _hidden_gradient_epilogue(v)
    return {"hidden": (_FLOAT * v.splits * v.T * (v.E * v.D + v.R0) + read, written)}


def _weight_gradient(v) -> dict:
    R, splits = v.E * v.D, blocks(v.T, v.split_T)
    rank_blocks = blocks(R, v.BC)
    blocks_of_x = rank_blocks if v.hidden_bytes else 1
    per_block = _FLOAT * v.E * bool(v.logits_bytes) + v.E * v.gate_bytes  # dlogits; gates that slots are of
    of_y, of_x = R * v.weighted_bytes, (R * v.hidden_bytes + blocks_of_x * per_block) * bool(v.x_bytes)
    out_B, out_A = R * v.out_B_bytes, R * v.out_A_bytes + v.E * v.out_router_bytes
    return {
        "dY": (rank_blocks * v.T * v.M * v.grad_y_bytes, 0),
        "x": (blocks_of_x * v.T * v.N * v.x_bytes, 0),
        "hidden": (v.T * (v.blocks_M * of_y + blocks(v.N, v.BN) * of_x), 0),
        "gradient": (0, splits * (out_B * v.M + out_A * v.N)),
    }


def _add_splits(v) -> dict:
    read = v.splits_B * v.size_B + v.splits_A * (v.size_A + v.size_router)
    written = v.size_B * v.out_B_bytes + v.size_A * v.out_A_bytes + v.size_router * v.out_router_bytes
    return {"gradient": (_FLOAT * read, written)}


#: Kernel -> (its plan, the kinds of its pointer arguments where they are others than in ``_POINTERS``).
FORMULAS: dict[str, tuple[Callable[[SimpleNamespace], dict], dict[str, str]]] = {
    "pack_adapter": (_pack_adapter, {"out_ptr": "adapter"}),
    "fused_forward": (_fused_forward, {}),
    "finish_balance": (_finish_balance, {}),
    "project": (_project, {"out_ptr": "hidden"}),
    "route_and_prefill": (_route_and_prefill, {}),
    "dropped_hidden": (_dropped_hidden, {}),
    "expand_columns": (_expand_columns, {"out_ptr": "out"}),
    "fused_hidden_gradient": (_fused_hidden_gradient, {"partial_ptr": "gradient"}),
    "finish_hidden_gradient": (_finish_hidden_gradient, {}),
    "weight_gradient": (_weight_gradient, {"grad_y_ptr": "dY", "x_ptr": "x"}),
    "add_splits": (_add_splits, {}),
}

#: Kind -> pointer arguments, without "_ptr".
_POINTERS = {
    "in": "x grad_y",
    "out": "y",
    "onto": "onto",
    "adapter": "A A0 B B0 router W V W1 W2",
    "hidden": "weighted hidden residual logits raw gate probs partial",
    "gradient": "out_B out_A out_router partial_B partial_A",
    "scalars": "scaling_E seed load load_E balance grad_balance",
}
_KINDS = {f"{name}_ptr": kind for kind, names in _POINTERS.items() for name in names.split()}


def planned(launch: Launch) -> dict[str, tuple[int, int]]:
    """Kind -> (bytes read, bytes written) that the launch's tiles imply; nothing runs, so meta tensors will do."""
    values = {**launch.arguments, **launch.constants}
    for name in [name for name in values if name.endswith("_ptr")]:
        tensor = values.pop(name)
        values[name.removesuffix("_ptr") + "_bytes"] = 0 if tensor is None else tensor.element_size()
    return FORMULAS[launch.name][0](SimpleNamespace(**values))


def pointer_kinds(launch: Launch) -> dict[str, str]:
    """Pointer argument -> kind, for those that are not None.

    Raises:
        KeyError: a kernel or a pointer that has no entry here.
    """
    kinds = {**_KINDS, **FORMULAS[launch.name][1]}
    return {name: kinds[name] for name, value in launch.arguments.items() if isinstance(value, Tensor)}
