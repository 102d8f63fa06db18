"""What processor this machine has, as far as the choice of precision and a report need to know."""

import os
from pathlib import Path


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; emulated, it would be slower than fp32."""
    flags = _cpu_info().split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_info().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"
