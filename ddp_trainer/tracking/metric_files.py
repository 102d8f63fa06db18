"""The records of a run as files: JSON lines, and TensorBoard's event files. Other modules decide when to write them."""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from data_prep.errors import InputError
from data_prep.files import read_text, replace_file

Record = Mapping[str, float | int | str]


class Log(Protocol):
    """A destination for the records of a run."""

    def log_step(self, record: Record) -> None: ...

    def log_epoch(self, record: Record) -> None: ...


class JsonLines:
    """A file with one JSON object per line. Each line is flushed to the file before training continues.

    If a line cannot be written, for example because the disk is full, `write` raises OSError with the name of the file.
    """

    def __init__(self, path: Path, records: Sequence[Record]) -> None:
        """Replaces the content of the file with `records`."""
        replace_file(path, "".join(map(_as_line, records)).encode())
        self.path = path
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        try:
            self._file.write(_as_line(record))
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has already raised OSError for any unwritten line
            self._file.close()


def _as_line(record: Record) -> str:
    """The record as a line of JSON. JSON has no NaN, so numbers that are not finite are left out."""
    kept = {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps(kept) + "\n"


def read_records(path: Path, *, last_step: int) -> list[Record]:
    """The records in `path` up to `last_step`: those that a run keeps when it resumes after that step.

    If there is no such file, or it is not a regular file, there are no records. Raises InputError if it cannot be read.
    """
    return [record for record in _readable(path) if int(record["step"]) <= last_step]


def replay(log: Log, steps: Sequence[Record], epochs: Sequence[Record]) -> None:
    """Logs the records in the order in which a run logs them: an epoch comes after its last step."""
    calls = [(record, log.log_step) for record in steps] + [(record, log.log_epoch) for record in epochs]
    for record, log_record in sorted(calls, key=lambda call: int(call[0]["step"])):
        log_record(record)


def _readable(path: Path) -> Iterator[Record]:
    """JSON objects with a step number. A line that was cut off because the run was killed is left out."""
    try:
        lines = read_text(path, errors="replace").splitlines()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # there is no file, or it is a pipe or a device
            return
        raise InputError(
            f"{path} cannot be read ({error.strerror}); make it readable, or choose another --out"
        ) from None
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


class TensorBoardMirror:
    """Writes event files to RUN/tensorboard/. A resumed run rewrites them from the start."""

    def __init__(self, run_dir: Path, steps: Sequence[Record], epochs: Sequence[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        replay(self, steps, epochs)

    def log_step(self, record: Record) -> None:
        self._add(record, prefix="step/")

    def log_epoch(self, record: Record) -> None:
        self._add(record, prefix="")
        self._writer.flush()

    def _add(self, record: Record, *, prefix: str) -> None:
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                self._writer.add_scalar(prefix + name, value, global_step=int(record["step"]))

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None:
        self._writer.close()

    def abandon(self) -> None:
        pass
