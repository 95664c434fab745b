"""What is paid once: importing the package, a layer's first call, and the initialisation of each layer of a model.

Imports and first calls are measured in processes of their own; a first call with an empty cache of compiled kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import nn

from goat_kernels.backends import resolve_backend
from goat_kernels.benchmarking.cases import NUM_EXPERTS, TOP_K
from goat_kernels.benchmarking.failures import in_words
from goat_kernels.benchmarking.settings import BenchSettings
from goat_kernels.linear import GoatLinear

#: What is imported -> (statement, the package without which it is skipped).
_IMPORTS = {
    "import torch": ("import torch", "torch"),
    "import goat_kernels, GoatLinear": ("from goat_kernels import GoatLinear", "torch"),
    "import peft": ("import peft", "peft"),
    "import goat_kernels, GoatConfig": ("from goat_kernels import GoatConfig", "peft"),
}

_TIMED_IMPORT = "import time; t = time.perf_counter(); {}; print((time.perf_counter() - t) * 1e3)"

_FIRST_CALLS = """
import json, sys, time
import torch
from goat_kernels import GoatLinear
device, dtype, backend, size, tokens = sys.argv[1:]
dtype = getattr(torch, dtype)
make = dict(r=32, num_experts=8, top_k=2, init="lora", balance_coefficient=1e-3, backend=backend)
layer = GoatLinear(int(size), int(size), device=device, dtype=dtype, **make)
x = torch.randn(int(tokens), int(size), device=device).to(dtype).requires_grad_()
times = []
for _ in range(3):
    start = time.perf_counter()
    layer(x).square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    times.append((time.perf_counter() - start) * 1e3)
print(json.dumps(times))
"""

_CALL = "call, forward and backward"

#: (in_features, out_features) of the linear layers of a Llama of 7 billion parameters: q, k, v, o; gate, up; down.
_7B_LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096))

#: Loads the libraries of the decompositions: one of a layer of 7B takes from seconds to minutes.
_WARMING_LAYER = (64, 64)

#: On a CPU the decomposition of those takes minutes: layers of a quarter of the width.
_QUARTER_LAYERS = ((1024, 1024), (1024, 2752), (2752, 1024))


def startup_rows(settings: BenchSettings) -> Iterator[dict]:
    """All of it."""
    yield from _import_rows(1 if settings.quick else 3)
    yield from _first_call_rows(settings)
    yield from _initialisation_rows(settings)


def _run(code: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"the process ended with {done.returncode}")
    return done.stdout


def _import_rows(rounds: int) -> Iterator[dict]:
    """From the start of the import statement, the interpreter's own start left out; files are cached."""
    for name, (statement, package) in _IMPORTS.items():
        row = {"contender": name, "mode": "import"}
        if importlib.util.find_spec(package) is None:
            yield {**row, "skipped": f"the package {package} is not installed"}
            continue
        try:
            times = [float(_run(_TIMED_IMPORT.format(statement)).split()[-1]) for _ in range(rounds)]
        except Exception as failure:
            yield {**row, "failed": in_words(failure)}
            continue
        yield {**row, "time_ms_p50": statistics.median(times), "rounds": rounds}


def _first_call_rows(settings: BenchSettings) -> Iterator[dict]:
    cuda = settings.device.type == "cuda"
    size, tokens = (4096, 8192) if cuda else ((32, 16) if settings.quick else (768, 256))
    for backend in ("torch", "triton"):
        row = {"contender": f"GoatLinear, {backend}", "T": tokens, "N": size, "M": size, "R": 32, **settings.dtypes()}
        if backend == "triton" and not cuda:
            yield {**row, "mode": f"first {_CALL}", "skipped": "the Triton kernels are compiled for a GPU"}
            continue
        try:
            resolve_backend(backend, settings.device, settings.dtype)
        except RuntimeError as error:
            yield {**row, "mode": f"first {_CALL}", "skipped": str(error)}
            continue
        arguments = (settings.device.type, settings.dtypes()["dtype"], backend, str(size), str(tokens))
        try:
            with tempfile.TemporaryDirectory() as empty:
                first, _, third = json.loads(_run(_FIRST_CALLS, *arguments, environment={"TRITON_CACHE_DIR": empty}))
        except Exception as failure:
            yield from (
                {**row, "mode": f"{which} {_CALL}", "failed": in_words(failure)} for which in ("first", "third")
            )
            continue
        yield {**row, "mode": f"first {_CALL}", "time_ms_p50": first, "rounds": 1}
        yield {**row, "mode": f"third {_CALL}", "time_ms_p50": third, "rounds": 1}


def _initialisation_rows(settings: BenchSettings) -> Iterator[dict]:
    layers = _7B_LAYERS if settings.device.type == "cuda" else _QUARTER_LAYERS
    ways = {
        "GoatLinear": {"init": "goat"},
        "GoatLinear, init='pissa', svd='randomized'": {"init": "pissa", "svd": "randomized"},
        "GoatLinear, init='lora'": {"init": "lora"},
    }
    small = nn.Linear(*_WARMING_LAYER, device=settings.device, dtype=settings.dtype)
    for N, M in (_WARMING_LAYER,) if settings.quick else layers:
        torch.manual_seed(0)
        linear = nn.Linear(N, M, device=settings.device, dtype=settings.dtype)
        for name, options in ways.items():
            row = {"contender": name, "mode": "initialisation of a layer", "N": N, "M": M, "R": 32, **settings.dtypes()}
            try:
                _elapsed_ms(small, options, settings.device)
                elapsed = _elapsed_ms(linear, options, settings.device)
            except Exception as failure:
                yield {**row, "failed": in_words(failure)}
                continue
            yield {**row, "time_ms_p50": elapsed, "rounds": 1}


def _elapsed_ms(linear: nn.Linear, options: dict, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    GoatLinear.from_linear(linear, r=32, num_experts=NUM_EXPERTS, top_k=TOP_K, **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
