"""`python -m data_prep`: one source's images, written as a dataset that the trainer reads. Only the command line."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.dataset import DatasetInfo, write_dataset
from data_prep.errors import InputError
from data_prep.sources import SOURCES, ImageSet
from data_prep.sources.synthetic import DEFAULT_TEST_COUNT, DEFAULT_TRAIN_COUNT, draw_synthetic

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_SIZE = 32
# Flags that some sources have no use for: it is an error to give them there, lest one believes that they do something.
ONLY_FOR = {"size": ("folder", "synthetic")} | dict.fromkeys(("train_count", "test_count", "seed"), ("synthetic",))

DESCRIPTION = "Writes images as a dataset for ddp_trainer: OUT/train.beton, OUT/test.beton and OUT/dataset.json."
EXAMPLES = """\
sources:
  cifar10, cifar100  torchvision's files in ROOT, downloaded there if absent; checked before they are opened
  folder             ROOT/train/CLASS/*.{png,jpg,jpeg} and ROOT/test/CLASS/* (or val), resized to SIZE
  synthetic          ten drawn classes, made from a seed; needs no input

examples:
  python -m data_prep
  python -m data_prep --source synthetic --out data/synthetic
  python -m data_prep --source folder --root photos --out data/photos --size 64
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked flags, defaults filled in. Raises InputError."""
    parser = _Parser(
        prog="python -m data_prep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", choices=SOURCES, default="cifar10", help="where the images come from (default: %(default)s)")
    add("--root", type=Path, default=Path("data/raw"), metavar="DIR", help="what is read (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="what is written (default: data/SOURCE, so data/cifar10)")
    add("--size", type=int, metavar="N", help=f"pixels of a side; folder and synthetic only (default: {DEFAULT_SIZE})")
    for name, words, default in (
        ("--train-count", "training images drawn", DEFAULT_TRAIN_COUNT),
        ("--test-count", "test images drawn", DEFAULT_TEST_COUNT),
        ("--seed", "what the drawing starts from", 0),
    ):
        add(name, type=int, metavar="N", help=f"{words}; synthetic only (default: {default})")
    options = parser.parse_args(argv)
    for name, sources in ONLY_FOR.items():
        if getattr(options, name) is not None and options.source not in sources:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} belongs to --source {' or '.join(sources)}, not {options.source}; leave it out")
    return _fill_in(options)


def _fill_in(options: argparse.Namespace) -> argparse.Namespace:
    defaults = {
        "out": Path("data", options.source),
        "size": DEFAULT_SIZE,
        "seed": 0,
        "train_count": DEFAULT_TRAIN_COUNT,
        "test_count": DEFAULT_TEST_COUNT,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: give a number from 0")
    return options


def prepare(options: argparse.Namespace, check: Callable[[], None]) -> DatasetInfo:
    """Reads the source and writes the dataset. Raises InputError, and what `check` raises, often called meanwhile."""
    _check_out(options.out)
    with _bars() as bar:
        image_set = _load(options, bar)
        check()
        written: dict[str, int] = {}
        total = len(image_set.train.labels) + len(image_set.test.labels)

        def show(split: str, count: int) -> None:
            check()
            written[split] = count
            bar("writing")(sum(written.values()), total)

        return write_dataset(image_set, options.out, progress=show)


def _check_out(out: Path) -> None:
    """Before minutes are spent on reading: may `out` be written at all?"""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"--out {out}: {nearest} is no folder; name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {nearest} cannot be written; name another folder")


def _load(options: argparse.Namespace, bar: Callable[[str], Callable[[int, int], None]]) -> ImageSet:
    if options.source == "synthetic":
        return draw_synthetic(
            train_count=options.train_count, test_count=options.test_count, seed=options.seed, size=options.size
        )
    if options.source == "folder":
        from data_prep.sources.folder import load_folder

        return load_folder(options.root, size=options.size, progress=bar("reading"))
    from data_prep.sources.cifar import load_cifar

    return load_cifar(options.source, options.root, progress=bar("downloading"))


@contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Gives a function that names a bar and returns what moves it. On a terminal only: no bars in logs."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        yield lambda name: lambda done, total: _move(progress, name, done, total)


def _move(progress: "Progress", name: str, done: int, total: int) -> None:
    task = next((task.id for task in progress.tasks if task.description == name), None)
    if task is None:
        task = progress.add_task(name)
    progress.update(task, completed=done, total=total or None)


def describe(info: DatasetInfo, out: Path) -> str:
    """What was written, and what to do with it."""
    size = sum(split.bytes for split in info.splits.values()) / 1e6
    counts = " and ".join(f"{split.count} {name}" for name, split in info.splits.items())
    return (
        f"{out}: {counts} images, {len(info.classes)} classes, {info.image_size}x{info.image_size}, {size:.1f} MB\n"
        f"next: python -m ddp_trainer.train --data-dir {shlex.quote(str(out))}"
    )


class _Stopper:
    """Unwinds at the first SIGTERM or SIGINT, so that what is half-written is removed; further ones are ignored.

    C code (numpy's `tofile` for one) may replace or swallow what a signal handler raises: hence the number is kept.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> NoReturn:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        self.number = number
        raise SystemExit(128 + number)

    def check(self) -> None:
        """Raises SystemExit where a signal has come."""
        if self.number:
            raise SystemExit(128 + self.number)


def main(argv: Sequence[str] | None = None) -> int:
    """0: written; 2: the input is wrong; 1: the machine failed; 130 or 143: interrupted."""
    stopper = _Stopper()
    try:
        return _run(argv, stopper)
    except BaseException:
        if not stopper.number:
            raise
        name = signal.Signals(stopper.number).name
        print(f"interrupted by {name}: nothing half-written is left", file=sys.stderr, flush=True)
        return 128 + stopper.number


def _run(argv: Sequence[str] | None, stopper: _Stopper) -> int:
    try:
        options = parse(argv)
        print(describe(prepare(options, stopper.check), options.out))
    except InputError as error:
        stopper.check()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: the images do not fit into memory; take a smaller --size or fewer images", file=sys.stderr)
        return 2
    except OSError as error:
        stopper.check()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
