"""`python -m slurm.stage DATA_DIR COPY`: copies a dataset to this node's own disk, and checks it there by sha256."""

import os
import shutil
import sys
from pathlib import Path

from data_prep.dataset import MANIFEST, read_dataset, verify_dataset
from data_prep.errors import InputError


def stage(data_dir: Path, copy: Path) -> None:
    """Replaces what an earlier attempt of the job left in `copy`. Raises InputError where the copy is not usable."""
    info = read_dataset(data_dir)
    try:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        for name in (*(split.file for split in info.splits.values()), MANIFEST):
            shutil.copyfile(data_dir / name, copy / name)
    except OSError as error:
        raise _unusable(data_dir, f"cannot be copied to {copy} on {os.uname().nodename} ({error})") from None
    try:
        verify_dataset(copy, info)
    except InputError:
        verify_dataset(data_dir, info)  # where the original is damaged, it is the one to mend
        raise _unusable(data_dir, f"is whole, but its copy in {copy} on {os.uname().nodename} is not") from None


def _unusable(data_dir: Path, problem: str) -> InputError:
    return InputError(f"{data_dir} {problem}; name another folder by DDP_STAGE_DIR, or stage nothing")


def main(data_dir: Path, copy: Path) -> int:
    try:
        stage(data_dir, copy)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
