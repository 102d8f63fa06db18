"""Handles a home directory that is not writable, as in some containers, so that libraries do not print warnings."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

# Environment variables that set where matplotlib, W&B and other libraries keep caches and settings. By default, these
# are in the home directory.
FOLDERS = ("MPLCONFIGDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME")


@contextlib.contextmanager
def writable_home() -> Iterator[None]:
    """Within the block, caches and settings are in a temporary folder if the home directory is not writable.

    If no temporary folder can be created, nothing changes.
    """
    with contextlib.ExitStack() as stack:
        # If the user has no home directory, `expanduser` returns "~".
        if not os.access(os.path.expanduser("~"), os.W_OK):
            with contextlib.suppress(OSError):
                temporary = tempfile.TemporaryDirectory(prefix="ddp-trainer-", ignore_cleanup_errors=True)
                folder = stack.enter_context(temporary)
                for name in FOLDERS:
                    os.environ.setdefault(name, folder)
        yield
