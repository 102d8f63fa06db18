"""Runs `ddp_trainer.train`, by default with a network so narrow that a step takes milliseconds."""

import sys
from collections.abc import Sequence

import ddp_trainer.run.outputs
from ddp_trainer.distributed.process_end import exit_process
from ddp_trainer.train import main

NARROW = ("--widths", "8", "8", "16", "16")


def narrow_main(argv: Sequence[str]) -> int:
    """Calls `main` without the report, which takes longer than the run itself."""
    ddp_trainer.run.outputs.write_report_or_warn = lambda run_dir: None
    return main([*argv, *(() if "--network" in argv else NARROW)])


if __name__ == "__main__":
    exit_process(narrow_main(sys.argv[1:]))
