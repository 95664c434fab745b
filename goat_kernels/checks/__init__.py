"""What ``goat-kernels check`` runs: correctness on this machine, compilation for other GPUs, memory traffic."""
