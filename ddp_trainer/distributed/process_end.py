"""Ends a run, or this process, without an abort by one of torch's threads."""

import gc
import os
import sys


def release_run() -> None:
    """Frees the objects of a run that has ended. Some of them refer to each other, so they do not free themselves.

    With them end torch's threads for communication. Such a thread may still hold a tensor of Python. If it releases
    this tensor while Python is ending, torch aborts the process ("terminate called without an active exception").
    """
    gc.collect()


def exit_process(status: int) -> None:
    """Ends this process. After a failure, skips all clean-up, because it might wait forever for a rank that is gone.

    Ranks other than the main one skip clean-up after a success, too, because they have nothing left to write.
    """
    if status or os.environ.get("RANK", "0") != "0":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    release_run()
    sys.exit(0)
