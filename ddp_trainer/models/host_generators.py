"""Keeps the states of the random generators on the host, from which a network may draw numbers in a trial pass."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class HostGenerators(NamedTuple):
    """The states of the default generators of torch (only the one for the CPU), Python and NumPy."""

    torch: Tensor
    python: Any
    numpy: Any

    @classmethod
    def read(cls) -> Self:
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True))

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def equals(self, other: "HostGenerators") -> bool:
        same_in_numpy = all(map(np.array_equal, self.numpy, other.numpy))
        return torch.equal(self.torch, other.torch) and self.python == other.python and same_in_numpy


@contextlib.contextmanager
def kept_host_generators() -> Iterator[None]:
    """When the block ends, the generators have the states that they had before."""
    before = HostGenerators.read()
    try:
        yield
    finally:
        before.restore()
