"""The command `python -m data_prep`, which writes the images of a source as a dataset for the trainer."""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from data_prep.bars import Bars
from data_prep.dataset import DatasetInfo, write_dataset
from data_prep.encoding import DEFAULT_QUALITY, ENCODINGS, Encoding
from data_prep.errors import InputError, printable, require, shell_path
from data_prep.machine_limits import machine_problem
from data_prep.output import check_out, out_folder, remove_lists, write_list
from data_prep.signals import Stopper
from data_prep.sources import MAX_NAMED, SOURCES, Source, UnreadableImagesError
from data_prep.sources.decoder_messages import DecoderMessages, collected_messages
from data_prep.sources.listing import check_outside_splits
from data_prep.sources.synthetic import DEFAULT_TEST_COUNT, DEFAULT_TRAIN_COUNT, draw_synthetic
from data_prep.streams import forgiving_output

# Batch size and learning rate of the recipes that `describe` suggests: `baseline`, and `photos` for large images.
BASELINE, PHOTOS = (512, 0.4), (256, 0.5)
PHOTO_SIDE, PHOTO_CROP = 128, 224  # the smallest side for which `photos` is suggested, and the side of its crops
DEFAULT_SIZE = 32
# Flags that only some sources use. Giving one with another source is an error.
ONLY_FOR = {"size": ("folder", "synthetic"), "skip_unreadable": ("folder",)} | dict.fromkeys(
    ("train_count", "test_count", "seed"), ("synthetic",)
)

DESCRIPTION = "Write images as a dataset for ddp_trainer: OUT/train.beton, OUT/test.beton and OUT/dataset.json."
EXAMPLES = """\
sources:
  cifar10, cifar100  the archive or its extracted files in ROOT, downloaded if absent; verified before use
  folder             image files in ROOT/train/CLASS and ROOT/test/CLASS (or val, dev, ...; see docs/commands.md)
  synthetic          ten classes of images, generated from a seed; needs no input

Limit: 100 million pixels per image (400 million for a non-progressive JPEG). Set DATA_PREP_MAX_PIXELS to raise it.

examples:
  python -m data_prep
  python -m data_prep --source synthetic --out data/synthetic
  python -m data_prep --source folder --root photos --out data/photos --size 64
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked flags, with defaults filled in. Raises InputError."""
    parser = _Parser(
        prog="python -m data_prep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", choices=SOURCES, default="cifar10", help="where the images come from (default: %(default)s)")
    add("--root", type=Path, default=Path("data/raw"), metavar="DIR", help="folder to read from (default: %(default)s)")
    add("--out", type=out_folder, metavar="DIR", help="folder to write to (default: data/SOURCE, such as data/cifar10)")
    add(
        "--size",
        type=int,
        metavar="N",
        help=f"side of the images in pixels; needs --source folder or synthetic (default: {DEFAULT_SIZE})",
    )
    skip_help = "leave out image files that cannot be read, and list them in dataset.json; needs --source folder"
    add("--skip-unreadable", action="store_true", default=None, help=skip_help)
    add("--encoding", choices=ENCODINGS, default="raw", help="how the images are stored (default: %(default)s)")
    add("--quality", type=int, metavar="N", help=f"JPEG quality, 1 to 100 (default: {DEFAULT_QUALITY})")
    for name, words, default in (
        ("--train-count", "number of training images", DEFAULT_TRAIN_COUNT),
        ("--test-count", "number of test images", DEFAULT_TEST_COUNT),
        ("--seed", "seed of the images", 0),
    ):
        add(name, type=int, metavar="N", help=f"{words}; needs --source synthetic (default: {default})")
    options = parser.parse_args(argv)
    for name, sources in ONLY_FOR.items():
        flag, is_allowed = "--" + name.replace("_", "-"), getattr(options, name) is None or options.source in sources
        require(is_allowed, f"{flag} needs --source {' or '.join(sources)}, got --source {options.source}")
    return _fill_in(options)


def _fill_in(options: argparse.Namespace) -> argparse.Namespace:
    defaults = {
        "out": Path("data", options.source),
        "size": DEFAULT_SIZE,
        "seed": 0,
        "skip_unreadable": False,
        "quality": DEFAULT_QUALITY if options.encoding == "jpeg" else None,
        "train_count": DEFAULT_TRAIN_COUNT,
        "test_count": DEFAULT_TEST_COUNT,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.encoding = Encoding(options.encoding, options.quality)
    require(options.seed >= 0, f"--seed must be 0 or more, got {options.seed}")
    return options


def prepare(options: argparse.Namespace, check: Callable[[], None]) -> DatasetInfo:
    """Reads the source and writes the dataset. Raises InputError.

    `check` is called often. It must raise an exception if a signal has arrived, so that the work stops soon.
    """
    check_out(options.out)
    if options.source == "folder":
        check_outside_splits(options.out, options.root)
    messages = DecoderMessages()
    with Bars() as bars:
        source = _open_source(options, bars)

        def show(work: str, done: int, total: int) -> None:
            check()
            bars.update(work, done, total)

        def say(note: str) -> None:
            print(printable(note), flush=True)

        check()
        try:
            with collected_messages(messages):
                info = write_dataset(source, options.out, progress=show, say=say, encoding=options.encoding)
        except UnreadableImagesError as error:
            raise _with_list(error, options.out) from None
        remove_lists(options.out, "unreadable", "duplicates")
        if duplicates := source.findings().duplicates:
            say(f"duplicates: {write_list(options.out, 'duplicates', duplicates)}")
        if note := messages.note():
            say(note)
        return info


def _with_list(error: UnreadableImagesError, out: Path) -> InputError:
    """The error to report. If it cannot name all unreadable files, they are listed in OUT.unreadable.txt."""
    remove_lists(out, "unreadable")  # of an earlier attempt
    is_named = len(error.problems) <= MAX_NAMED
    return error if is_named else InputError(f"{error}; {write_list(out, 'unreadable', error.problems)}")


def _open_source(options: argparse.Namespace, bars: Bars) -> Source:
    if options.source == "synthetic":
        return draw_synthetic(
            train_count=options.train_count, test_count=options.test_count, seed=options.seed, size=options.size
        )
    if options.source == "folder":
        from data_prep.sources.folder import FolderImages

        return FolderImages(options.root, size=options.size, skip_unreadable=options.skip_unreadable)
    from data_prep.sources.cifar import load_cifar

    return load_cifar(options.source, options.root, progress=partial(bars.update, "downloading"))


def describe(info: DatasetInfo, out: Path) -> str:
    """Text that says what was written, and which command to run next."""
    side, size = info.image_size, sum(split.bytes for split in info.splits.values()) / 1e6
    counts = " and ".join(f"{split.count} {name}" for name, split in info.splits.items())
    if "train" in info.splits:
        recipe, suggested = (" photos", PHOTOS) if side >= PHOTO_SIDE else ("", BASELINE)
        crop = (
            f" --train-size {side * 7 // 8}" if PHOTO_SIDE <= side < PHOTO_CROP else " --cutout 0" if side <= 8 else ""
        )
        flags = crop + _flags_for(info.splits["train"].count, *suggested)
        command = f"train{recipe} --data-dir {shell_path(out)}{flags}"
    else:
        command = f"evaluate RUN_DIR --data-dir {shell_path(out)}"
    return (
        f"{shell_path(out)}: {counts} images, {len(info.classes)} classes, {side}x{side}, {size:.1f} MB\n"
        f"next: python -m ddp_trainer.{command}"
    )


def _flags_for(num_images: int, full_batch: int, peak_lr: float) -> str:
    """Flags that adapt the recipe to a dataset with fewer images than a batch.

    The learning rate is proportional to the batch size (Goyal et al., arXiv 1706.02677).
    """
    if num_images >= full_batch:
        return ""
    batch_size = 2 ** int(math.log2(max(num_images // 4, 2)))
    return f" --batch-size {batch_size} --peak-lr {peak_lr * batch_size / full_batch:g}"


@forgiving_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 (success), 1 (system error), 2 (wrong input) or 128 + signal. SIGINT raises KeyboardInterrupt."""
    with Stopper() as stopper:
        try:
            return _run(argv, stopper)
        except BaseException:
            if not (number := stopper.number):
                raise
            print(f"interrupted by {signal.Signals(number).name}: incomplete files were removed", file=sys.stderr)
            if number == signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + number


def _run(argv: Sequence[str] | None, stopper: Stopper) -> int:
    try:
        options = parse(argv)
        print(describe(prepare(options, stopper.check), options.out))
    except InputError as error:
        stopper.check()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        stopper.check()
        if (problem := machine_problem(error)) is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def main_process() -> NoReturn:
    """Calls `main` and ends the process. Entry point of `python -m data_prep` and `ddp-prep`.

    After Ctrl-C, Python prints no traceback, but still ends itself with SIGINT, so Ctrl-C also ends a shell loop around
    the command.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: None
        raise


if __name__ == "__main__":
    main_process()
