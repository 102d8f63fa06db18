"""The narrow trainer in a process forked from one that has imported everything, so it starts in one second, not nine.

For tests of what a run does. Tests of how a process starts, stops or is launched start a real one.
"""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.workers.preloaded"])


def train(arguments: Sequence[str], folder: Path, *, env: Mapping[str, str], timeout: float) -> int | None:
    """Its exit status, or None if it had to be killed. It prints to the files stdout and stderr in `folder`."""
    process = CONTEXT.Process(target=_train, args=(list(arguments), folder, dict(env)))
    process.start()
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def _train(arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    """In the forked process."""
    from ddp_trainer.distributed.signals import exit_process
    from tests.support.workers.narrow_train import narrow_main

    os.environ.clear()
    os.environ.update(env)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    exit_process(narrow_main(arguments))
