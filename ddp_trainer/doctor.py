"""`python -m ddp_trainer.doctor`: what this machine has for a training, and the command that mends each thing missing.

It runs on a bare Python: torch, FFCV and the rest are imported by child processes, so that one that is missing, broken
or crashes is told like anything else. Exit code 0: training can work here; 1: it cannot. No secret is printed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

OK, ABSENT, PROBLEM = "ok", "-", "PROBLEM"  # a thing that is absent is one that training works without
SET_UP = "make setup"
INSTALL = f"{sys.executable} -m pip install -c constraints.txt -e"
NEEDED_GB = 1.0  # two checkpoints, the weights, the report and a prepared CIFAR-10
CHILD_SECONDS = 300

TORCH = """
import json, torch, torchvision, accelerate
from ddp_trainer.distributed.hardware import cpu_has_bf16, cpu_name
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "version": torch.__version__, "torchvision": torchvision.__version__, "built_for": torch.version.cuda,
    "devices": [f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices],
    "bf16": cuda and torch.cuda.is_bf16_supported(including_emulation=False),
    "nccl": torch.distributed.is_nccl_available(), "cpu": cpu_name(), "cpu_bf16": cpu_has_bf16(),
}))
"""
FFCV = """
from data_prep.ffcv_import import import_ffcv
import_ffcv()
from importlib import metadata
from ffcv.loader import Loader
print('{"version": "%s"}' % metadata.version("ffcv"))
"""


class Finding(NamedTuple):
    """One line of the answer, and how to mend it."""

    state: str
    name: str
    detail: str
    mend: str = ""


class Child:
    """A Python program that prints one JSON object, started at once and awaited later."""

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
        )

    def result(self) -> tuple[dict, str]:
        """(what it printed, or nothing; else why not, in one line)."""
        try:
            stdout, stderr = self._process.communicate(timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {}, f"no end of its import in {CHILD_SECONDS} s"
        if self._process.returncode < 0:
            return {}, f"its import crashes (signal {-self._process.returncode})"
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        if self._process.returncode:
            return {}, lines[-1] if lines else "its import fails"
        return json.loads(stdout.splitlines()[-1]), ""


def python() -> Finding:
    if sys.platform != "linux":
        return Finding(
            PROBLEM, "system", f"{platform.system()}: FFCV runs on Linux only", "use a Linux machine or container"
        )
    version, place = platform.python_version(), sys.prefix
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding(PROBLEM, "Python", f"{version}; 3.11 to 3.13 is needed", f"{SET_UP} PYTHON=python3.12")
    return Finding(OK, "Python", f"{version} in {place}")


def packages() -> Iterator[Finding]:
    """What pyproject.toml asks for, by the metadata of our own installation."""
    try:
        wanted = metadata.requires("ddp-trainer") or []
    except metadata.PackageNotFoundError:
        yield Finding(PROBLEM, "packages", f"ddp-trainer is not installed in {sys.prefix}", SET_UP)
        return
    missing: dict[str, list[str]] = {"": []}
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        group = missing.setdefault(extra[1] if extra else "", [])
        if name and not is_installed(name[0]):
            group.append(name[0])
    needed = missing.pop("")
    yield (
        Finding(PROBLEM, "packages", f"missing: {', '.join(needed)}", SET_UP)
        if needed
        else Finding(OK, "packages", "all that training needs are installed")
    )
    for extra, names in missing.items():
        if names:
            yield Finding(ABSENT, f"extra {extra}", f"missing: {', '.join(names)}", f"{INSTALL} '.[{extra}]'")
        else:
            yield Finding(OK, f"extra {extra}", "installed")


def set_up(name: str) -> str:
    """What mends a package: where it is installed and yet fails, only a new environment does."""
    return f"rm -r .venv && {SET_UP}" if is_installed(name) else SET_UP


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def torch_and_devices(child: Child) -> Iterator[Finding]:
    found, why = child.result()
    if not found:
        yield Finding(PROBLEM, "torch", why, set_up("torch"))
        yield Finding(OK, "CPU", f"{len(os.sched_getaffinity(0))} cores")
        return
    built = f"CUDA {found['built_for']}" if found["built_for"] else "the CPU alone"
    nccl = ", NCCL" if found["nccl"] else ""
    yield Finding(OK, "torch", f"{found['version']} for {built}{nccl}; torchvision {found['torchvision']}")
    yield Finding(OK, "CPU", f"{found['cpu']}; {'bf16' if found['cpu_bf16'] else 'no bf16 of its own, so fp32'}")
    yield gpus(found)


def gpus(found: dict) -> Finding:
    """GPUs that torch can use; a driver without any is a fault that a CPU training would hide."""
    if found["devices"]:
        return Finding(OK, "GPUs", "; ".join(found["devices"]) + f"; {'bf16' if found['bf16'] else 'no bf16, so fp16'}")
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() or shutil.which("nvidia-smi"):
        if not found["built_for"]:
            return Finding(ABSENT, "GPUs", "an NVIDIA driver, but torch is built for the CPU alone", set_up("torch"))
        detail = f"an NVIDIA driver, but no GPU that torch for CUDA {found['built_for']} can use: it may be too old"
        return Finding(ABSENT, "GPUs", detail, "nvidia-smi && env | grep CUDA_VISIBLE_DEVICES")
    return Finding(ABSENT, "GPUs", "none: training runs on the CPU")


def ffcv(child: Child) -> Iterator[Finding]:
    found, why = child.result()
    missing = missing_libraries()
    install = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if found:
        yield Finding(OK, "FFCV", found["version"])
    else:
        yield Finding(PROBLEM, "FFCV", why, f"{install} && {set_up('ffcv')}" if missing else set_up("ffcv"))
    if missing:
        detail = f"missing to build FFCV: {', '.join(missing)}"
        yield Finding(ABSENT if found else PROBLEM, "system libraries", detail, install)
    else:
        yield Finding(OK, "system libraries", "compiler, OpenCV and TurboJPEG headers")


def missing_libraries() -> list[str]:
    """Debian packages that FFCV is compiled against, as scripts/setup.sh asks for them."""
    missing = [] if shutil.which("g++") else ["g++"]
    if not shutil.which("pkg-config"):
        return [*missing, "pkg-config", "libopencv-dev", "libturbojpeg0-dev"]
    for library, package in (("opencv4", "libopencv-dev"), ("libturbojpeg", "libturbojpeg0-dev")):
        if subprocess.run(["pkg-config", "--exists", library], capture_output=True).returncode:
            missing.append(package)
    return missing


def slurm() -> Finding:
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        return Finding(ABSENT, "SLURM", "no sbatch here: jobs for a cluster are submitted on its login node")
    asked = subprocess.run(["sinfo", "--version"], capture_output=True, text=True)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["sinfo fails"])[-1]
        return Finding(ABSENT, "SLURM", f"installed, but not set up: {why}", "export SLURM_CONF=/path/to/slurm.conf")
    job = os.environ.get("SLURM_JOB_ID")
    return Finding(OK, "SLURM", asked.stdout.strip() + (f", in job {job}" if job else ""))


def wandb() -> Finding:
    from ddp_trainer.tracking.wandb_service import has_credentials

    if has_credentials():
        return Finding(OK, "W&B login", "yes")
    return Finding(ABSENT, "W&B login", "no: runs are kept offline, for wandb sync", "wandb login")


def disk() -> Finding:
    free = shutil.disk_usage(".").free / 1e9
    detail = f"{free:.1f} GB free in {Path.cwd()}"
    if free < NEEDED_GB:
        return Finding(PROBLEM, "disk", f"{detail}; {NEEDED_GB:.0f} GB is needed", "du -xh --max-depth=2 . | sort -h")
    return Finding(OK, "disk", detail)


def examine() -> Iterator[Finding]:
    interpreter = python()
    yield interpreter
    if interpreter.state == PROBLEM:  # the rest of the code need not run there
        return
    children = Child(TORCH), Child(FFCV)
    yield from packages()
    yield from torch_and_devices(children[0])
    yield from ffcv(children[1])
    yield from (slurm(), wandb(), disk())


def main() -> int:
    if len(sys.argv) > 1:
        print(__doc__)
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.state:8} {finding.name:17} {finding.detail}", flush=True)
        if finding.mend:
            print(f"{'':26} mend: {finding.mend}", flush=True)
    problems = [finding.name for finding in findings if finding.state == PROBLEM]
    print(f"training cannot work here yet: {', '.join(problems)}" if problems else "training can work here")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
