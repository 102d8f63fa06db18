"""Fault injection: the trainer is killed, signalled, frozen and fed damaged files. `python -m tests.soak`."""
