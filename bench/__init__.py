"""Benchmarks: the layer beside its peers in one interleaved run."""
