"""Damages checkpoints, FFCV's beton files and dataset.json, and reads them with the functions that the trainer uses."""

import contextlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.soak.outcome import Outcome

FILES = ("state.pt", "manifest.json")


def _truncated(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _zeroed(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    length = rng.randrange(1, len(content) - start + 1)
    if not any(content[start : start + length]):  # already zeros
        start, length = 0, len(content)
    content[start : start + length] = bytes(length)


def _bit_flipped(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _lengthened(content: bytearray, rng: random.Random) -> None:
    content.extend(rng.randbytes(rng.randrange(1, 100)))


def _replaced(content: bytearray, rng: random.Random) -> None:
    content[:] = rng.randbytes(len(content))


DAMAGES: dict[str, Callable[[bytearray, random.Random], None]] = {
    "truncated": _truncated,
    "emptied": lambda content, rng: content.clear(),
    "zeroed in part": _zeroed,
    "zeroed": lambda content, rng: content.__setitem__(slice(None), bytes(len(content))),
    "bit flipped": _bit_flipped,
    "lengthened": _lengthened,
    "replaced by noise": _replaced,
}


def harm(path: Path, damage: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    DAMAGES[damage](content, rng)
    path.write_bytes(content)


def damaged_checkpoints(real: Path, cases: int, rng: random.Random) -> Outcome:
    """Damages `cases` copies of the newest checkpoint in the folder `real`, which has at least two checkpoints."""
    from ddp_trainer.run.checkpoint import list_checkpoints, newest_good_checkpoint
    from ddp_trainer.run.resume import REQUIRED

    outcome = Outcome("newest checkpoint damaged", promise="detected and named; the previous checkpoint is used")
    newest, previous = list_checkpoints(real)[:2]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        shutil.copytree(previous, folder / previous.name)
        for number in range(cases):
            place = folder / newest.name
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(newest, place)
            file, damage = FILES[number % 2], list(DAMAGES)[number // 2 % len(DAMAGES)]
            harm(place / file, damage, rng)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                found = newest_good_checkpoint(folder, REQUIRED)
            good = found == folder / previous.name and newest.name in said.getvalue()
            outcome.count(good, f"{file} {damage}: {found}, {said.getvalue()!r}")
    return outcome


def damaged_datasets(real: Path, cases: int, rng: random.Random) -> Outcome:
    """Damages one file in each of `cases` copies of the dataset `real`.

    The trainer's checks must detect the damage, unless it only changes mean, std or names in dataset.json.
    """
    from data_prep.dataset import read_dataset, verify_dataset
    from data_prep.errors import InputError

    outcome = Outcome(
        "beton or dataset.json damaged",
        promise="refused with one line, unless only mean, std or names have changed",
    )
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(cases):
            name = ("train.beton", "test.beton", "dataset.json")[number % 3]
            damage = (*DAMAGES, "numbers edited", "removed")[number // 3 % (len(DAMAGES) + 2)]
            folder = Path(scratch) / "data"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(real, folder)
            _damage_data(folder / name, damage, rng)
            try:
                verify_dataset(folder, read_dataset(folder), full=True)
                said = "accepted"
            except InputError as error:
                said = str(error)
            except BaseException as error:
                said = f"crashed: {error!r}"
            harmless = name == "dataset.json" and said == "accepted" and _same_meaning(folder, real)
            outcome.count(harmless or (str(folder) in said and "\n" not in said), f"{name} {damage}: {said}")
    return outcome


def _damage_data(path: Path, damage: str, rng: random.Random) -> None:
    if damage == "removed":
        path.unlink()
    elif damage != "numbers edited":
        harm(path, damage, rng)
    elif path.suffix == ".json":
        _edit_manifest(path, rng)
    else:  # edits numbers in the header or near the end, where a wrong address could make FFCV crash
        before = path.read_bytes()
        content = bytearray(before)
        while content == before:  # the new number may equal the old one
            for _ in range(rng.randrange(1, 4)):
                start = rng.choice([rng.randrange(0, 24), rng.randrange(len(content) - 2000, len(content) - 8)])
                content[start : start + 8] = rng.choice([0, 2**31, 2**63, rng.getrandbits(64)]).to_bytes(8, "little")
        path.write_bytes(content)


def _edit_manifest(path: Path, rng: random.Random) -> None:
    fields = json.loads(path.read_text())
    section = rng.choice([fields, fields["splits"], fields["splits"]["train"], fields["splits"]["test"]])
    name = rng.choice(list(section))
    if rng.random() < 0.5:
        del section[name]
    else:
        section[name] = rng.choice([None, -1, 10**12, "", [], "../../etc/passwd"])
    path.write_text(json.dumps(fields))


def _same_meaning(folder: Path, real: Path) -> bool:
    """Returns whether the splits, the image size and the number of classes are unchanged."""
    from data_prep.dataset import read_dataset

    ours, theirs = read_dataset(folder), read_dataset(real)
    return (
        ours.splits == theirs.splits
        and ours.image_size == theirs.image_size
        and len(ours.classes) == len(theirs.classes)
    )
