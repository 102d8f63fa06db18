"""`python -m ddp_trainer.report RUN_DIR...`: draw the report anew; several runs side by side."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.errors import InputError
from ddp_trainer.command_line import parse_flags, program_name
from ddp_trainer.report import write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write RUN_DIR/report/index.html and its pictures; with several runs, their comparison in the first one's."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; the report is written into the first."""


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config = parse_flags(ReportConfig, argv, prog=program_name("ddp_trainer.report"))
        page = write_report(config.run_dirs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
