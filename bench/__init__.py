"""Everything that measures: ``goat-kernels bench``, ``goat-kernels tune`` and ``python -m bench.quality``.

A *case* is a shape (cases.py), a *candidate* is one thing to time on it (steps.py), a *row* is a dict: what was
measured, on what, and what came of it. One loop checks candidates and times them beside one another
(``steps.measured``), one writer appends rows to files (results.py), and one generator makes tables, figures and pages
of these (report.py).

command.py, tune.py   the options of ``goat-kernels bench`` and ``tune``, and what they do
suites.py             the suites by name: from cases to rows
cases.py              settings of a run, and which shapes a suite runs
timing.py, steps.py   interleaved rounds, device events, rotation through copies of the inputs; CUDA graphs; the loop
machine.py            what a result was measured on; read and copy bandwidth, matmul rate
layers.py, memory.py  layer, scaling, memory: the contenders, the check of each; bytes saved, the peak, launches
passes.py             kernels: each pass alone, its floor
host.py               host; dry_driver.py is a driver that launches nothing, for machines without a GPU
models.py, tuning.py  model: training steps of whole models; tuning, and the search of ``goat-kernels tune``
results.py            rows as JSON lines: written as they come, read back, chosen
tables.py, plots.py, report.py    README's and docs' tables and figures, from the files of results alone
gpu_visit.py          everything that a GPU has to answer, in one call that ends in time
quality/              GOAT beside other methods on small real tasks
"""
