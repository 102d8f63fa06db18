"""Before a job keeps its nodes busy: are arguments, dataset, GPUs and run directory what a training needs?

`python -m slurm.preflight [RECIPE] [--flag value ...]`, within the job, prints the run directory, the dataset's folder
and the number of processes for each node, a line each; or, on stderr, the one line of what is wrong, and exits with 2.
"""

import contextlib
import os
import sys
from collections.abc import Sequence

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line
from ddp_trainer.config import TrainConfig
from ddp_trainer.recipes import RECIPES
from ddp_trainer.run.checks import check_dataset
from ddp_trainer.run.directory import refuse_present_run


def check(argv: Sequence[str]) -> tuple[TrainConfig, int]:
    """The configuration and the number of processes for each node. Raises InputError."""
    config = parse_command_line(argv, RECIPES, prog="slurm/train.sh", description="")
    processes = cpu_processes() if config.runtime.device == "cpu" else usable_gpus()
    try:
        dataset = read_dataset(config.data.data_dir)
    except InputError as error:
        raise InputError(f"{error} (or as a job, by sbatch slurm/prep.sh with the same arguments)") from None
    os.environ["WORLD_SIZE"] = str(processes * int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    check_dataset(config, dataset)
    out = config.run.out
    if out is not None:
        refuse_present_run(out, resume=config.run.resume)
    return config, processes


def cpu_processes() -> int:
    asked = os.environ.get("DDP_PROCESSES_PER_NODE", "1")
    if not asked.isdecimal() or int(asked) < 1:
        raise InputError(f"DDP_PROCESSES_PER_NODE={asked}: give a number of processes, at least 1")
    return int(asked)


def usable_gpus() -> int:
    """SLURM's number of GPUs for this job on this node, where torch sees as many. Raises InputError."""
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if not given:
        raise InputError(
            "this job has no GPU: ask for some by sbatch --gpus-per-node=N, or train on the CPUs by "
            "sbatch --gpus-per-node=0 slurm/train.sh ... --device cpu"
        )
    import torch

    seen = torch.cuda.device_count()
    if seen < given:
        raise InputError(
            f"SLURM gave this job {given} GPUs on {os.uname().nodename}, and torch sees {seen}: compare "
            "nvidia-smi there, and that torch is a CUDA build"
        )
    return given


def main(argv: Sequence[str]) -> int:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what --help prints is not to be taken for the three lines
            config, processes = check(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(config.run.out, config.data.data_dir, processes, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
