"""Reads CIFAR's pickles, which are dictionaries of arrays, lists, numbers and text.

An ordinary unpickler calls any function that a pickle names. This one calls only those that rebuild a NumPy array, and
rejects a pickle that names any other.
"""

import io
import pickle
import warnings
from typing import Any

import numpy as np

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1, which wrote the files
    ("numpy._core.multiarray", "_reconstruct"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not part of an array")
        if global_name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        return getattr(np, global_name)


def read_arrays(content: bytes) -> dict[str, Any]:
    """The dictionary in a pickle. Raises ValueError for anything else."""
    try:
        with warnings.catch_warnings():
            # The files were pickled by a NumPy of 2009, which passed a number where a boolean is expected today.
            warnings.simplefilter("ignore", category=np.exceptions.VisibleDeprecationWarning)
            found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can cause nearly any exception
        raise ValueError(f"not a pickle of arrays ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("not a pickled dictionary")
    return found
