"""Runs the trainer with a narrow network in a forked process, so that it starts in one second instead of nine.

The process is forked from a server process that has already imported everything. Tests of how a process starts, stops
or is launched start a new interpreter instead.
"""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.workers.preloaded"])


def train(arguments: Sequence[str], folder: Path, *, env: Mapping[str, str], timeout: float) -> int | None:
    """Runs the trainer; returns its exit status, or None if it was killed after `timeout` seconds.

    Its output goes to the files stdout and stderr in `folder`.
    """
    process = CONTEXT.Process(target=_train, args=(list(arguments), folder, dict(env)))
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def _train(arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    """Runs in the forked process."""
    from ddp_trainer.distributed.signals import exit_process
    from tests.support.workers.narrow_train import narrow_main

    os.environ.clear()
    os.environ.update(env)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    exit_process(narrow_main(arguments))
