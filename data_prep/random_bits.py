"""Random numbers as a function of (seed, epoch, sample, draw number): the same on any device and rank, in any batch.

The generator is counter-based: it applies the finalizer of splitmix64 (Steele, Lea & Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014; constants of Stafford's variant 13) to a key. The int64 arithmetic
overflows on purpose: in torch it wraps around, on the CPU and on CUDA.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
HALF = 1 << 31  # the highest of the 32 bits; flipping this bit inverts the result of `coin`


def _signed(value: int) -> int:
    """The int64 with the lower 64 bits of `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift; torch's `>>` is arithmetic and copies the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift(bits, 31)


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def random_bits(indices: Tensor, *, seed: int, epoch: int | Tensor, num_draws: int) -> Tensor:
    """indices (..., N) int64 -> (..., num_draws, N) int64 with 32 random bits each.

    `epoch` is one number for all samples, or a tensor (..., N) with one for each sample.
    """
    if isinstance(epoch, Tensor):
        key = _mix((epoch + 1) * _signed(_GOLDEN) + _signed(_mix_int(seed + _GOLDEN)))
    else:
        key = _signed(_mix_int(_mix_int(seed + _GOLDEN) + (epoch + 1) * _GOLDEN))
    per_sample = _mix(_mix(indices * _signed(_GOLDEN) + key))
    draws = torch.arange(1, num_draws + 1, device=indices.device)[:, None]
    return _shift(_mix(per_sample[..., None, :] + draws * _signed(_GOLDEN)), 32)


def uniform(bits: Tensor) -> Tensor:
    """32 random bits -> float32 in [0, 1), multiples of 2^-24."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def below(bits: Tensor, bound: int | Tensor) -> Tensor:
    """32 random bits -> int64 in [0, bound); the bias is negligible for bounds far below 2^32."""
    return (bits * bound) >> 32


def coin(bits: Tensor) -> Tensor:
    """32 random bits -> bool, True with probability 1/2."""
    return bits >= HALF
