"""Runs programs of this project in forked processes, which start in one second instead of nine.

The processes are forked from a server process that has already imported the trainer. With several ranks, each process
has the environment variables that a launcher would set. Tests of process startup use new interpreters instead.
"""

import contextlib
import importlib
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.workers.preloaded"])
GRACE_SECONDS = 30.0  # how long the other ranks may keep running after one has failed


def run(
    program: str, arguments: Sequence[str], folder: Path, *, env: Mapping[str, str], processes: int, timeout: float
) -> int | None:
    """Runs `program` (MODULE:FUNCTION) in each process. Returns the first exit status that is not 0.

    If all are 0, returns 0. If a process had to be killed and no other one failed, returns None. The output of all
    processes goes to the files stdout and stderr in `folder`. As under a launcher, all ranks are ended if one of them
    fails.
    """
    port = free_port()
    ranks = [{} if processes == 1 else rank_environment(rank, processes, port) for rank in range(processes)]
    children = [
        CONTEXT.Process(target=_run, args=(program, list(arguments), folder, {**env, **rank})) for rank in ranks
    ]
    for child in children:
        child.start()
    _wait(children, timeout)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return next(filter(None, codes), None if None in codes else 0)


def _wait(children: Sequence[BaseProcess], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        if any(child.exitcode for child in children):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)


def _run(program: str, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    """Runs `program` and ends the process. Called in each forked process."""
    from ddp_trainer.distributed.process_end import exit_process

    os.environ.clear()
    os.environ.update(env)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    module, _, function = program.partition(":")
    exit_process(getattr(importlib.import_module(module), function)(arguments) or 0)


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Returns the variables that a launcher sets for one of several processes on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Returns a free port. It is below the ports that the system assigns, so no other process gets it by chance."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port := random.randrange(20_000, 29_000)))
            return port
