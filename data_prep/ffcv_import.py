"""Imports FFCV 1.0.2 and patches it.

Without the patches, FFCV would compile for seconds, change torch's thread count, and create CUDA contexts.
"""

import functools
import importlib
from typing import Any
from unittest import mock

import numpy as np
import torch


@functools.cache
def import_ffcv() -> None:
    """Imports and patches FFCV, so that later `import ffcv...` statements are cheap and get the patched modules.

    Call it before such a statement, and in a function, because the import is slow.
    """
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
            """Sets the thread count of FFCV and Numba.

            FFCV's version also sets torch's thread count, in every epoch and from its own thread.
            """
            Compiler.num_threads = n
            numba.set_num_threads(n)

        def compile_reader(self: OSCacheManager) -> Any:
            """Compiles a function that returns the bytes of the image at `address`.

            All our images are raw and of one size, so the first size holds for all. FFCV's version searches a table for
            the size of each image, and takes two seconds to compile.
            """

            def read(address: int, memory: Any) -> Any:
                file, _, sizes = memory
                return file[address : address + sizes[0]]

            return Compiler.compile(read, numba.uint8[::1](numba.uint64, self.state_type))

        original_compile, cache = Compiler.compile, {}

        def compile_once(code: Any, signature: Any = None) -> Any:
            """Compiles `code`, or returns the result of an earlier call with the same code and the same conditions.

            FFCV's version compiles for two seconds for each field and loader, although the code is mostly the same.
            """
            captured = tuple(cell.cell_contents for cell in code.__closure__ or ())
            in_parallel = Compiler.num_threads > 1 and getattr(code, "is_parallel", False)
            key = (code.__module__, code.__code__, captured, signature, in_parallel)
            if key not in cache:
                cache[key] = original_compile(code, signature)
            return cache[key]

        def allocate_query(query: Any, batch_size: int, num_batches: int) -> np.ndarray:
            """Allocates the buffers of `num_batches` batches for one operation of a pipeline.

            FFCV's version also page-locks them, which creates a CUDA context, even for --device cpu.
            """
            return np.empty((num_batches, batch_size, *query.shape), query.dtype)

        Compiler.set_num_threads = set_num_threads
        Compiler.compile = compile_once
        OSCacheManager.compile_reader = compile_reader
        # This is already False, unless other code has imported FFCV before. If it were True, FFCV's thread would select
        # a CUDA stream for each batch, although our pipelines end on the host. Each process that does so creates a CUDA
        # context on the first GPU.
        epoch_iterator.IS_CUDA = False
        graph.allocate_query = allocate_query
    finally:
        torch.set_num_threads(threads)
