"""Fault injection: kills, signals, frozen processes and damaged files. Run it with `python -m tests.soak`."""
