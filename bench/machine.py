"""What a result was measured on, and how fast that machine reads, copies and multiplies: the ceilings of a pass."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import goat_kernels
from bench.results import RESULTS_FOLDER
from bench.timing import time_interleaved

#: Packages whose version a result names, where they are installed.
_PACKAGES = ("triton", "transformers", "peft")

#: Says which commit a copy without git was made of.
COMMIT_VARIABLE = "GOAT_KERNELS_COMMIT"


def describe(device: torch.device) -> dict:
    """The fields that every row of a run has in common; no paths and no host names."""
    cuda = device.type == "cuda"
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "goat_kernels": goat_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)},
        },
    }


def commit() -> dict:
    """The checkout's commit, and whether anything but results differs from it.

    Where this is no checkout, as a copy on another machine, :data:`COMMIT_VARIABLE` says it.
    """
    head = _said("git", "rev-parse", "--short=12", "HEAD")
    # A virtual environment may lie in somebody else's checkout.
    if head is None or not _said("git", "ls-files", Path(__file__).name):
        return {"commit": os.environ.get(COMMIT_VARIABLE) or None, "commit_is_dirty": None}
    changes = _said("git", "status", "--porcelain", "--", ":(top)", f":(top,exclude){RESULTS_FOLDER}")
    return {"commit": head, "commit_is_dirty": None if changes is None else bool(changes)}


def processor_name() -> str:
    """The processor's name as the kernel gives it, with its family and model where the name alone says little."""
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    name = fields.get("model name", "unknown processor")
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if re.fullmatch(r"\d+[KM]", size := path.read_text().strip())
    ]
    return max(sizes, default=2**25)


def _said(*command: str) -> str | None:
    """What a command says, run in this folder; None where there is no such command or it fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# --- the ceilings -------------------------------------------------------------------------------------------------


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> dict:
    """What the machine reaches on large buffers and products of random numbers, measured once in a process.

    In 10^9 bytes per second of a sum, and of a copy, read and written bytes together; in 10^12 floating-point
    operations per second, of products in ``dtype`` at the size that suits them best. Each in the fastest of its rounds.
    ``quick``: on buffers too small for a true figure, for tests.
    """
    cuda = device.type == "cuda"
    size_bytes = 2**20 if quick else (2**31 if cuda else max(2**27, 4 * cache_bytes(device)))
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.randn_like(source)
    calls = {"read": lambda _: source.sum(), "copy": lambda _: target.copy_(source)}
    for side in (32, 64) if quick else (4096, 8192, 16384) if cuda else (1024, 1536, 2048):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls[side] = lambda _, a=left, b=right: a @ b
    samples = time_interleaved(calls, device=device, copies=1, rounds=3 if quick else 11)
    read_ms, copy_ms, *products_ms = (min(sample.time_ms) for sample in samples.values())
    sides = [side for side in calls if isinstance(side, int)]
    return {
        "machine_read_gb_per_s": size_bytes / read_ms / 1e6,
        "machine_copy_gb_per_s": 2 * size_bytes / copy_ms / 1e6,
        "machine_tflops": max(2 * n**3 / ms / 1e9 for n, ms in zip(sides, products_ms, strict=True)),
    }


def floor_ms(machine: dict, moved_bytes: int, flops: int) -> float:
    """No faster than either ceiling allows. Of the bandwidths the larger: no pass may be below its floor."""
    gb_per_s = max(machine["machine_read_gb_per_s"], machine["machine_copy_gb_per_s"])
    return 1e3 * max(moved_bytes / (gb_per_s * 1e9), flops / (machine["machine_tflops"] * 1e12))
