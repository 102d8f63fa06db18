"""Determines how much memory this process can still allocate."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch


def free_memory(device: torch.device) -> float:
    """Free bytes on the device.

    On a CPU: free bytes of the machine, divided by the number of processes that the run has on this machine.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host_memory(root: Path = Path("/")) -> int:
    """Free bytes of host memory, within the limits of this process's control groups (cgroups).

    Containers and SLURM jobs have such limits. The kernel kills a process that exceeds one. Tests pass another
    `root`.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return min([int(available.split()[1]) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Free bytes within the limit of each group of this process. Files in the page cache do not count as used."""
    for folder, limit, used, prefix in _groups(root):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the group is not visible in this container, or its limit is "max"
            continue
        cached = sum(int(statistics.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
        yield max(left + cached, 0)


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, limit file, usage file, prefix in memory.stat) of each group and its parents, in cgroup v2 or v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        path = PurePosixPath(group.lstrip("/"))
        for part in (path, *path.parents):
            if controllers == "":
                yield root / "sys/fs/cgroup" / part, "memory.max", "memory.current", ""
            elif "memory" in controllers.split(","):
                folder = root / "sys/fs/cgroup/memory" / part
                yield folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
