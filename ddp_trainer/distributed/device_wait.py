"""Waits for the GPU with a time limit, because the GPU itself may be waiting for a process that has died."""

import math
import time
from typing import Protocol

PAUSE_SECONDS = 5e-5


class Event(Protocol):
    """A `torch.cuda.Event` that has been recorded."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


def wait_for(event: Event, *, seconds: float = math.inf) -> None:
    """Returns when the device has reached `event`. Raises TimeoutError after `seconds`.

    NCCL's watchdog does not see collectives inside a CUDA graph, so without a time limit, this process would wait
    forever for another one that has died.
    """
    if seconds == math.inf:
        event.synchronize()
        return
    deadline = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the GPU did not finish a step within {seconds:.0f} s; another process may have died")
        time.sleep(PAUSE_SECONDS)
