"""What a result was measured on, and how fast that machine copies and multiplies: the two ceilings of every pass."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import goat_kernels
from goat_kernels.benchmarking.timing import median_ms

#: Packages whose version a result names, where they are installed.
_PACKAGES = ("triton", "transformers", "peft", "liger-kernel", "unsloth")

#: Assumed where the system does not say, in bytes.
_USUAL_CACHE_BYTES = 32 * 2**20


def describe(device: torch.device) -> dict:
    """The fields that every row of a run has in common; no paths and no host names."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "commit_is_dirty": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
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
class Roofline:
    """What the machine reaches, in a large copy and a large product of random numbers.

    Attributes:
        gb_per_s: 10^9 bytes per second, read and written ones together.
        tflops: 10^12 floating-point operations per second, of products of ``dtype``.
    """

    dtype: torch.dtype
    gb_per_s: float
    tflops: float

    def floor_ms(self, moved_bytes: int, flops: int) -> float:
        """No faster than either ceiling allows."""
        return 1e3 * max(moved_bytes / (self.gb_per_s * 1e9), flops / (self.tflops * 1e12))

    def row(self) -> dict:
        return {"machine_gb_per_s": round(self.gb_per_s, 2), "machine_tflops": round(self.tflops, 4)}


def measure_roofline(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Roofline:
    """Measure both ceilings.

    Args:
        device: where.
        dtype: of the product.
        quick: on buffers too small for a true figure, for tests.
    """
    cuda = device.type == "cuda"
    copied_bytes = 2**20 if quick else (2**31 if cuda else max(2**27, 4 * cache_bytes(device)))
    size = 64 if quick else (8192 if cuda else 2048)
    rounds = 3 if quick else 11
    source = torch.randn(copied_bytes // 4, device=device)
    target = torch.randn_like(source)
    copy_ms = median_ms(lambda _, target=target, source=source: target.copy_(source), device, rounds=rounds)
    del source, target  # gigabytes on a GPU
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    product_ms = median_ms(lambda _: torch.mm(left, right, out=out), device, rounds=rounds)
    return Roofline(dtype, 2 * copied_bytes / copy_ms / 1e6, 2 * size**3 / product_ms / 1e9)
