"""Writes files atomically. Reads untrusted JSON, with limits on its size and nesting."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, require, shell_path

MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 32
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # errors of file systems that cannot sync a folder or a file


def replace_file(path: Path, content: bytes) -> None:
    """Replaces `path` atomically and flushes it to the disk.

    A reader sees either the old file or the new one. A symbolic link at `path` is replaced, not followed. Raises
    OSError; if the disk is full, the message says how many bytes are needed and how many are free.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            sync_handle(file.fileno(), path)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise _disk_full(path, len(content), error) from None
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    sync(path.parent)


def _disk_full(path: Path, needed: int, error: OSError) -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(error.errno, f"{error.strerror}: {needed:,} bytes are needed, {free:,} are free", str(path))


def sync(path: Path) -> None:
    """Flushes a file's content, or the entries of a folder, to the disk: see `sync_handle`."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_handle(handle, path)
    finally:
        os.close(handle)


def sync_handle(handle: int, path: Path) -> None:
    """Flushes an open file or folder to the disk, if its file system supports that.

    Raises OSError with `path` if flushing fails.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            error.filename = str(path)
            raise


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file. Raises OSError for anything else: reading a pipe may block, and a device may never end."""
    # The path is checked twice: before it is opened, because opening a device can have side effects; and afterwards,
    # because the file may have been replaced. O_NONBLOCK: if a pipe has replaced it, opening must not block.
    _require_regular(os.stat(path), path)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _require_regular(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def require_readable(path: Path) -> None:
    """Raises InputError if this user has no permission to read a file or folder. Accepts a path that does not exist."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        is_readable = os.access(path, os.R_OK | os.X_OK if is_folder else os.R_OK)
    except PermissionError:
        is_readable = False
    except (OSError, ValueError):
        return
    fix = "change its permissions or those of the folders above it"
    require(is_readable, f"{shell_path(path)} cannot be read: permission denied; {fix}")


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Decodes a regular file as UTF-8. Raises OSError for anything else, such as a pipe. `errors`: see bytes.decode."""
    with open_regular(path) as file:
        return file.read().decode(errors=errors)


def _require_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file. Raises InputError for anything else."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        _check_values(content)
    except FileNotFoundError:
        return None
    except RecursionError:
        raise InputError(f"{path} cannot be read: nested too deeply") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return content


def _check_values(content: dict[str, Any]) -> None:
    """Raises ValueError for nesting beyond the limit, and for text that cannot be encoded as UTF-8."""
    level: list[Any] = [content]
    for _ in range(MAX_JSON_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii():
                value.encode()  # half of a surrogate pair raises UnicodeEncodeError, a kind of ValueError
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")
