"""Doctor: `python -m ddp_trainer.doctor` checks this machine and prints a fix for each problem.

The command needs only Python itself. It imports torch and FFCV in child processes, so that a package that is missing or
crashes is reported like any other problem. It prints no secrets. The exit status is 0 if the machine is ready to train,
1 if not.
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

from data_prep.errors import printable
from data_prep.streams import forgiving_output

OK, ABSENT, PROBLEM = "ok", "-", "PROBLEM"  # ABSENT: training works without this part
REPOSITORY = Path(__file__).resolve().parent.parent
SET_UP = "make setup"
NEEDED_GB = 1.0  # for two checkpoints, the weights, the report and a prepared CIFAR-10
SHARED_MEMORY_GB = 0.25  # containers often have 0.064, which is too little for NCCL
CHILD_SECONDS = 300

TORCH = """
import json, torch, torchvision, accelerate
from ddp_trainer.distributed.hardware import cpu_has_bf16, cpu_name, why_unusable
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "version": torch.__version__, "torchvision": torchvision.__version__, "built_for": torch.version.cuda,
    "devices": [f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices],
    "failure": next(filter(None, map(why_unusable, range(len(devices)))), ""),
    "bf16": cuda and torch.cuda.is_bf16_supported(including_emulation=False),
    "nccl": torch.distributed.is_nccl_available(), "cpu": cpu_name(), "cpu_bf16": cpu_has_bf16(),
}))
"""
FFCV = """
from data_prep.ffcv_import import import_ffcv
import_ffcv()
from importlib import metadata
from ffcv.loader import Loader
import simplejpeg, xxhash
print('{"version": "%s"}' % metadata.version("ffcv"))
"""


class Finding(NamedTuple):
    """The state of one part of the machine, and a fix if something is missing."""

    state: str
    name: str
    detail: str
    fix: str = ""


class Child:
    """A child process that runs Python code and prints a JSON object. `result` waits for its end."""

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
        )

    def result(self) -> tuple[dict, str]:
        """The printed object and an empty string, or {} and a one-line reason if the code failed."""
        try:
            stdout, stderr = self._process.communicate(timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {}, f"the import did not finish within {CHILD_SECONDS} s"
        if self._process.returncode < 0:
            return {}, f"the import crashed (signal {-self._process.returncode})"
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        if self._process.returncode:
            return {}, lines[-1] if lines else "the import failed"
        return json.loads(stdout.splitlines()[-1]), ""


def python() -> Finding:
    if sys.platform != "linux":
        return Finding(PROBLEM, "system", f"{platform.system()}: FFCV runs on Linux only", "use a Linux machine")
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding(PROBLEM, "Python", f"{version}, but 3.11 to 3.13 is needed", f"{SET_UP} PYTHON=python3.12")
    return Finding(OK, "Python", f"{version} in {sys.prefix}")


def packages() -> Iterator[Finding]:
    """Checks the packages that the installed project requires, according to its metadata."""
    try:
        wanted = metadata.requires("ddp-trainer") or []
    except metadata.PackageNotFoundError:
        own = REPOSITORY / ".venv"
        is_elsewhere = own.exists() and own.resolve() != Path(sys.prefix).resolve()
        fix = f"{own / 'bin' / 'python'} -m ddp_trainer.doctor" if is_elsewhere else SET_UP
        yield Finding(PROBLEM, "packages", f"ddp-trainer is not installed in {sys.prefix}", fix)
        return
    missing: dict[str, list[str]] = {"": []}
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        group = missing.setdefault(extra[1] if extra else "", [])
        if name and not is_installed(name[0]):
            group.append(name[0])
    if needed := missing.pop(""):
        yield Finding(PROBLEM, "packages", f"missing: {', '.join(needed)}", SET_UP)
    else:
        yield Finding(OK, "packages", "all required packages are installed")
    for extra, names in missing.items():
        if names:
            fix = f"{sys.executable} -m pip install {' '.join(names)}"
            yield Finding(ABSENT, f"extra {extra}", f"missing: {', '.join(names)}", fix)
        else:
            yield Finding(OK, f"extra {extra}", "installed")


def set_up(name: str) -> str:
    """The command that fixes a package. If the package is installed but fails, .venv must be created again."""
    return f"rm -r .venv && {SET_UP}" if is_installed(name) else SET_UP


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def torch_and_devices(child: Child) -> Iterator[Finding]:
    found, reason = child.result()
    if not found:
        yield Finding(PROBLEM, "torch", reason, set_up("torch"))
        yield Finding(OK, "CPU", f"{len(os.sched_getaffinity(0))} cores")
        return
    built = f"CUDA {found['built_for']}" + ", NCCL" * found["nccl"] if found["built_for"] else "the CPU only"
    yield Finding(OK, "torch", f"{found['version']} for {built}; torchvision {found['torchvision']}")
    yield Finding(OK, "CPU", f"{found['cpu']}; {'bf16' if found['cpu_bf16'] else 'no bf16, so fp32'}")
    yield gpus(found)


def gpus(found: dict) -> Finding:
    """Checks the GPUs. A driver without a usable GPU is reported, because --device auto then just uses the CPU."""
    if found["failure"]:
        detail = f"{'; '.join(found['devices'])}; torch cannot compute on them: {found['failure']}"
        return Finding(PROBLEM, "GPUs", detail, "install a build of torch for this GPU, or train with --device cpu")
    if found["devices"]:
        return Finding(OK, "GPUs", "; ".join(found["devices"]) + f"; {'bf16' if found['bf16'] else 'no bf16, so fp16'}")
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        if not found["built_for"]:
            return Finding(ABSENT, "GPUs", "torch is built for the CPU only, despite an NVIDIA driver", set_up("torch"))
        detail = f"torch for CUDA {found['built_for']} finds no usable GPU; the NVIDIA driver may be too old"
        return Finding(ABSENT, "GPUs", detail, "nvidia-smi && env | grep CUDA_VISIBLE_DEVICES")
    return Finding(ABSENT, "GPUs", "none; runs use the CPU")


def ffcv(child: Child) -> Finding:
    found, reason = child.result()
    return Finding(OK, "FFCV", found["version"]) if found else Finding(PROBLEM, "FFCV", reason, set_up("ffcv"))


def slurm() -> Finding:
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        return Finding(ABSENT, "SLURM", "no sbatch; on a cluster, submit jobs from a login node")
    sinfo = subprocess.run(["sinfo", "--version"], capture_output=True, text=True)
    if sinfo.returncode:
        reason = (sinfo.stderr.strip().splitlines() or ["sinfo fails"])[-1]
        return Finding(ABSENT, "SLURM", f"installed, but not set up: {reason}", "export SLURM_CONF=/path/to/slurm.conf")
    job = os.environ.get("SLURM_JOB_ID")
    return Finding(OK, "SLURM", sinfo.stdout.strip() + (f", in job {job}" if job else ""))


def wandb() -> Finding:
    from ddp_trainer.tracking.wandb_service import has_credentials

    if has_credentials():
        return Finding(OK, "W&B login", "yes")
    return Finding(ABSENT, "W&B login", "none; runs are recorded offline; upload them with wandb sync", "wandb login")


def disk() -> Finding:
    try:
        free, here = shutil.disk_usage(".").free / 1e9, Path.cwd()
    except OSError as error:
        return Finding(PROBLEM, "disk", f"the current folder cannot be used: {error.strerror}", "cd and try again")
    detail = f"{free:.1f} GB free in {here}"
    if free < NEEDED_GB:
        return Finding(PROBLEM, "disk", f"{detail}; {NEEDED_GB:.0f} GB is needed", "du -xh --max-depth=2 . | sort -h")
    return Finding(OK, "disk", detail)


def shared_memory() -> Finding:
    """Checks /dev/shm, which processes on several GPUs of one machine use to communicate."""
    try:
        size = shutil.disk_usage("/dev/shm").total / 1e9
    except OSError as error:
        return Finding(ABSENT, "shared memory", f"/dev/shm: {error.strerror}", "mount -t tmpfs tmpfs /dev/shm")
    detail = f"{size:.2f} GB in /dev/shm"
    if size < SHARED_MEMORY_GB:
        return Finding(ABSENT, "shared memory", f"{detail}; several GPUs need more", "docker run --shm-size=1g ...")
    return Finding(OK, "shared memory", detail)


def examine() -> Iterator[Finding]:
    interpreter = python()
    yield interpreter
    if interpreter.state == PROBLEM:  # the other checks may not even run
        return
    children = Child(TORCH), Child(FFCV)
    yield from packages()
    yield from torch_and_devices(children[0])
    yield ffcv(children[1])
    yield from (disk(), shared_memory(), slurm(), wandb())


def main() -> int:
    """Returns the exit status: 0 if the machine is ready to train, 1 if not, 2 for wrong input."""
    with forgiving_output():
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__)
            return 0
        if sys.argv[1:]:
            print(f"error: doctor takes no arguments, got {printable(' '.join(sys.argv[1:]))}", file=sys.stderr)
            return 2
        problems = []
        for finding in examine():
            print(f"{finding.state:8} {finding.name:17} {printable(finding.detail)}", flush=True)
            if finding.fix:
                print(f"{'':26} fix: {finding.fix}", flush=True)
            if finding.state == PROBLEM:
                problems.append(finding.name)
        print(f"not ready: {', '.join(problems)}" if problems else "ready to train")
        return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
