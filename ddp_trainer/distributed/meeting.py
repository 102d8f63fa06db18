"""Helps the processes of a run to join.

The functions report a long wait or a used port, create the process group for control messages, and set timeouts.
"""

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

# When torch.distributed.nn.functional is imported, it stores the default process group until the process ends. DDP
# would import it during a run, so it is imported here, before there is a process group.
import torch.distributed.nn.functional  # noqa: F401

from data_prep.errors import InputError
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.distributed.signals import StopRequest

REPORT_AFTER_SECONDS = 10.0
_runs = itertools.count()  # numbers the runs of this process
_store: object = None  # the key-value store of the last run


@contextlib.contextmanager
def meeting(launch: Launch, stop: StopRequest) -> Iterator[bool]:
    """Context manager for calls that wait until all processes have joined.

    Yields whether this run joins the processes. Otherwise, the calling program has joined them.

    After 10 seconds, the first process of each machine prints that it is waiting. From then on, a single signal
    ends a process at once, because there is nothing to save, and another process may never join. If a signal has
    already arrived by then, the process ends immediately.
    """
    joins = not dist.is_initialized()
    if launch.world_size == 1:
        yield joins
        return
    if joins:
        _use_new_keys()

    def report() -> None:
        if launch.local_rank == 0:
            place = launch.meeting_point
            line = f"rank {launch.rank} of {launch.world_size} is waiting for the other processes at {place}"
            print(line, file=sys.stderr, flush=True)
        stop.end_at_first_signal(True)

    timer = threading.Timer(REPORT_AFTER_SECONDS, report)
    timer.daemon = True
    timer.start()
    try:
        yield joins
    finally:
        timer.cancel()
        timer.join()  # otherwise, a `report` that has already begun could undo the next line
        stop.end_at_first_signal(False)
    if joins:
        _keep_store()


@contextlib.contextmanager
def explained_port(launch: Launch) -> Iterator[None]:
    """Raises InputError if the block fails because another program uses the port of the meeting point."""
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        fix = "choose another --main_process_port (or MASTER_PORT)"
        raise InputError(f"another program uses the port of {launch.meeting_point}; {fix}") from None


def _use_new_keys() -> None:
    """Gives this run its own keys in the processes' key-value store. No earlier run of this process has used them.

    The keys contain the numbers of the process groups, which torch counts from 0 in each run. Without this call, a
    second run would find the addresses that the first run left in the store.
    """
    dist.distributed_c10d._world.group_count = 100 * next(_runs)


def _keep_store() -> None:
    """Keeps the processes' key-value store for the next run of this process.

    Without a launcher, the main process serves the store to the other processes. If the store ended with the run,
    another process that begins its next run before the main process does could connect to the old store. Both
    processes would then fail.
    """
    global _store
    _store = dist.distributed_c10d._get_default_store()


def control_group(timeout: timedelta) -> dist.ProcessGroup:
    """A gloo process group of all processes, for control messages. `timeout`: its timeout."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Sets the timeout of a process group (None: the default group)."""
    # Before torch 2.15, there is only the private function.
    name = "set_timeout" if hasattr(dist.distributed_c10d, "set_timeout") else "_set_pg_timeout"
    getattr(dist.distributed_c10d, name)(timeout, group)
