"""Imports FFCV 1.0.2 without its side effects: seconds of compilation, and another number of threads for torch."""

import functools
import importlib
from typing import Any
from unittest import mock

import torch


@functools.cache
def import_ffcv() -> None:
    """After this, `import ffcv...` is cheap and harmless. Call it before any such import, inside functions only."""
    threads = torch.get_num_threads()
    try:
        # FFCV keeps two numbers in a typed dictionary that is only ever read by plain Python: numba would compile a
        # whole dictionary type for them at each start, for 5 seconds.
        with mock.patch("numba.typed.Dict", dict):
            importlib.import_module("ffcv.fields.rgb_image")

        import numba
        from ffcv.loader import epoch_iterator
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

        compile_anew, compiled = Compiler.compile, {}

        def compile_once(code: Any, signature: Any = None) -> Any:
            """FFCV's own compiles for each field of each loader, two seconds in all, what is mostly alike."""
            captured = tuple(cell.cell_contents for cell in code.__closure__ or ())
            in_parallel = Compiler.num_threads > 1 and getattr(code, "is_parallel", False)
            key = (code.__module__, code.__code__, captured, signature, in_parallel)
            if key not in compiled:
                compiled[key] = compile_anew(code, signature)
            return compiled[key]

        Compiler.set_num_threads = set_num_threads
        Compiler.compile = compile_once
        OSCacheManager.compile_reader = compile_reader  # the search takes two seconds to compile
        # Our pipelines end on the host. Where it sees a GPU, FFCV's thread would yet choose a stream for each batch,
        # and by that every process would open a context on the first GPU.
        epoch_iterator.IS_CUDA = False
    finally:
        torch.set_num_threads(threads)
