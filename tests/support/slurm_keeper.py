"""Ends every process of a test cluster when standard input closes: `python -m tests.support.slurm_keeper FOLDER`.

No process of the cluster outlives the tests, even if the tests are killed with SIGKILL.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.support.processes import processes_with


def keep(folder: Path) -> int:
    """Waits until standard input closes, then kills the daemons and jobs of the cluster, and removes `folder`.

    Returns the number of processes that are left.
    """
    sys.stdin.read()
    deadline = time.monotonic() + 30
    while (alive := processes_with(f"SLURM_CONF={folder}/slurm.conf")) and time.monotonic() < deadline:
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
    return len(alive)


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1])))
