"""Train: `accelerate launch -m ddp_trainer.train [RECIPE] [--flag value ...]`, or one process by `python -m`.

Read `main` as a table of contents; each line's work is done in the file it is imported from.
"""

import sys
import traceback
from collections.abc import Sequence

from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line, program_name
from ddp_trainer.config import TrainConfig, launch_environment
from ddp_trainer.recipes import RECIPES, describe_recipes
from ddp_trainer.run import TrainingRun
from ddp_trainer.signals import Preempted


def train(config: TrainConfig) -> None:
    """One run, or the rest of one. Raises InputError before any work is done."""
    run = TrainingRun(config)
    try:
        if run.is_complete:
            run.say(f"{config.run.out} is complete already: nothing to do")
            return
        trainer = run.build()
        run.finish(trainer, trainer.fit())
    except Preempted:
        run.preempted()
    except BaseException as error:
        run.failed(error)
        raise
    finally:
        run.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0: complete, or preempted with the state saved; 2: the input is wrong; 1: anything else."""
    try:
        config = parse_command_line(
            sys.argv[1:] if argv is None else argv,
            RECIPES,
            prog=program_name("ddp_trainer.train"),
            description=describe_recipes(),
        )
        train(config)
    except InputError as error:
        if launch_environment()[1] == 0:  # every rank finds the same fault; one line is enough
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
