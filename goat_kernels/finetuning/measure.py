"""Peak memory of a stretch of work, on a GPU or in the process, by the same two calls."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path

import torch

_MIB = 2**20
_SAMPLE_SECONDS = 0.005


class PeakMemory:
    """Context manager: by how many MiB memory rose, at its peak, above where it stood at the start.

    On a GPU that is torch's allocator (exact). On a CPU it is the resident memory of the process, from the kernel's
    high-water mark where Linux lets it be reset, otherwise from a thread that samples it every 5 ms. Memory that the
    process had freed but not given back to the system is given back first, as far as the C library allows.

    Attributes:
        peak_mib: set when the block ends.
        source: what was measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_mib = 0.0
        self.source = "GPU memory allocated by torch" if device.type == "cuda" else "resident memory of the process"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        _trim_heap()
        self._start = _resident_bytes("VmRSS")
        self._sampler = None if _reset_high_water_mark() else _Sampler()
        return self

    def __exit__(self, *exception) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._sampler is not None:
            peak = self._sampler.stop()
        else:
            peak = _resident_bytes("VmHWM")
        self.peak_mib = (peak - self._start) / _MIB


class _Sampler:
    """Samples resident memory from a thread until it is stopped."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._peak = _resident_bytes("VmRSS")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, _resident_bytes("VmRSS"))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self._peak, _resident_bytes("VmRSS"))


def _resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since the last reset) of this process."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        import psutil  # comes with PEFT; needed where there is no /proc

        return psutil.Process().memory_info().rss


def _reset_high_water_mark() -> bool:
    """Whether VmHWM could be set back to the present; it needs Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        # Some sandboxes accept the write and ignore it.
        return _resident_bytes("VmHWM") - _resident_bytes("VmRSS") < _MIB
    except OSError:
        return False


def _trim_heap() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
