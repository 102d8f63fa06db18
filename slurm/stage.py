"""`python -m slurm.stage DATA_DIR COPY` copies a dataset to this node's own disk, and verifies the copy by sha256."""

import os
import shutil
import sys
from pathlib import Path

from data_prep.dataset import MANIFEST, read_dataset, verify_dataset
from data_prep.errors import InputError, require
from ddp_trainer.command_line import run_command


def stage(data_dir: Path, copy: Path) -> None:
    """Copies the dataset into the folder `copy`, which must exist.

    Raises InputError if the dataset or its copy is unusable.
    """
    info = read_dataset(data_dir)
    try:
        for name in (*(split.file for split in info.splits.values()), MANIFEST):
            shutil.copyfile(data_dir / name, copy / name)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        raise _unusable(data_dir, f"cannot be copied to {copy} on {os.uname().nodename} ({error})") from None
    try:
        verify_dataset(copy, info, full=True)
    except InputError:
        verify_dataset(data_dir, info, full=True)  # if the original is damaged, that is the error to report
        raise _unusable(data_dir, f"is intact, but its copy in {copy} on {os.uname().nodename} is not") from None


def _unusable(data_dir: Path, problem: str) -> InputError:
    return InputError(f"{data_dir} {problem}; set DDP_STAGE_DIR to another folder, or unset it")


def main() -> int:
    """Copies and verifies. Exit status: 0 on success, 2 if the dataset or the folder cannot be used."""

    def work() -> None:
        require(len(sys.argv) == 3, "usage: python -m slurm.stage DATA_DIR COPY")
        stage(Path(sys.argv[1]), Path(sys.argv[2]))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
