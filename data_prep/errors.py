"""The one exception for what the user gave, and the check that raises it."""


class InputError(Exception):
    """The input is wrong. `str(error)` is one line: what, where, how to mend it. Commands print it and exit 2."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)
