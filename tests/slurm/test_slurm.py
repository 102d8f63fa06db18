"""Jobs on a real SLURM: several nodes, preemption, time limits, lost processes, cancellation, staging, sweeps.

One job is interrupted twice. It spends most of its time in the queue, waiting to run again. To use this time, a thread
interrupts the job while the other tests run.
"""

import json
import os
import re
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import pytest

from data_prep.dataset import write_dataset
from data_prep.sources.synthetic import draw_synthetic
from tests.support.folders import DATASET_FILES, names_in, same_model
from tests.support.processes import read, wait_until
from tests.support.slurm_cluster import Cluster, Job, running_cluster
from tests.support.trainer import REPOSITORY, read_lines

# 32 training images in batches of 8 give two epochs of 4 steps, with a checkpoint after each step.
PLAN = ("--epochs", "2", "--batch-size", "8", "--max-steps", "8", "--checkpoint-every-steps", "1")
NUM_TRAIN, NUM_TEST, DATA_SEED = 32, 18, 1
CPU = ("--gpus-per-node=0", "--cpus-per-task=1")
ODD_NAME = """run 'with' "quotes" and  $spaces"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from running_cluster()


@pytest.fixture(scope="module")
def checkout(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal checkout of the repository, with settings for this cluster and a space in its path."""
    folder, data = tmp_path_factory.mktemp("slurm") / "a checkout", tmp_path_factory.mktemp("data")
    write_dataset(draw_synthetic(train_count=NUM_TRAIN, test_count=NUM_TEST, seed=DATA_SEED), data)
    for name in ("slurm", "launch"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("cluster.env", "__pycache__"))
    for name in ("ddp_trainer", "data_prep"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "logs").mkdir()
    (folder / "slurm" / "cluster.env").write_text(f"export DDP_DATA_DIR=${{DDP_DATA_DIR:-{data}}}\n")
    return folder


def submit(cluster: Cluster, checkout: Path, *flags: str, arguments: tuple[str, ...] = (), **environment: str) -> Job:
    """Submits `sbatch FLAGS slurm/train.sh smoke ...`, on CPUs."""
    script = ("slurm/train.sh", "smoke", "--device", "cpu", *PLAN, *arguments)
    return cluster.submit(*CPU, *flags, *script, cwd=checkout, **environment)


def run_of(checkout: Path, job: Job) -> Path:
    """Returns the default run directory of a job."""
    return checkout / "runs" / f"train-{job.number}"


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text()) if (out / "status.json").exists() else {"state": "none"}


def newest_step(out: Path) -> int:
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*")), default=0)


def freeze(job: Job, out: Path, step: int) -> None:
    """Freezes the training processes of the job once they have saved a checkpoint of a later step than `step`."""
    # The scripts' own errors start with "error:". SLURM's lines about a requeue contain it, but not at the start.
    failed = re.compile("^error:", flags=re.MULTILINE).search
    wait_until(lambda: newest_step(out) > step or bool(failed(job.log)), lambda: "nothing saved", pause=0.02)
    assert newest_step(out) > step, job.log
    for pid in job.workers:
        os.kill(pid, signal.SIGSTOP)


def interrupt(job: Job, out: Path) -> list[tuple[int, int]]:
    """Interrupts a job by its time limit, then by a job of higher priority.

    Returns the newest saved step before and after each interruption. Each time, the job is frozen first, so that the
    interrupted step does not depend on the speed of the machine. SLURM then unfreezes the job with SIGCONT.
    """
    stops = []
    for number, interruption in enumerate((shorten_the_time_limit, preempt), 1):
        freeze(job, out, newest_step(out))
        frozen = newest_step(out)
        interruption(job)
        wait_until(lambda number=number: job.restarts == number, lambda: f"not requeued\n{job.log}")
        job.wait_for("PENDING", "RUNNING")  # while a job is being requeued, it counts as finished and cannot be changed
        job.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        stops.append((frozen, newest_step(out)))
    job.end()
    return stops


def shorten_the_time_limit(job: Job) -> None:
    """Leaves at most 180 s until the time limit. SLURM then sends USR2 (train.sh: --signal=USR2@180) within 30 s."""
    hours, minutes, _ = map(int, job.fields["RunTime"].split(":"))
    job.cluster.call("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * hours + minutes + 3}")


def preempt(job: Job) -> None:
    flags = ("--partition=urgent", f"--nodes={job.fields['NumNodes']}", f"--nodelist={job.fields['NodeList']}")
    job.cluster.submit(*flags, "--exclusive", "--output=/dev/null", "--wrap=true", cwd=job.cluster.folder)


@pytest.fixture(scope="module")
def interrupted(cluster: Cluster, checkout: Path) -> Iterator[tuple[Job, "Future[list[tuple[int, int]]]"]]:
    """A job on two nodes with one process each, and the future result of `interrupt`."""
    job = submit(cluster, checkout, "--partition=graceful", "--nodes=2", arguments=("--wandb", "offline"))
    with ThreadPoolExecutor(1) as background:
        future = background.submit(interrupt, job, run_of(checkout, job))
        # The other jobs must not start before this one has saved a checkpoint and is about to be frozen.
        wait_until(lambda: future.done() or newest_step(run_of(checkout, job)), lambda: job.log)
        yield job, future
        cluster.call("scancel", job.number)


@pytest.fixture(scope="module")
def two_nodes(interrupted: object, cluster: Cluster, checkout: Path) -> tuple[Job, Path]:
    """A finished job on two nodes with two processes each, started after `interrupted`."""
    arguments = ("--out", f"runs/{ODD_NAME}", "--wandb", "offline")
    job = submit(cluster, checkout, "--nodes=2", arguments=arguments, DDP_PROCESSES_PER_NODE="2")
    assert job.end() == "COMPLETED", job.log
    return job, checkout / "runs" / ODD_NAME


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, checkout: Path) -> Path:
    """The run directory of a finished job on two nodes with one process each."""
    job = submit(cluster, checkout, "--nodes=2")
    assert job.end() == "COMPLETED", job.log
    return run_of(checkout, job)


@pytest.fixture(scope="module")
def staged(cluster: Cluster, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A job that copies its data to its node, in a partition where jobs are preempted without grace time.

    Returns this job, the job that prepares the data, and the folder that stands for the local disk of the node.
    """
    disk, data = tmp_path_factory.mktemp("disk of the node"), checkout / "data" / "from prep"
    counts = ("--train-count", str(NUM_TRAIN), "--test-count", str(NUM_TEST), "--seed", str(DATA_SEED))
    source = ("--source", "synthetic", *counts)
    prep = cluster.submit("--cpus-per-task=1", "slurm/prep.sh", *source, cwd=checkout, DDP_DATA_DIR=str(data))
    flags = ("--partition=abrupt", f"--dependency=afterok:{prep.number}")
    job = submit(cluster, checkout, *flags, DDP_DATA_DIR=str(data), DDP_STAGE_DIR=str(disk))
    return job, prep, disk


def test_two_nodes_train_with_two_processes_each(two_nodes: tuple[Job, Path], checkout: Path) -> None:
    job, out = two_nodes
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (4, 8)
    assert summary["test_total"] == NUM_TEST
    assert summary["test_accuracy"] == summary["test_correct"] / NUM_TEST
    assert job.output == checkout / "logs" / f"train_{job.number}.out"
    assert f"finished: runs/{ODD_NAME}" in job.log
    assert job.restarts == 0


def test_a_killed_process_ends_the_job_on_both_nodes(two_nodes: object, cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "--nodes=2")
    wait_until(lambda: newest_step(run_of(checkout, job)), lambda: job.log, pause=0.02)
    os.kill(job.workers[0], signal.SIGKILL)
    assert job.end(seconds=60) == "FAILED"
    wait_until(lambda: not job.processes(), lambda: f"still running: {job.processes()}", 60)
    assert job.restarts == 0
    assert "error: the run failed" in job.log


def test_staged_data_is_removed_when_the_job_is_preempted(
    staged: tuple[Job, Job, Path], cluster: Cluster, checkout: Path
) -> None:
    job, prep, disk = staged
    out = run_of(checkout, job)
    freeze(job, out, 0)
    assert prep.state == "COMPLETED"
    (copy,) = disk.glob(f"ddp-trainer-{job.number}-*")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert any(f"--data-dir\0{copy}\0".encode() in read(pid, "cmdline") for pid in job.workers)
    recorded = json.loads((out / "config.json").read_text())
    assert recorded["data_dir"] == recorded["settings"]["data_dir"] == str(checkout / "data" / "from prep")
    assert names_in(copy) == DATASET_FILES
    preempt(job)
    wait_until(lambda: job.restarts == 1, lambda: f"not preempted\n{job.log}")
    wait_until(lambda: not any(disk.iterdir()), "the copy is still there", 60)
    assert status(out)["state"] == "preempted"


def test_a_cancelled_job_is_not_requeued(staged: tuple[Job, Job, Path], cluster: Cluster, checkout: Path) -> None:
    job, _, disk = staged
    out = run_of(checkout, job)
    freeze(job, out, newest_step(out))
    cluster.call("scancel", job.number)
    job.wait_for("CANCELLED", seconds=60)
    wait_until(lambda: not job.processes(), lambda: f"still running: {job.processes()}", 60)
    assert status(out)["state"] == "preempted"  # the user can resume the run
    assert list(disk.iterdir()) == []
    assert (job.state, job.restarts) == ("CANCELLED", 1)


@pytest.fixture(scope="module")
def sweep(cluster: Cluster, checkout: Path) -> Path:
    """The folder of a finished sweep of four runs with two processes each."""
    words = ("smoke", "--device", "cpu", *PLAN, "--seeds", "2", "--set", "peak-lr=0.1,0.05")
    cluster.call("bash", "slurm/sweep.sh", *words, "--", *CPU, cwd=checkout, DDP_PROCESSES_PER_NODE="2")
    (folder,) = (checkout / "runs").glob("sweep-*")
    wait_until((folder / "table.md").exists, "no table")
    return folder


def test_a_sweep_writes_its_table(sweep: Path) -> None:
    def accuracies(rate: str) -> list[float]:
        summaries = [sweep / f"peak-lr={rate},seed={seed}" / "summary.json" for seed in (0, 1)]
        return [json.loads(summary.read_text())["test_accuracy"] for summary in summaries]

    rows = (sweep / "table.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[:4] for row in rows] == [
        [f"| peak-lr {rate}", "2", f"{mean(accuracies(rate)):.2%}", f"{stdev(accuracies(rate)):.2%}"]
        for rate in ("0.1", "0.05")
    ]


def test_two_processes_train_with_the_same_schedule_as_four(sweep: Path, two_nodes: tuple[Job, Path]) -> None:
    two, four = (read_lines(out / "metrics.jsonl") for out in (sweep / "peak-lr=0.1,seed=0", two_nodes[1]))
    assert [record["learning_rate"] for record in two] == [record["learning_rate"] for record in four]


def test_an_interrupted_job_has_the_results_of_an_uninterrupted_one(
    interrupted: tuple[Job, "Future[list[tuple[int, int]]]"], uninterrupted: Path, checkout: Path
) -> None:
    job, future = interrupted
    stops = future.result(timeout=400)
    assert job.state == "COMPLETED", job.log
    assert job.restarts == 2
    # At most three more steps: the one being saved, the current one, and the one in which the ranks agree to stop.
    assert all(1 <= saved - frozen <= 3 for frozen, saved in stops), stops
    out = run_of(checkout, job)
    assert same_model(out, uninterrupted)
    assert len(list(out.glob("wandb/offline-run-*"))) == 1
    assert job.log.count("requeued to resume") == 2
    assert not job.processes()
