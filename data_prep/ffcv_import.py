"""Imports FFCV 1.0.2 without its side effects: seconds of compilation, and another number of threads for torch."""

import importlib
from unittest import mock

import torch


def import_ffcv() -> None:
    """After this, `import ffcv...` is cheap and harmless. Call it before any such import, inside functions only."""
    threads = torch.get_num_threads()
    try:
        # FFCV keeps two numbers in a typed dictionary that is only ever read by plain Python: numba would compile a
        # whole dictionary type for them at each start, for 5 seconds.
        with mock.patch("numba.typed.Dict", dict):
            importlib.import_module("ffcv.fields.rgb_image")

        import numba
        from ffcv.pipeline.compiler import Compiler

        def set_num_threads(n: int) -> None:
            """FFCV's own also sets torch's threads, in every epoch and from its own thread too."""
            Compiler.num_threads = n
            numba.set_num_threads(n)

        Compiler.set_num_threads = set_num_threads
    finally:
        torch.set_num_threads(threads)
