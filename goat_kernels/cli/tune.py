"""Measure which tiles are fastest on this GPU; the options are those of ``bench/tune.py`` in a checkout."""

from __future__ import annotations

from goat_kernels.cli.bench import door

add_arguments, run = door("bench.tune")
