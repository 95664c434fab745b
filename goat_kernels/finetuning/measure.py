"""Peak memory of a stretch of work, on a GPU or in the process, by the same two calls."""

from __future__ import annotations

import gc
import threading

import psutil
import torch

_MIB = 2**20
_SAMPLE_SECONDS = 0.005


class PeakMemory:
    """Context manager: by how many MiB memory rose, at its peak, above where it stood at the start.

    On a GPU that is torch's allocator (exact). On a CPU it is the resident memory of the process, sampled every 5 ms;
    memory that the process had freed but not given back to the system is given back first, where psutil can do that.

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
        if hasattr(psutil, "heap_trim"):
            psutil.heap_trim()
        self._process, self._stop = psutil.Process(), threading.Event()
        self._start = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._peak - self._start) / _MIB

    def _sample(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(_SAMPLE_SECONDS)
            self._peak = max(self._peak, self._process.memory_info().rss)
