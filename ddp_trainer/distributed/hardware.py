"""Decides which device and precision a run uses on this machine.

torch takes seconds to import, so it is imported only where the code must ask whether there is a GPU.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError, require
from ddp_trainer.config import RuntimeConfig

if TYPE_CHECKING:
    import torch

# Values of an environment variable that Accelerate interprets as true.
TRUE = ("1", "true", "t", "yes", "y", "on")
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN, torch's library for convolutions on the CPU, would emulate bf16.
ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# Environment variables with which libraries compute fp32 operations less precisely, and the value that prevents it.
FP32_VARIABLES = {
    "cpu": {"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "DNNL_DEFAULT_FPMATH_MODE": "STRICT"},
    "cuda": {"NVIDIA_TF32_OVERRIDE": "0"},
}


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16, and oneDNN may use them. Emulated bf16 is slower than fp32."""
    flags = _cpu_info().split()
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ISAS_WITHOUT_BF16
    return allowed and any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_info().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def resolve_device(config: RuntimeConfig) -> str:
    if config.device == "cpu":
        return "cpu"
    if os.environ.get("ACCELERATE_USE_CPU", "").strip().lower() in TRUE:
        require(
            config.device == "auto",
            "--device cuda contradicts the Accelerate configuration, which asks for the CPU (--cpu or use_cpu); "
            "remove that setting, or use --device cpu",
        )
        return "cpu"
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no usable GPU here; use --device cpu, or check the driver")
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_usable(device: "torch.device", all_agree: Callable[[bool], bool]) -> None:
    """Raises InputError on every rank if torch has no kernels for the GPU of any rank.

    `all_agree`: see `Runtime.all_agree`. Any other problem is left to the code that meets it.
    """
    reason = why_unusable(device)
    usable = "no kernel image" not in reason
    problem = f"torch cannot compute on {device} ({reason})"
    if not usable and os.environ.get("LOCAL_RANK", "0") != "0":  # the InputError below is printed only by local rank 0
        print(problem, file=sys.stderr, flush=True)
    all_usable = all_agree(usable)
    require(usable, f"{problem}; use --device cpu, or install a build of torch for this GPU")
    fix = "leave that GPU out, use --device cpu, or install a build of torch for that GPU"
    require(all_usable, f"torch cannot compute on the GPU of another process; {fix}")


def why_unusable(device: "torch.device | int") -> str:
    """torch's error if it cannot compute on this device, for example because the GPU is too old; otherwise ""."""
    import torch

    try:
        torch.ones(1, device=device).add_(1)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def require_exact_fp32(device: str) -> None:
    """Raises InputError if an environment variable lowers the precision of fp32: a resumed run might not have it.

    `device`: cpu or cuda.
    """
    for name, exact in FP32_VARIABLES[device].items():
        value = os.environ.get(name) or exact
        fix = "unset it, and choose a precision with --precision"
        require(value.upper() == exact, f"the environment variable {name}={value} makes fp32 less precise; {fix}")


def resolve_precision(config: RuntimeConfig) -> str:
    """The precision of the run: fp32, bf16 or fp16.

    Raises InputError for fp16 on the CPU, which Accelerate does not support.
    """
    on_cuda = resolve_device(config) == "cuda"
    if config.precision == "fp16" and not on_cuda:
        raise InputError("--precision fp16 works on CUDA only; use --precision bf16 or fp32 on the CPU")
    if config.precision != "auto":
        return config.precision
    if on_cuda:
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"
