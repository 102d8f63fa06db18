"""Builds an imitation of CUDA that computes nothing, and reads its log of calls.

When the library is preloaded, it handles every call from torch to libcudart, libcuda, cuBLAS, cuDNN and NCCL. torch's
own code runs unchanged on it: dispatcher, autograd, allocators, streams, fused optimizers, DDP and stream capture. The
log shows which operations would be launched on a GPU and where the host would wait. It cannot show values, race
conditions or times on a device.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

HERE = Path(__file__).parent
NAME = "libcuda.so.1"  # Triton looks for this name
NVML = "libnvidia-ml.so.1"  # torch asks this library for the number of GPUs; the real one would count the real GPUs

# Kinds of calls, in the order of `enum kind` in fake_cuda.h: work on the device, and calls in which the host may wait.
WORK = ("KERNEL", "GEMM", "CUDNN", "NCCL", "COPY_ON_DEVICE", "COPY_PINNED", "MEMSET", "GRAPH")
WAITS = ("COPY_PAGEABLE", "COPY_BLOCKING", "STREAM_WAIT", "DEVICE_WAIT", "EVENT_WAIT", "ALLOCATION")
KINDS = (*WORK, *WAITS, "ILLEGAL")

# torch's libraries. The CUDA functions that they need return 0, except those that the C files define.
LIBRARIES = ("torch_cuda", "c10_cuda", "torch_python", "torch_nvshmem", "torch_cuda_linalg", "caffe2_nvrtc")
ASKED = re.compile(r" U ((?:__)?(?:cuda|cublas|cudnn|nccl|cu[A-Z])\w*)")
LEFT_ALONE = re.compile(r"cu(sparse|fft|rand|solver|File)")  # not imitated: NVIDIA's own libraries load without a GPU


def build(folder: Path) -> Path:
    """Compiles the library for the installed torch. Skips the test if this machine cannot build or use it."""
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("gcc and nm (binutils) are needed to build the imitation of CUDA")
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton is needed for its copy of CUDA's header files")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    libraries = [Path(torch.__file__).parent / "lib" / f"lib{name}.so" for name in LIBRARIES]
    found = [str(library) for library in libraries if library.exists()]
    undefined = subprocess.run(["nm", "-D", "--undefined-only", *found], capture_output=True, text=True, check=True)
    names = {name for name in ASKED.findall(undefined.stdout) if not LEFT_ALONE.match(name)}
    names |= set(re.findall(r"CUDAAPI (cu[A-Z]\w+)\(", (include / "cuda.h").read_text()))
    rest = folder / "rest.c"
    rest.write_text("".join(f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    library = folder / NAME
    sources = [str(file) for file in (*sorted(HERE.glob("*.c")), rest)]
    flags = ["-O1", "-shared", "-fPIC", "-w", f"-I{include}", f"-I{HERE}", f"-Wl,-soname,{NAME}"]
    subprocess.run(["gcc", *flags, "-o", str(library), *sources, "-ldl", "-lpthread"], check=True)
    subprocess.run(["gcc", *flags[:4], "-o", str(folder / NVML), str(HERE / "nvml" / "count.c")], check=True)
    return library


def variables(library: Path) -> dict[str, str]:
    """Returns the environment variables that make a process use `library` instead of CUDA."""
    folder = str(library.parent)
    return {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}


class Call(NamedTuple):
    kind: str
    name: str
    size: int  # bytes, elements of a collective (NCCL), or nodes of a launched graph


class Calls(list[Call]):
    """The logged calls, in order."""

    @property
    def operations(self) -> int:
        """The number of operations that the host launched on the device."""
        return sum(call.kind in (*WORK, "COPY_PAGEABLE") for call in self)

    @property
    def waits(self) -> dict[str, int]:
        return dict(Counter(call.name for call in self if call.kind in WAITS))

    @property
    def illegal(self) -> list[str]:
        """Names of the calls that made a stream capture invalid."""
        return [call.name for call in self if call.kind == "ILLEGAL"]

    @property
    def graphs(self) -> list[int]:
        """Number of nodes of each launched graph."""
        return [call.size for call in self if call.kind == "GRAPH"]


class _Entry(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


def end_process() -> NoReturn:
    """Ends the process with status 0, without Python's own clean-up.

    torch's thread for the backward pass may still be releasing the last graph. If Python is cleaned up meanwhile, torch
    aborts the process ("terminate called without an active exception").
    """
    sys.stdout.flush()
    os._exit(0)


@contextmanager
def logged() -> Iterator[Calls]:
    """Logs the calls made in the block. The list is filled when the block ends. The library must be preloaded."""
    library, calls = ctypes.CDLL(os.environ["LD_PRELOAD"]), Calls()
    library.fake_length.restype = ctypes.c_long
    library.fake_log.restype = ctypes.POINTER(_Entry)
    library.fake_start()
    try:
        yield calls
    finally:
        library.fake_stop()
        log = library.fake_log()
        entries = (log[place] for place in range(library.fake_length()))
        calls.extend(Call(KINDS[entry.kind], (entry.name or b"").decode(), entry.size) for entry in entries)
