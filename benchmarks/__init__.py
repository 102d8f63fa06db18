"""Benchmarks: speed compared with plain PyTorch, cost of checkpoints and the NaN guard, scaling, checks of a GPU."""
