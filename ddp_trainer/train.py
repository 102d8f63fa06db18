"""Train: `accelerate launch -m ddp_trainer.train [RECIPE] [--flag value ...]`, or one process by `python -m`.

Read `main` as a table of contents; each line's work is done in the file it is imported from. Imports that take seconds
stand within the functions: a signal that arrives meanwhile is a request to stop already.
"""

import faulthandler
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from ddp_trainer.signals import Preempted, StopRequest

if TYPE_CHECKING:
    from ddp_trainer.config import TrainConfig
    from ddp_trainer.run import TrainingRun


def train(config: "TrainConfig", stop: StopRequest) -> None:
    """One run, or the rest of one. Raises InputError before any work is done."""
    from ddp_trainer.run import TrainingRun

    run = TrainingRun(config, stop)
    try:
        go_on(run)
    except BaseException as error:
        run.failed(error)
        raise
    run.close()


def go_on(run: "TrainingRun") -> None:
    """To the end of the run, or to the next request to stop."""
    if run.is_complete:
        return run.finish_again()
    try:
        run.runtime.stop_if_asked()
        trainer = run.build()
        return run.finish(trainer, trainer.fit())
    except Preempted:
        return run.preempted()


def main(argv: Sequence[str] | None = None) -> int:
    """0: complete, or preempted with the state saved; 2: the input is wrong; 1: anything else."""
    stop = StopRequest()
    stop.install()
    faulthandler.enable()  # names the line where a file that shrinks under its reader kills the process
    from ddp_trainer.command_line import parse_command_line, program_name
    from ddp_trainer.hardware import launch_environment
    from ddp_trainer.recipes import RECIPES, describe_recipes

    try:
        config = parse_command_line(
            sys.argv[1:] if argv is None else argv,
            RECIPES,
            prog=program_name("ddp_trainer.train"),
            description=describe_recipes(),
        )
        train(config, stop)
    except InputError as error:
        if launch_environment()[1] == 0:  # every rank finds the same fault; one line is enough
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        tell(error)
        return 1
    return 0


def tell(error: Exception) -> None:
    """A line where it explains itself, else the whole traceback."""
    from ddp_trainer.checkpoint import CheckpointError
    from ddp_trainer.nonfinite import NonFinite

    if isinstance(error, CheckpointError | NonFinite):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def leave(code: int) -> None:
    """Ends the process. After a failure at once: what waits for a peer that is gone may wait for ever."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


if __name__ == "__main__":
    leave(main())
