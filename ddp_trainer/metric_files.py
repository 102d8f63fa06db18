"""The records of a run as files: JSON lines, and TensorBoard's event files. When to write them is decided elsewhere."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp_trainer.rundir import replace_file

Record = Mapping[str, float | int]


class JsonLines:
    """metrics.jsonl: one object per epoch, each line on its way to the disk before training goes on."""

    def __init__(self, path: Path, history: Sequence[Record]) -> None:
        replace_file(path, "".join(json.dumps(dict(record)) + "\n" for record in history).encode())
        self._file = path.open("a")

    def log_epoch(self, record: Record) -> None:
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardMirror:
    """Event files in RUN/tensorboard/, written anew on resume."""

    def __init__(self, run_dir: Path, history: Sequence[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        for record in history:
            self.log_epoch(record)

    def log_epoch(self, record: Record) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, global_step=int(record["step"]))
        self._writer.flush()

    def finish(self, summary: Mapping[str, object] | None, *, failed: bool) -> None:
        self._writer.close()
