"""Checks a job's arguments, dataset, GPUs and run directory before the job starts its processes.

`python -m slurm.preflight [RECIPE] [--flag value ...]`, run in the job, prints four lines: the run directory, the
folder of the dataset, the number of processes per node, and whether the run is finished already (yes or no). If
something is wrong, it prints one line on stderr and ends with exit status 2.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.dataset import read_dataset
from data_prep.errors import InputError, require
from ddp_trainer.command_line import parse_command_line, run_command
from ddp_trainer.run.checks import check_settings
from ddp_trainer.run.directory import RunDirectory, refuse_existing_run


class Checked(NamedTuple):
    """What train.sh needs to know about a job that can run."""

    out: Path | None
    data_dir: Path
    processes: int  # per node
    is_finished: bool  # no step is left to train


def check(argv: Sequence[str]) -> Checked:
    """Checks the job's arguments, dataset, GPUs and run directory. Raises InputError if the job cannot run."""
    config = parse_command_line(argv, prog="slurm/train.sh", description="")
    processes = cpu_processes() if config.runtime.device == "cpu" else usable_gpus()
    try:
        dataset = read_dataset(config.data.data_dir)
    except InputError as error:
        raise InputError(f"{error} (as a job: sbatch slurm/prep.sh, followed by the arguments of data_prep)") from None
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    num_images = check_settings(config, dataset, world_size=processes * nodes)
    out, is_finished = config.run.out, False
    if out is not None:
        refuse_existing_run(out, resume=config.run.resume)
        is_finished = RunDirectory(out).is_finished(config.schedule.last_step(num_images))
    return Checked(out, config.data.data_dir, processes, is_finished)


def cpu_processes() -> int:
    """The number in DDP_PROCESSES_PER_NODE (default: 1). Raises InputError unless it is a positive integer."""
    requested = os.environ.get("DDP_PROCESSES_PER_NODE", "1")
    is_number = requested.isascii() and requested.isdecimal()
    require(
        is_number and int(requested) >= 1,
        f"DDP_PROCESSES_PER_NODE must be a whole number of at least 1, got {requested!r}",
    )
    return int(requested)


def usable_gpus() -> int:
    """Number of GPUs that SLURM gave this job on this node. Raises InputError if it is 0, or if torch sees fewer."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    require(
        given > 0,
        "this job has no GPU; request some with sbatch --gpus-per-node=N, or train on the CPUs with "
        "sbatch --gpus-per-node=0 slurm/train.sh ... --device cpu",
    )
    import torch

    seen = torch.cuda.device_count()
    require(
        seen >= given,
        f"SLURM gave this job {given} GPUs on {os.uname().nodename}, but torch sees {seen}; check nvidia-smi there, "
        "and that torch is a CUDA build",
    )
    return given


def main(argv: Sequence[str]) -> int:
    """Runs the check. Exit status: 0 if the job can start, 2 on wrong input."""

    def work() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # the job script must not read the output of --help
            out, data_dir, processes, is_finished = check(argv)
        print(out, data_dir, processes, "yes" if is_finished else "no", sep="\n")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
