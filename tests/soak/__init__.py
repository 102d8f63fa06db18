"""Fault injection: the trainer is killed, signalled, frozen and fed damaged files, many times. `python -m tests.soak`."""
