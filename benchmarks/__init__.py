"""Benchmarks: speed compared with plain PyTorch, cost of checkpoints and guards, scaling, and `make gpu`."""
