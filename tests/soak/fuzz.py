"""Mutates a beton file (FFCV's format) many times.

Each mutated file must be refused, or the original images must be read back. The mutations (see `beton_mutations`)
change the file's tables, its length, or the gaps around the images, but overwrite no pixels. Labels may be wrong,
because only the sha256 in dataset.json could reveal that, and it is not checked here. A child process reads the files,
so that crashes and hangs of FFCV can be counted. The same seed gives the same mutations.
"""

import multiprocessing
import os
import random
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from data_prep.beton import SAMPLE, SAMPLES_START
from tests.soak.beton_mutations import COUNT, FIRST_IMAGE, IMAGE_SIZE, MUTATIONS, NUM_CLASSES, Patch
from tests.soak.outcome import Outcome

HANG_SECONDS = 120.0


@dataclass
class FuzzResult:
    """Counts the mutated files that were refused, that were read back, and that made the reader crash or hang."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("refused", "same", "different"), 0))
    crashes: int = 0
    hangs: int = 0
    peak_mebibytes: int = 0
    stories: list[str] = field(default_factory=list)  # one for each failure

    @property
    def tried(self) -> int:
        return sum(self.counts.values()) + self.crashes + self.hangs


def fuzz_betons(folder: Path, cases: int, seed: int) -> FuzzResult:
    """Writes a beton file to `folder`. Tries `check_beton`, and then the loader, on `cases` mutations of the file."""
    original = write_original(folder)
    result, start = FuzzResult(), 0
    context = multiprocessing.get_context("spawn")
    while start < cases:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=read_mutants, args=(original, seed, range(start, cases), theirs), daemon=True)
        child.start()
        theirs.close()
        start = _collect(ours, start, cases, result)
        child.kill()
        child.join()
    return result


def _collect(messages: Connection, start: int, cases: int, result: FuzzResult) -> int:
    """Counts the results that a child process sends; returns the number of the next case to try."""
    for number in range(start, cases):
        if not messages.poll(HANG_SECONDS):
            result.hangs += 1
            result.stories.append(f"mutation {number} hangs")
            return number + 1
        try:
            outcome, story, mebibytes = messages.recv()
        except EOFError:
            result.crashes += 1
            result.stories.append(f"mutation {number} ends the child process")
            return number + 1
        result.counts[outcome] += 1
        result.peak_mebibytes = max(result.peak_mebibytes, mebibytes)
        if outcome == "different":
            result.stories.append(f"mutation {number}: {story}")
    return cases


def write_original(folder: Path) -> Path:
    from data_prep.sources.synthetic import draw_synthetic
    from tests.support.betons import write_splits

    drawn = draw_synthetic(train_count=COUNT, test_count=NUM_CLASSES, seed=5, size=IMAGE_SIZE)
    write_splits(folder, {"original": drawn.train})
    return folder / "original.beton"


def read_mutants(original: Path, seed: int, numbers: range, messages: Connection) -> None:
    """Runs in the child process: tries the mutations and sends one message for each."""
    import torch

    torch.set_num_threads(1)
    content = original.read_bytes()
    path = original.with_name(f"mutant-{os.getpid()}.beton")
    path.write_bytes(content)
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        kind = rng.choice(list(MUTATIONS))
        patches, length = MUTATIONS[kind](content, rng)
        _write(path, patches)
        os.truncate(path, length)
        try:
            outcome, story = _judge(path, original)
        except BaseException as error:
            outcome, story = "different", repr(error)
        _restore(path, patches, length, content)
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024  # MiB
        messages.send((outcome, f"{kind}: {story}", peak))
    messages.close()


def _judge(path: Path, original: Path) -> tuple[str, str]:
    from data_prep.beton import Expected, check_beton
    from data_prep.errors import InputError
    from data_prep.watched_file import DamagedImage

    try:
        check_beton(path, Expected(COUNT, IMAGE_SIZE, NUM_CLASSES))
    except InputError as error:
        if str(error).isprintable() and str(path) in str(error):
            return "refused", ""
        return "different", f"refused, but the message is not one line that names the file: {error!r}"
    try:
        images, labels = _read(path)
    except DamagedImage:  # the mutation has changed a stored checksum
        return "refused", ""
    wanted = np.fromfile(path, dtype=SAMPLE, count=COUNT, offset=SAMPLES_START)["label"]
    same = np.array_equal(images, _original_images(original)) and np.array_equal(labels, wanted)
    return ("same", "") if same else ("different", "accepted, and read back differently")


def _original_images(original: Path) -> np.ndarray:
    """Returns the images (N, H, W, 3), read without FFCV."""
    pixels = np.fromfile(original, dtype=np.uint8, count=COUNT * IMAGE_SIZE**2 * 3, offset=FIRST_IMAGE)
    return pixels.reshape(COUNT, IMAGE_SIZE, IMAGE_SIZE, 3)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from data_prep.loader import StreamLoader

    loader = StreamLoader(path, device=torch.device("cpu"), batch_size=COUNT, num_workers=1)
    (batch,) = loader.batches([np.arange(COUNT)])
    return batch.images.permute(0, 2, 3, 1).numpy(), batch.labels.numpy()


def _write(path: Path, patches: list[Patch]) -> None:
    with path.open("r+b") as file:
        for offset, new in patches:
            file.seek(offset)
            file.write(new)


def _restore(path: Path, patches: list[Patch], length: int, content: bytes) -> None:
    undo = [(offset, content[offset : offset + len(new)]) for offset, new in patches]
    _write(path, [*undo, (length, content[length:])])
    os.truncate(path, len(content))


def fuzzed_betons(folder: Path, cases: int, seed: int) -> Outcome:
    """Runs `fuzz_betons` and returns its row in the table of the soak tests."""
    result = fuzz_betons(folder, cases, seed)
    outcome = Outcome("beton mutated", promise="refused, or the same images are read back")
    outcome.tried, outcome.losses = result.tried, result.stories
    outcome.notes = {
        **result.counts,
        "crashes": result.crashes,
        "hangs": result.hangs,
        "MiB of peak memory": result.peak_mebibytes,
    }
    outcome.seconds = time.monotonic() - outcome.started
    return outcome
