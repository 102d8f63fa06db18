"""Handles a home directory that is not writable, as in some containers, so that libraries do not print warnings."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Environment variables that set where matplotlib, W&B and other libraries keep caches and settings. By default, these
# are in the home directory.
FOLDERS = ("MPLCONFIGDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME")


@contextlib.contextmanager
def writable_home() -> Iterator[None]:
    """Within the block, caches and settings are in a temporary folder if the home directory is not writable."""
    if os.access(Path("~").expanduser(), os.W_OK):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ddp-trainer-", ignore_cleanup_errors=True) as folder:
        for name in FOLDERS:
            os.environ.setdefault(name, folder)
        yield
