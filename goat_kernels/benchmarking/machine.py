"""What a result was measured on, and how fast that machine reads, copies and multiplies: the ceilings of a pass."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import goat_kernels
from goat_kernels.benchmarking.results import RESULTS_FOLDER
from goat_kernels.benchmarking.timing import fastest_ms

#: Packages whose version a result names, where they are installed.
_PACKAGES = ("triton", "transformers", "peft", "liger-kernel", "unsloth")

#: Says which commit a copy without git was made of.
COMMIT_VARIABLE = "GOAT_KERNELS_COMMIT"

#: Assumed where the system does not say, in bytes.
_USUAL_CACHE_BYTES = 32 * 2**20


def describe(device: torch.device) -> dict:
    """The fields that every row of a run has in common; no paths and no host names."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "gpu_multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "hip": torch.version.hip if cuda else None,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def commit() -> dict:
    """The checkout's commit, and whether anything but results differs from it.

    Where this is no checkout, as a copy on another machine, :data:`COMMIT_VARIABLE` says it.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    # A virtual environment may lie in somebody else's checkout.
    if head is None or not _git("ls-files", Path(__file__).name):
        return {"commit": os.environ.get(COMMIT_VARIABLE) or None, "commit_is_dirty": None}
    changes = _git("status", "--porcelain", "--", ":(top)", f":(top,exclude){RESULTS_FOLDER}")
    return {"commit": head, "commit_is_dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str]:
    """Package -> version, for what is installed of what matters."""
    found = {"goat_kernels": goat_kernels.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """The processor's name as the kernel gives it, with its family and model where the name alone says little."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    wanted = {key.strip(): value.strip() for key, value in fields.items()}
    name = wanted.get("model name", "unknown processor")
    return f"{name} (family {wanted.get('cpu family', '?')}, model {wanted.get('model', '?')})"


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if re.fullmatch(r"\d+[KM]", size := path.read_text().strip())
    ]
    return max(sizes, default=_USUAL_CACHE_BYTES)


def _git(*command: str) -> str | None:
    """What git says about the checkout that this package lies in; None outside of one."""
    try:
        done = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


# --- the ceilings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """One rate that the machine reaches, in the fastest of its rounds: a ceiling is what nothing is above.

    Attributes:
        what: "read", "copy" or "product".
        time_ms: of one call.
        rate: 10^9 bytes per second, read and written ones together, or 10^12 operations per second.
        size: bytes of a buffer, or the side of the matrices.
    """

    what: str
    time_ms: float
    rate: float
    size: int


@dataclass(frozen=True)
class Roofline:
    """What the machine reaches on large buffers and products of random numbers.

    Attributes:
        read_gb_per_s, copy_gb_per_s: 10^9 bytes per second: of a sum; of a copy, read and written ones together.
        tflops: 10^12 floating-point operations per second, of products of ``dtype`` at the size that suits it best.
        measured: what these were taken from.
    """

    dtype: torch.dtype
    read_gb_per_s: float
    copy_gb_per_s: float
    tflops: float
    measured: tuple[Ceiling, ...] = ()

    @property
    def gb_per_s(self) -> float:
        """The faster of the two: a floor must not be above what a pass can do."""
        return max(self.read_gb_per_s, self.copy_gb_per_s)

    def floor_ms(self, moved_bytes: int, flops: int) -> float:
        """No faster than either ceiling allows."""
        return 1e3 * max(moved_bytes / (self.gb_per_s * 1e9), flops / (self.tflops * 1e12))

    def row(self) -> dict:
        return {
            "machine_read_gb_per_s": round(self.read_gb_per_s, 2),
            "machine_copy_gb_per_s": round(self.copy_gb_per_s, 2),
            "machine_tflops": round(self.tflops, 4),
        }


def product_sizes(device: torch.device, *, quick: bool) -> tuple[int, ...]:
    """Sides of the square products that the matmul rate is the best of."""
    if quick:
        return (32, 64)
    return (4096, 8192, 16384) if device.type == "cuda" else (1024, 1536, 2048)


def measure_roofline(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Roofline:
    """Measure the ceilings.

    Args:
        device: where.
        dtype: of the product.
        quick: on buffers too small for a true figure, for tests.
    """
    cuda = device.type == "cuda"
    size_bytes = 2**20 if quick else (2**31 if cuda else max(2**27, 4 * cache_bytes(device)))
    rounds = 3 if quick else 11
    measured = [*_bandwidths(device, size_bytes, rounds)]
    measured += [_product(device, dtype, size, rounds) for size in product_sizes(device, quick=quick)]
    best = {what: max(c.rate for c in measured if c.what == what) for what in ("read", "copy", "product")}
    return Roofline(dtype, best["read"], best["copy"], best["product"], tuple(measured))


def _bandwidths(device: torch.device, size_bytes: int, rounds: int) -> Iterator[Ceiling]:
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.randn_like(source)
    read_ms = fastest_ms(lambda _: source.sum(), device, rounds=rounds)
    yield Ceiling("read", read_ms, size_bytes / read_ms / 1e6, size_bytes)
    copy_ms = fastest_ms(lambda _: target.copy_(source), device, rounds=rounds)
    yield Ceiling("copy", copy_ms, 2 * size_bytes / copy_ms / 1e6, size_bytes)


def _product(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> Ceiling:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    time_ms = fastest_ms(lambda _: torch.mm(left, right, out=out), device, rounds=rounds)
    return Ceiling("product", time_ms, 2 * size**3 / time_ms / 1e9, size)
