"""Benchmarks: speed compared with plain PyTorch, cost of checkpoints and guards, acceptance of GPUs, and scaling."""
