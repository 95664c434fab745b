"""``accelerate launch --config_file ... fsdp2_on_cpu.py SCRIPT``: runs SCRIPT with accelerate's FSDP2 on a CPU.

accelerate 1.15 looks at its FSDP settings on accelerators alone; on a CPU it takes DDP instead, without a word. Here
each Accelerator is told that it is FSDP. What it does from then on is its own code.
"""

from __future__ import annotations

import functools
import runpy
import sys

import accelerate
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

_original = accelerate.Accelerator.__init__


@functools.wraps(_original)
def _with_fsdp(self, *args, **kwargs) -> None:
    _original(self, *args, **kwargs)
    plugin = FullyShardedDataParallelPlugin()  # from the environment that the launcher set
    for state in (accelerate.PartialState(), self.state):
        state.distributed_type = DistributedType.FSDP
    self.state.fsdp_plugin = plugin
    assert self.is_fsdp2 and self.num_processes == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerate.Accelerator.__init__ = _with_fsdp
    runpy.run_path(sys.argv[1], run_name="__main__")
