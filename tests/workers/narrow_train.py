"""`ddp_trainer.train` with a network so narrow that a step takes milliseconds: for tests of what surrounds it."""

from dataclasses import replace

import ddp_trainer.run
from ddp_trainer.model import ModelSpec
from ddp_trainer.train import leave, main

NARROW = (8, 8, 16, 16)


class NarrowRun(ddp_trainer.run.TrainingRun):
    """The real run, of a small network."""

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, widths=NARROW)


def use_narrow_network() -> None:
    """In this process. The report, which takes longer to draw than the training, is left out."""
    ddp_trainer.run.TrainingRun = NarrowRun
    ddp_trainer.run.write_report_or_say_why = lambda run_dir: None


if __name__ == "__main__":
    use_narrow_network()
    leave(main())
