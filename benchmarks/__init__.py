"""Benchmarks: speed beside plain PyTorch, cost of checkpoints and guards, growth of cost."""
