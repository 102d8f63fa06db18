"""Writes the figures of a benchmark with date, hardware, versions and conditions."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from data_prep.files import write_json
from ddp_trainer.distributed.hardware import cpu_name
from ddp_trainer.run.directory import git_commit, package_versions


def write_result(path: Path, figures: Mapping[str, float], *, device: str, **conditions: Any) -> None:
    """Writes `figures` and the `conditions` of their measurement to `path` as JSON. `device`: cpu or cuda."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": date.today().isoformat(),
        "hardware": (gpu_names() or ["unknown GPU"])[0] if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "conditions": {"device": device, **conditions},
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }
    write_json(path, content)


def count_usable_gpus() -> int:
    """The number of GPUs if torch can compute on all of them, otherwise 0.

    Asks a child process, to avoid initializing CUDA in this one.
    """
    code = """
import torch
from ddp_trainer.distributed.hardware import why_unusable
count = torch.cuda.device_count()
print(0 if any(map(why_unusable, range(count))) else count)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def gpu_names() -> list[str]:
    """Name, driver and memory of each GPU. Calls nvidia-smi, to avoid initializing CUDA in this process."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines() if done.returncode == 0 else []
