"""Starts a real SLURM for tests: slurmctld, munged and a slurmd for each emulated node, on this machine, in one folder.

It needs the programs of SLURM, but neither root nor namespaces. The nodes are called 127.0.0.1, 127.0.0.2, ..., so each
name is also an address at which other nodes can reach the node. At the end of the tests, slurm_keeper.py kills all
processes of the cluster.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.forked import free_port
from tests.support.processes import processes_with, read, wait_until
from tests.support.trainer import REPOSITORY, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "squeue", "scancel", "srun")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
NUM_NODES, NUM_GPUS = 5, 8
# Jobs in the partition `main` (two nodes) are never preempted. On the other nodes, a job in `urgent` preempts the
# running jobs. Jobs in `graceful` then have a minute to end, and jobs in `abrupt` have KillWait seconds.
PARTITIONS = """
PartitionName=main Nodes=127.0.0.[1-2] Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=graceful Nodes=127.0.0.[3-4] PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=abrupt Nodes=127.0.0.5 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=127.0.0.[3-5] PriorityTier=10 PreemptMode=OFF
"""
# A requeued job waits for cred_expire seconds before it starts (a value below 5 means 2 minutes). With
# config_overrides, a node may have more CPUs than the machine.
CONFIGURATION = """
ClusterName=tests
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
ReturnToService=2
KillWait=30
MinJobAge=3600
GresTypes=gpu
"""
NODE = (
    "NodeName=127.0.0.{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=100000 Gres=gpu:{gpus} State=UNKNOWN\n"
)


class ClusterError(Exception):
    """A command of the cluster failed."""


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


class Job:
    """A submitted job."""

    def __init__(self, cluster: "Cluster", number: str) -> None:
        self.cluster, self.number = cluster, number

    @property
    def fields(self) -> dict[str, str]:
        shown = self.cluster.call("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(.*?)(?= \w+=| *$)", shown, flags=re.MULTILINE))  # a path may have spaces

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @cached_property
    def output(self) -> Path:
        return Path(self.fields["StdOut"])

    @property
    def log(self) -> str:
        """The output of the job so far."""
        try:
            return self.output.read_text()
        except FileNotFoundError:
            return ""

    def wait_for(self, *states: str, seconds: float = 400) -> "Job":
        wait_until(
            lambda: self.state in states,
            lambda: f"job {self.number} is {self.state}, not {' or '.join(states)}\n{self.log}",
            seconds,
        )
        return self

    def end(self, seconds: float = 400) -> str:
        """Waits until the job has ended, and returns its state."""
        return self.wait_for(*ENDED, seconds=seconds).state

    def processes(self, *words: str) -> list[int]:
        """Returns the ids of the job's processes that have each of `words` in their environment or command line."""
        return processes_with(f"SLURM_JOB_ID={self.number}", f"SLURM_CONF={self.cluster.conf}", *words)

    @property
    def workers(self) -> list[int]:
        """Process ids of the training processes, without their launchers."""
        found = self.processes("ddp_trainer.train")
        commands = {pid: read(pid, "cmdline") for pid in found}
        return [pid for pid in found if b"-m\0ddp_trainer.train\0" in commands[pid] and b"launch" not in commands[pid]]


class Cluster:
    """A running cluster. Use `running_cluster`, which also stops it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {name: value for name, value in environment().items() if not name.startswith(("SBATCH_", "DDP_"))}
        return {**kept, "PATH": PATH, "SLURM_CONF": str(self.conf), **changes}

    def call(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Runs a command of the cluster and returns its standard output. Raises ClusterError if it fails."""
        command, variables = tuple(map(str, command)), self.environment(**environment)
        done = subprocess.run(command, cwd=cwd, env=variables, text=True, capture_output=True, timeout=60)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path, **environment: str) -> Job:
        return Job(self, self.call("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip())

    def configure(self) -> None:
        folder, host, ports = self.folder, socket.gethostname().split(".")[0], free_ports(NUM_NODES + 1)
        for name in ("state", "log", "munge"):
            (folder / name).mkdir(mode=0o700)
        folder.chmod(0o755)  # munged requires that everybody can reach its socket
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        # Jobs derive a port from their job id, so two clusters on one machine should not share ids.
        first_job = 1000 + os.getpid() % 10000
        text = CONFIGURATION.format(folder=folder, host=host, user=user, port=ports[0], first_job=first_job)
        for number, port in enumerate(ports[1:], 1):
            text += NODE.format(number=number, host=host, port=port, gpus=NUM_GPUS)
        self.conf.write_text(text + PARTITIONS)
        for number in range(NUM_GPUS):  # no real GPUs are needed: SLURM only assigns their numbers to jobs
            (folder / f"gpu{number}").symlink_to("/dev/null")
        gpus = f"NodeName=127.0.0.[1-{NUM_NODES}] Name=gpu File={folder}/gpu[0-{NUM_GPUS - 1}]\n"
        (folder / "gres.conf").write_text(gpus)
        # slurmd always loads a cgroup plugin; v1 with an empty mount point works everywhere.
        (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")

    def start(self) -> None:
        folder = self.folder
        files = {
            "key-file": "munge/key",
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "log-file": "log/munged.log",
            "seed-file": "munge/seed",
        }
        self.call("munged", "--force", *(f"--{name}={folder / file}" for name, file in files.items()))
        self.call("slurmctld")
        for number in range(1, NUM_NODES + 1):
            self.call("slurmd", "-N", f"127.0.0.{number}")

        def ready() -> bool:
            return len(self.call("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split()) >= NUM_NODES

        wait_until(ready, lambda: (folder / "log" / "slurmctld.log").read_text()[-3000:], seconds=120)


def running_cluster() -> Iterator[Cluster]:
    """Yields a running cluster and removes it completely afterwards.

    If SLURM is missing or does not start, the test is skipped, or fails in CI.
    """
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        unavailable(f"no SLURM here: {', '.join(absent)} not found; run `make test` as root to install it")
    folder = Path(tempfile.mkdtemp(prefix="slurm-tests-", dir="/tmp"))
    command = [sys.executable, "-m", "tests.support.slurm_keeper", str(folder)]
    keeper = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, start_new_session=True)
    try:
        cluster = Cluster(folder)
        cluster.configure()
        try:
            cluster.start()
        except (ClusterError, TimeoutError) as error:
            unavailable(f"SLURM does not start here: {error}")
        yield cluster
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(timeout=60)


def free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return [*ports]
