"""Faults of C code, such as a bus error where a file shrinks while it is read."""

import contextlib
import faulthandler
from collections.abc import Iterator


@contextlib.contextmanager
def reported_faults() -> Iterator[None]:
    """Within the block, a fault that ends the process prints the line of Python it happened in."""
    was_enabled = faulthandler.is_enabled()
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # stderr may not be a file
        faulthandler.enable()
    try:
        yield
    finally:
        if not was_enabled:
            faulthandler.disable()
