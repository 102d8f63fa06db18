"""The exception for wrong input, and the wording of what it quotes."""

import shlex


class InputError(Exception):
    """The input is wrong. `str(error)` is one line: what is wrong, where, and the fix. Commands exit with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def require(condition: bool, message: str) -> None:
    """Raises InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


def printable(text: str) -> str:
    """`text` in one line, with line breaks, terminal escapes and other control characters as `\\n`, `\\x1b`, ..."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def quoted(value: object, limit: int = 60) -> str:
    """`value`, which comes from a file, for use in a message: like `repr`, at most `limit` characters long."""
    if isinstance(value, (dict, list)):
        return f"a {'JSON object' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, str) and len(value) > limit:
        value = value[:limit]
        return f"{value!r}..."
    if isinstance(value, int) and abs(value) >= 10**limit:
        return f"a number of more than {limit} digits"
    return repr(value)


def shell_path(path: object) -> str:
    """A path for use in a message, quoted so that it can be pasted into a shell."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # Bash, zsh and newer POSIX shells read $'...'. The bytes are written out, so the name need not be valid UTF-8.
    return "$'" + "".join(map(_in_dollar_quotes, text)) + "'"


def _in_dollar_quotes(letter: str) -> str:
    if letter in "'\\":
        return "\\" + letter
    if letter.isprintable():
        return letter
    return "".join(f"\\x{byte:02x}" for byte in letter.encode(errors="surrogateescape"))
