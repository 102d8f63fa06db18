"""A user's program: trains three times in the same processes, then checks that no thread of gloo is left."""

import sys
from collections.abc import Sequence
from pathlib import Path

import ddp_trainer
from tests.support.processes import wait_until


def main(arguments: Sequence[str]) -> None:
    data, out = arguments
    for seed in range(3):
        settings = {"data_dir": data, "device": "cpu", "widths": (4, 4, 4, 4), "max_steps": 2}
        ddp_trainer.train("smoke", seed=seed, out=f"{out}/{seed}", **settings)
    # For a moment, the kernel still lists a thread that has ended.
    wait_until(has_no_gloo_threads, "a thread of gloo is left", seconds=10)


def has_no_gloo_threads() -> bool:
    return not any("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


if __name__ == "__main__":
    main(sys.argv[1:])
