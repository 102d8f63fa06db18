"""Ends a process when its parent ends, even if the parent was killed. Linux only."""

import ctypes
import os

PR_SET_PDEATHSIG = 1


def signal_on_death_of_parent(number: int) -> None:
    """Makes the kernel send signal `number` to this process when the thread that started the process ends.

    0: the kernel sends no signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def end_with_parent(number: int) -> None:
    """From now on, this process gets the signal `number` when the thread that started it ends."""
    parent = os.getppid()
    signal_on_death_of_parent(number)
    if os.getppid() != parent:  # the parent ended before the call above
        os._exit(128 + number)
