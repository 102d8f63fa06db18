"""Progress bars of data preparation, drawn by rich."""

import sys
from typing import Self

from data_prep.streams import unfailing_copy


class Bars:
    """A context manager that shows one progress bar for each kind of work, but only on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, TaskID

        # The bars use a copy of stderr, because stderr itself is redirected to collect the output of decoders.
        self._stream = unfailing_copy(2)
        self._progress = Progress(
            # rich must not wrap long lines, because a path that is copied from a wrapped line has a line break in it.
            console=Console(file=self._stream, soft_wrap=True),
            disable=not sys.stderr.isatty(),
            transient=True,
            # With True, lines printed to stdout appear on the terminal, above the bars, even if stdout is a log file.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._stream.close()

    def update(self, work: str, done: int, total: int) -> None:
        """Shows that `done` of `total` items are finished. `total` is 0 if the number of items is unknown."""
        if work not in self._tasks:
            self._tasks[work] = self._progress.add_task(work, total=None)
        self._progress.update(self._tasks[work], completed=done, total=total or None)
