"""Ends a run or this process, so that no thread of torch can abort the process."""

import gc
import os
import signal
import sys

from ddp_trainer.distributed.signals import SIGNALS


def release_run() -> None:
    """Frees the objects of a run that has ended. Some refer to each other, so only `gc` frees them.

    This also ends torch's communication threads. Such a thread may still hold a Python tensor. If it releases this
    tensor while Python is ending, torch aborts the process ("terminate called without an active exception").
    """
    gc.collect()


def exit_process(status: int) -> None:
    """Ends this process. After a failure, skips all clean-up, because it might wait forever for a rank that is gone.

    Ranks other than the main one skip clean-up after a success, too, because they have nothing left to write.
    Signals that ask the process to stop are ignored from now on, except for Ctrl-C: a launcher may repeat them.
    """
    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
    if status or os.environ.get("RANK", "0") != "0":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    release_run()
    sys.exit(0)
