"""Free host memory is what the machine has left, or less if a control group (cgroup) limits this process."""

from pathlib import Path

import pytest
import torch

from data_prep.free_memory import free_host_memory, free_memory

MACHINE = 8_000_000 * 1024


def machine(root: Path, groups: str, files: dict[str, object]) -> Path:
    """Makes `root` look like the root folder of a machine with 8 GB of available memory.

    `groups`: content of /proc/self/cgroup. `files`: contents of other files.
    """
    meminfo = "MemTotal: 9000000 kB\nMemFree: 1000 kB\nMemAvailable: 8000000 kB\n"
    for name, content in {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


def cgroup_v2(group: str, limit: object, used: int, *, cached: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{group}"
    statistics = f"anon {used - cached}\ninactive_file {cached}\nactive_file 0"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": statistics}


def cgroup_v1(group: str, limit: int, used: int, *, cached: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}"
    statistics = f"total_rss {used - cached}\ntotal_inactive_file 0\ntotal_active_file {cached}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": statistics,
    }


SLURM = "9:name=systemd:/\n4:memory,hugetlb:/slurm/job_7/step_0\n0::/"
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "no groups": ("", {}, MACHINE),
    "no limit": ("0::/", cgroup_v2(".", "max", 1000), MACHINE),
    "container": ("0::/", cgroup_v2(".", 5000, 2000), 3000),
    "files in the cache": ("0::/", cgroup_v2(".", 5000, 2000, cached=500), 3500),
    "more than the machine has": ("0::/", cgroup_v2(".", 10**15, 0), MACHINE),
    "limit of a parent": ("0::/a/b", {**cgroup_v2("a", 7000, 3000), **cgroup_v2("a/b", "max", 1000)}, 4000),
    "limit of a child": ("0::/a/b", {**cgroup_v2("a", 7000, 3000), **cgroup_v2("a/b", 2000, 1500)}, 500),
    "group of another process": ("0::/a", {**cgroup_v2("a", 7000, 3000), **cgroup_v2("b", 10, 5)}, 4000),
    "used up": ("0::/", cgroup_v2(".", 5000, 6000), 0),
    "cgroup v1": (SLURM, cgroup_v1("slurm/job_7", 9000, 4000, cached=1000), 6000),
    "cgroup v1 without a limit": (SLURM, cgroup_v1("slurm/job_7", 2**63 - 4096, 4000), MACHINE),
    "group that is not visible in the container": ("4:memory:/docker/1234", cgroup_v1(".", 9000, 4000), 5000),
}


@pytest.mark.parametrize("name", CASES)
def test_free_memory_is_the_minimum_over_the_machine_and_all_groups(tmp_path: Path, name: str) -> None:
    groups, files, expected = CASES[name]
    assert free_host_memory(machine(tmp_path, groups, files)) == expected


def test_this_machine_has_free_memory() -> None:
    assert free_host_memory() > 10**6


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.free_memory.free_host_memory", lambda: 4000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 1000
