"""What the machine does to a program: little memory, a full disk, permissions, an end without notice."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

#: A load of a tiny adapter takes a few megabytes; what is hostile asks for a gigabyte and more.
ALLOWED_BYTES = 256 * 2**20


@contextlib.contextmanager
def little_memory():
    """No more address space than ALLOWED_BYTES on top of what is in use: a large allocation fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ALLOWED_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def no_file_longer_than(size: int):
    """As a full disk has it: writes that go further fail (Python ignores the signal that comes with it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def bound_by_permissions():
    """Root writes anywhere by a capability, which is put down meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data, changed = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    changed[:] = data[:]
    changed[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, changed) == 0
    try:
        yield
    finally:
        assert libc.capset(header, data) == 0


def in_child(action) -> int:
    """Run ``action`` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]
