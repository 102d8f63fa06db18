"""`python -m data_prep` as a real process: its files and output. Wrong input gives one line and exit status 2."""

import filecmp
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main, parse
from data_prep.dataset import read_dataset, verify_dataset
from data_prep.errors import InputError
from tests.support.folders import DATASET_FILES, names_in
from tests.support.photos import BAD_EXIF, damaged_tiff, save
from tests.support.processes import wait_until
from tests.support.trainer import environment

COMMAND = (sys.executable, "-m", "data_prep")


def prepare(*arguments: object, cwd: Path, limit: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command. `limit`: flag and value of the shell command `ulimit`."""
    command = ("bash", "-c", f'ulimit {limit}; exec "$@"', "bash") if limit else ()
    return subprocess.run(
        [*command, *COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=180,
    )


def refused(*arguments: object, cwd: Path) -> str:
    """Runs the command, which must exit with status 2, and returns its line on stderr."""
    done = prepare(*arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four validation images of two classes, in several sizes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("cat", "dog"):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{('png', 'jpg')[number % 2]}")
    return root


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A dataset of the photos, and what the command printed."""
    folder = tmp_path_factory.mktemp("prepared")
    done = prepare("--source", "folder", "--root", photos, "--out", "new/set", "--size", 16, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bars, because stderr is not a terminal
    return folder / "new" / "set", done.stdout


def test_a_folder_becomes_a_dataset(prepared: tuple[Path, str]) -> None:
    out, printed = prepared
    assert names_in(out) == DATASET_FILES
    info = read_dataset(out)
    verify_dataset(out, info, full=True)
    assert (info.source, info.classes, info.image_size) == ("folder", ("cat", "dog"), 16)
    assert {name: split.count for name, split in info.splits.items()} == {"train": 12, "test": 4}
    assert "12 train and 4 test images, 2 classes" in printed
    assert printed.splitlines()[0].startswith("test split: ")
    assert printed.splitlines()[-1] == (
        "next: python -m ddp_trainer.train --data-dir new/set --batch-size 2 --peak-lr 0.0015625"
    )


def test_the_same_input_gives_the_same_bytes_and_a_failure_changes_nothing(
    photos: Path, prepared: tuple[Path, str], tmp_path: Path
) -> None:
    command = ("--source", "folder", "--size", 16, "--out", "set")
    shutil.copytree(photos, tmp_path / "copy")
    assert prepare(*command, "--root", "copy", cwd=tmp_path).returncode == 0
    (tmp_path / "copy" / "train" / "cat" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    assert "torn.jpg" in refused(*command, "--root", "copy", cwd=tmp_path)
    assert names_in(tmp_path / "set") == DATASET_FILES
    for file in DATASET_FILES:
        assert filecmp.cmp(tmp_path / "set" / file, prepared[0] / file, shallow=False)


def test_unreadable_files_are_listed_and_can_be_skipped(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "copy")
    for number in range(7):
        (tmp_path / "copy" / "train" / "cat" / f"bad {number}.jpg").write_bytes(b"\xff\xd8\xff")
    command = ("--source", "folder", "--size", 16, "--out", "new/set", "--root", "copy")
    line = refused(*command, cwd=tmp_path)
    assert "and 2 more; " in line
    assert "all are listed in new/set.unreadable.txt" in line
    listed = (tmp_path / "new" / "set.unreadable.txt").read_text().splitlines()[1:]
    assert sum(text.startswith("'copy/train/cat/bad ") for text in listed) == len(listed) == 7
    done = prepare(*command, "--skip-unreadable", cwd=tmp_path)
    assert done.returncode == 0
    assert "skipped 7 unreadable image files" in done.stdout
    info = read_dataset(tmp_path / "new" / "set")
    assert info.splits["train"].count == 12
    assert sorted(info.skipped)[0] == "train/cat/bad 0.jpg"
    assert not (tmp_path / "new" / "set.unreadable.txt").exists(), "the list of the failed attempt is still there"


def test_jpeg_images_are_written_with_the_requested_quality(photos: Path, tmp_path: Path) -> None:
    flags = ("--size", 16, "--encoding", "jpeg", "--quality", 80, "--out", "set")
    assert prepare("--source", "folder", "--root", photos, *flags, cwd=tmp_path).returncode == 0
    info = read_dataset(tmp_path / "set")
    verify_dataset(tmp_path / "set", info, full=True)
    assert (info.encoding, info.quality) == ("jpeg", 80)


def test_synthetic_dataset_has_the_requested_counts_and_size(tmp_path: Path) -> None:
    flags = ("--train-count", 30, "--test-count", 20, "--size", 8, "--seed", 1, "--out", "set")
    assert prepare("--source", "synthetic", *flags, cwd=tmp_path).returncode == 0
    info = read_dataset(tmp_path / "set")
    assert (info.splits["train"].count, info.splits["test"].count, info.image_size) == (30, 20, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--source", "folder", "--root", "absent"), "absent"),
        (("--source", "imagenet"), "imagenet"),
        (("--source", "folder", "--size", "big"), "--size"),
        (("--source", "folder", "--root", ".", "--size", "0"), "--size must be 8 to 1024, got 0"),
        (("--source", "synthetic", "--size", "-3"), "--size must be 8 to 1024, got -3"),
        (("--source", "synthetic", "--train-count", "0"), "got 0 and"),
        (("--source", "synthetic", "--seed", "-1"), "--seed must be 0 or more, got -1"),
        (("--source", "synthetic", "--out", "file/below"), "--out file/below"),
        (("--source", "synthetic", "--out", "file"), "--out file"),
        (("--source", "folder", "--root", ".", "--seed", "3"), "--seed"),
        (("--color", "red"), "--color"),
        (("--quality", "90"), "--quality needs --encoding jpeg"),
        (("--encoding", "jpeg", "--quality", "0"), "--quality must be 1 to 100, got 0"),
        (("--source", "synthetic", "--skip-unreadable"), "--skip-unreadable needs --source folder"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_reported_in_one_line(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    before = names_in(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert printed.err.startswith("error: ") and words in printed.err
    assert names_in(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_error_names_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in refused("--source", "synthetic", "--out", "locked/set", cwd=tmp_path)


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        ("-v 1500000", "the memory limit of this shell, 1,536 MB, is too low; raise it with ulimit -v"),
        ("-f 4", "[Errno 27] File too large: 'set'"),  # raised while the images are read
        ("-f 1024", "[Errno 27] File too large: 'set'"),  # raised while FFCV writes the images
    ],
)
def test_a_limit_of_the_shell_gives_one_line_and_exit_status_1(
    limit: str, line: str, photos: Path, tmp_path: Path
) -> None:
    done = prepare("--source", "folder", "--root", photos, "--out", "set", cwd=tmp_path, limit=limit)
    assert (done.returncode, done.stderr) == (1, f"error: {line}\n")
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("number", "file"), [(signal.SIGTERM, ""), (signal.SIGINT, "/train.beton"), (signal.SIGHUP, "/train.beton")]
)
def test_an_interrupted_command_leaves_no_incomplete_files(number: int, file: str, tmp_path: Path) -> None:
    """The signal arrives while the command writes, which takes seconds with this number of images."""
    arguments = ("--source", "synthetic", "--train-count", "20000", "--size", "16", "--out", "set")
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup, SIGHUP would be ignored
    )
    wait_until(lambda: any((tmp_path / "set").glob(f".writing-*{file}")), "nothing is written", seconds=120, pause=0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    status = -number if number == signal.SIGINT else 128 + number  # Ctrl-C also ends a shell loop around the command
    assert process.returncode == status, stderr
    assert stderr == f"interrupted by {signal.Signals(number).name}: incomplete files were removed\n"
    assert names_in(tmp_path / "set") == set()


def test_help_shows_sources_and_examples(tmp_path: Path) -> None:
    done = prepare("--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("cifar100", "synthetic", "ROOT/train/CLASS", "examples:", "data/cifar10"):
        assert words in done.stdout


def test_each_source_has_its_own_default_folder() -> None:
    """If the sources shared a folder, synthetic images would overwrite CIFAR-10."""
    assert parse([]).out == Path("data/cifar10")
    assert parse([]).source == "cifar10"
    assert parse(["--source", "synthetic"]).out == Path("data/synthetic")


def test_abbreviated_flags_are_refused() -> None:
    with pytest.raises(InputError, match="--sour"):
        parse(["--sour", "synthetic"])


def test_decoder_warnings_take_one_line_and_evaluate_is_suggested_if_only_test_images_exist(tmp_path: Path) -> None:
    for number in range(7):
        save(tmp_path / "root" / "test" / "cat" / f"{number}.jpg", Image.new("RGB", (8, 8)), exif=BAD_EXIF)
    damaged_tiff(tmp_path / "root" / "test" / "cat" / "damaged.tif")
    done = prepare("--source", "folder", "--root", "root", "--out", "set", "--skip-unreadable", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("decoders ")]
    assert warning.startswith("decoders warned about 7 image files: root/test/cat/")
    assert " and 2 more; decoders printed 1 line about damaged data: " in warning
    assert "next: python -m ddp_trainer.evaluate RUN_DIR --data-dir set" in done.stdout
    assert names_in(tmp_path / "set") == {"test.beton", "dataset.json"}
