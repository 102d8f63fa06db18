"""Imports FFCV 1.0.2 without its side effects: seconds of compilation, and a changed thread count in torch."""

import functools
import importlib
from typing import Any
from unittest import mock

import numpy as np
import torch


@functools.cache
def import_ffcv() -> None:
    """Makes later `import ffcv...` statements cheap and harmless. Call it in a function, before such a statement."""
    threads = torch.get_num_threads()
    try:
        # FFCV keeps two numbers in a numba.typed.Dict, but only plain Python code reads them, so a dict is enough.
        # Numba would spend 5 seconds at each start on compiling the type of its Dict. FFCV also calls
        # torch.cuda.is_available, and after this call, a forked process cannot use CUDA.
        with mock.patch("numba.typed.Dict", dict), mock.patch("torch.cuda.is_available", return_value=False):
            importlib.import_module("ffcv.fields.rgb_image")

        import numba
        from ffcv.loader import epoch_iterator
        from ffcv.memory_managers.os_cache import OSCacheManager
        from ffcv.pipeline import graph
        from ffcv.pipeline.compiler import Compiler

        def set_num_threads(n: int) -> None:
            """FFCV's version also sets torch's thread count, in every epoch and from its own thread."""
            Compiler.num_threads = n
            numba.set_num_threads(n)

        def compile_reader(self: OSCacheManager) -> Any:
            """FFCV's version looks up the size of each image in a table. Here, all images are raw and of one size."""

            def read(address: int, memory: Any) -> Any:
                return memory[0][address : address + memory[2][0]]

            return Compiler.compile(read, numba.uint8[::1](numba.uint64, self.state_type))

        compile_always, compiled = Compiler.compile, {}

        def compile_once(code: Any, signature: Any = None) -> Any:
            """For each field and loader, FFCV's version takes two seconds to compile code that is mostly the same."""
            captured = tuple(cell.cell_contents for cell in code.__closure__ or ())
            in_parallel = Compiler.num_threads > 1 and getattr(code, "is_parallel", False)
            key = (code.__module__, code.__code__, captured, signature, in_parallel)
            if key not in compiled:
                compiled[key] = compile_always(code, signature)
            return compiled[key]

        Compiler.set_num_threads = set_num_threads
        Compiler.compile = compile_once
        OSCacheManager.compile_reader = compile_reader  # FFCV's version takes two seconds to compile
        # Our pipelines end on the host. On a machine with a GPU, FFCV's thread would still select a CUDA stream for
        # each batch, and so create a CUDA context on the first GPU in every process.
        epoch_iterator.IS_CUDA = False
        # FFCV's version also page-locks the buffers, which creates a CUDA context, too, even for --device cpu.
        graph.allocate_query = lambda query, size, ahead: np.empty((ahead, size, *query.shape), query.dtype)
    finally:
        torch.set_num_threads(threads)
