"""Benchmarks: speed beside plain PyTorch, cost of checkpoints and guards, acceptance of a GPU, growth of cost."""
