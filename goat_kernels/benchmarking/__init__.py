"""The benchmarks behind ``goat-kernels bench``: suites of contenders, timed beside one another in one process.

cases.py        which shapes a suite runs
machine.py      what a result was measured on: processor, GPU, versions, commit; read and copy bandwidth, matmul rate
timing.py       warm-up, interleaved rounds, device events, rotation through copies of the inputs
capture.py      CUDA graphs of what is timed, and the check of what the timed step itself gives
failures.py     what went wrong, in one line
progress.py     a bar on a terminal, a line now and then elsewhere
steps.py        one call of a layer as what is timed: its forward, its backward or both
settings.py     what a run is given
memory.py       bytes saved for backward, peak of what torch's allocator handed out
layers.py       the layer's contenders on shared tensors, and the check of each against float64
peers.py        other people's layers: PEFT's LoRA, the expert loop, Unsloth's LoRA
ahead.py        compiling the kernels of a suite on all processors
passes.py       each pass alone, its floor in bytes and operations
extra_k.py      the design's rival: one Triton matmul with the rank as more of its K
tuning.py       neighbours of the table's tiles, checked and timed
models.py       training steps of whole transformers models
startup.py      import, first call, initialisation
launches.py     how many kernels a call launches
layer_suite.py, host_suite.py, design_suite.py    rows of layers; of what a call costs the host; of orders of base
                product and adapter
suites.py       the suites by name: from cases to rows
results.py      rows as JSON lines: written as they come, read back, chosen
compare.py      two files of results against each other
tables.py, plots.py, report.py    README's and docs' tables and figures, from the files of results alone
"""
