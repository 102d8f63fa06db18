"""`python -m ddp_trainer.report RUN_DIR...`: rebuilds the report of a run, or compares several runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ddp_trainer.command_line import parse_flags, program_name, run_command
from ddp_trainer.report.write import write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write RUN_DIR/report/index.html and its pictures. Several runs are compared in the report of the first."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; the report is written into the first of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if the report was written, 2 for wrong input."""

    def report() -> None:
        config = parse_flags(ReportConfig, argv, prog=program_name("ddp_trainer.report"))
        print(write_report(config.run_dirs))

    return run_command(report)


if __name__ == "__main__":
    sys.exit(main())
