"""The one exception for what the user gave."""


class InputError(Exception):
    """The input is wrong. `str(error)` is one line: what, where, how to mend it. Commands print it and exit 2."""
