"""Reports faults in C code, such as a bus error when a file shrinks while it is read."""

import contextlib
import faulthandler
from collections.abc import Iterator


@contextlib.contextmanager
def reported_faults() -> Iterator[None]:
    """Within the block, a fault that ends the process prints a Python traceback."""
    was_enabled = faulthandler.is_enabled()
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # for example, if stderr is not a file
        faulthandler.enable()
    try:
        yield
    finally:
        if not was_enabled:
            faulthandler.disable()
