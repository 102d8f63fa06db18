"""Imports FFCV 1.0.2 without its side effects: seconds of compilation, and another number of threads for torch."""

import importlib
from typing import Any
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
        from ffcv.memory_managers.os_cache import OSCacheManager
        from ffcv.pipeline.compiler import Compiler

        def set_num_threads(n: int) -> None:
            """FFCV's own also sets torch's threads, in every epoch and from its own thread too."""
            Compiler.num_threads = n
            numba.set_num_threads(n)

        def compile_reader(self: OSCacheManager) -> Any:
            """FFCV's own searches a table for the size of each image; in our files all have that of the first."""

            def read(address: int, memory: Any) -> Any:
                return memory[0][address : address + memory[2][0]]

            return Compiler.compile(read, numba.uint8[::1](numba.uint64, self.state_type))

        Compiler.set_num_threads = set_num_threads
        OSCacheManager.compile_reader = compile_reader  # two seconds less for each loader
    finally:
        torch.set_num_threads(threads)
