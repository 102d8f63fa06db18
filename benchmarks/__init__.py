"""Benchmarks: the speed of training and loading compared with plain PyTorch, and the cost of checkpoints and guards."""
