"""Exceptions and warnings with one-line messages, and functions that make values safe to quote in a message."""

from __future__ import annotations  # ddp_trainer.doctor imports this module, and runs on older versions of Python, too

import reprlib
import shlex
import sys
import unicodedata
from pathlib import Path

CONTROL_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, line and paragraph separators
# Controls of the writing direction. They reorder the text around them, and so could disguise a command in a message.
REORDERING = set(map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
# These and the soft hyphen, zero-width space, word joiner and byte order mark. None of them is shown, so names that
# differ only in them look the same. Zero-width joiners are not included, because they can change how text looks.
INVISIBLE = REORDERING | set(map(chr, (0x00AD, 0x200B, 0x2060, 0xFEFF)))


class InputError(Exception):
    """The input is wrong. `str(error)` is one line: what is wrong, where, and the fix. Commands exit with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ExplainedError(RuntimeError):
    """An expected failure. Commands print `str(error)`, which is one line, and exit with status 1."""


def require(condition: bool, message: str) -> None:
    """Raises InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


def warn(message: str) -> None:
    """Prints a warning on stderr, as one line."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def require_printable(flag: str, path: Path | None) -> None:
    """Raises InputError for a path with unprintable characters: line breaks would break job scripts and logs.

    `flag`: name of the flag that sets the path, without the dashes. `path`: None if the flag is not given.
    """
    require(
        path is None or str(path).isprintable(),
        f"--{flag} must have no line breaks or other unprintable characters, got {str(path)!r}",
    )


def printable(text: str) -> str:
    r"""`text` on one line and safe for a terminal.

    Control characters, line separators, lone surrogates and characters that reorder text become escapes such as \x1b.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in CONTROL_CATEGORIES or char in REORDERING
        else char
        for char in text
    )


def visible(text: str) -> str:
    """`text` in Unicode form NFC, with invisible characters removed and words separated by single spaces.

    Names that differ only in such characters, spaces or forms look the same, and become equal.
    """
    return " ".join("".join(char for char in unicodedata.normalize("NFC", text) if char not in INVISIBLE).split())


def quoted(value: object, limit: int = 60) -> str:
    """The repr of `value`, for a message. `value` comes from a file, so it may be long.

    A string, or the repr of any other value, is cut after `limit` characters, and "..." follows.
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}..."
    text = reprlib.repr(value)  # reads only a few elements of a large list
    return text if len(text) <= limit else f"{text[:limit]}..."


def shell_path(path: object) -> str:
    """A path for use in a message, quoted so that it can be pasted into a shell."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # Bash, zsh and newer POSIX shells understand $'...'. Bytes are escaped, so the name need not be valid UTF-8.
    return "$'" + "".join(map(_in_dollar_quotes, text)) + "'"


def _in_dollar_quotes(char: str) -> str:
    if char in "'\\":
        return "\\" + char
    if char.isprintable():
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
