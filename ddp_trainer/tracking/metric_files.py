"""The records of a run as files: JSON lines, and TensorBoard's event files. When to write them is decided elsewhere."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.files import replace_file

Record = Mapping[str, float | int | str]


class JsonLines:
    """A file with one JSON object per line; each line is handed to the system before training continues."""

    def __init__(self, path: Path, records: Sequence[Record]) -> None:
        """Starts the file with `records`, in place of what it held."""
        replace_file(path, "".join(json.dumps(dict(record)) + "\n" for record in records).encode())
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_step_records(path: Path, *, last_step: int) -> list[Record]:
    """Records of steps.jsonl up to `last_step`: what a run that is resumed there keeps."""
    return [record for record in _readable(path) if isinstance(record["step"], int) and record["step"] <= last_step]


def _readable(path: Path) -> Iterator[Record]:
    """JSON objects with a step. A line that was cut short by a kill is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "step" in record:
            yield record


class TensorBoardMirror:
    """Event files in RUN/tensorboard/, rewritten on resume."""

    def __init__(self, run_dir: Path, steps: Sequence[Record], history: Sequence[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        for record in steps:
            self.log_step(record)
        for record in history:
            self.log_epoch(record)

    def log_step(self, record: Record) -> None:
        self._add(record, prefix="step/")

    def log_epoch(self, record: Record) -> None:
        self._add(record, prefix="")
        self._writer.flush()

    def _add(self, record: Record, *, prefix: str) -> None:
        for name, value in record.items():
            if not isinstance(value, str):
                self._writer.add_scalar(prefix + name, value, global_step=int(record["step"]))

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None:
        self._writer.close()
