"""Child process of `beton_writer.write_betons`: writes `folder`/NAME.beton for each split, and prints its progress.

FFCV's DatasetWriter waits forever if its worker process raises, and a killed writer leaves that worker running. Here
the worker is a thread: it ends when this process ends, and an exception in it ends this process.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from data_prep.beton import IMAGE_MODES
from data_prep.ffcv_import import import_ffcv
from data_prep.parent import end_with_parent
from data_prep.spool import Spooled


class _WorkerThread(threading.Thread):
    """Replaces multiprocessing.Process in FFCV's writer."""

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        super().__init__(target=target, args=args, daemon=True)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            print(f"! {type(error).__name__}: {error}", flush=True)
            os._exit(1)


class _Samples(Spooled):
    """The samples of a split. Prints the progress at the last sample, after each percent, and at least every second."""

    _printed_at = 0.0

    def __getitem__(self, position: int) -> tuple[np.ndarray, int, int, int]:
        done, total = position + 1, len(self)
        if done == total or done % max(total // 100, 1) == 0 or time.monotonic() - self._printed_at > 1:
            self._printed_at = time.monotonic()
            print(done, total, self.name, flush=True)
        return super().__getitem__(position)


class _Memory:
    """Replaces SharedMemory in FFCV's writer: threads share memory anyway, and /dev/shm is small in containers."""

    def __init__(self, create: bool, size: int) -> None:
        self.buf = bytearray(size)

    def close(self) -> None: ...

    def unlink(self) -> None: ...


def _write_stored(shape: Sequence[int], mode: int, destination: Any, stored: np.ndarray, malloc: Any) -> None:
    """Replaces FFCV's `RGBImageField.encode`, because the images have been encoded already, in parallel."""
    destination["mode"], (destination["height"], destination["width"]) = mode, shape[:2]
    destination["data_ptr"], storage = malloc(stored.nbytes)
    storage[:] = stored


def main(folder: Path, names: list[str]) -> None:
    end_with_parent(signal.SIGKILL)
    import_ffcv()
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    ffcv.writer.Process = _WorkerThread  # type: ignore[attr-defined]
    ffcv.writer.shared_memory = SimpleNamespace(SharedMemory=_Memory)  # type: ignore[attr-defined]
    ffcv.writer.tqdm = _Silent  # type: ignore[attr-defined]
    for name in names:
        samples = _Samples(folder, name)
        image = RGBImageField(write_mode="raw")
        write_stored = partial(_write_stored, samples.shape, IMAGE_MODES[samples.encoding])
        image.encode = write_stored  # type: ignore[method-assign]
        fields = {"image": image, "label": IntField(), "index": IntField(), "checksum": IntField()}
        # Only one worker: several would write FFCV's pages in varying order, so the file would not be reproducible.
        writer = ffcv.writer.DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=1)
        writer.from_indexed_dataset(samples)


class _Silent:
    """A progress bar that shows nothing; the parent process has its own."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def update(self, *_: Any) -> None: ...

    def close(self) -> None: ...


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
