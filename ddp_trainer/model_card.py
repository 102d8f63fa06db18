"""Model card: `python -m ddp_trainer.model_card RUN_DIR` rewrites model.md of a finished run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ddp_trainer.command_line import parse_flags, program_name, run_command


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Rewrite RUN_DIR/model.md of a finished run."""

    run_dir: tyro.conf.Positional[Path]
    """Directory of a finished run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if model.md was written, 2 if the input is wrong or model.md cannot be written."""
    from ddp_trainer.report.model_card import write_model_card

    def write() -> None:
        config = parse_flags(CardConfig, argv, prog=program_name("ddp_trainer.model_card"))
        print(write_model_card(config.run_dir))

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
