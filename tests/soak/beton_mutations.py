"""Mutations of the tables, the gaps and the length of a beton file (FFCV's format). `fuzz` loads each mutated file."""

import random
from collections.abc import Callable, Iterator

import numpy as np

from data_prep.beton import ALLOCATION, FIELD, FIELDS, HEADER, PAGE_SIZE, SAMPLE, SAMPLES_START

COUNT, IMAGE_SIZE, NUM_CLASSES = 40, 16, 10  # of the original file
SAMPLES_END = SAMPLES_START + COUNT * SAMPLE.itemsize
FIRST_IMAGE = -(-SAMPLES_END // PAGE_SIZE) * PAGE_SIZE
Patch = tuple[int, bytes]  # offset, new bytes
Mutation = tuple[list[Patch], int]  # patches, and the new length
TABLES = {  # name -> (type, number of rows, function that computes the table's offset from the file's length)
    "header": (HEADER, 1, lambda length: 0),
    "fields": (FIELD, len(FIELDS), lambda length: HEADER.itemsize),
    "samples": (SAMPLE, COUNT, lambda length: SAMPLES_START),
    "allocations": (ALLOCATION, COUNT, lambda length: length - COUNT * ALLOCATION.itemsize),
}


def _numbers(dtype: np.dtype, offset: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, size) of each number in a row of a table. The first 8 bytes of an array count as one number."""
    for name in dtype.names or ():
        kind, inner = dtype[name], offset + dtype.fields[name][1]  # type: ignore[index]
        if kind.names:
            yield from _numbers(kind, inner)
        else:
            yield inner, min(kind.itemsize, 8)


def _two_rows(content: bytes, rng: random.Random) -> tuple[int, int, np.dtype]:
    """Offsets of two random rows of one table (possibly the same row), and their type."""
    dtype, rows, start = rng.choice(list(TABLES.values()))
    one, other = (start(len(content)) + rng.randrange(rows) * dtype.itemsize for _ in range(2))
    return one, other, dtype


def _edit_number(content: bytes, rng: random.Random) -> Mutation:
    row, _, dtype = _two_rows(content, rng)
    offset, size = rng.choice(list(_numbers(dtype)))
    old = int.from_bytes(content[row + offset : row + offset + size], "little")
    steps = [1, -1, IMAGE_SIZE, SAMPLE.itemsize, IMAGE_SIZE**2 * 3, -(IMAGE_SIZE**2) * 3, PAGE_SIZE, -PAGE_SIZE]
    values = [0, 1, 2, 255, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(content), *(old + step for step in steps)]
    value = rng.choice([*values, rng.getrandbits(64)]) % 256**size
    return [(row + offset, value.to_bytes(size, "little"))], len(content)


def _flip_bit(content: bytes, rng: random.Random) -> Mutation:
    row, _, dtype = _two_rows(content, rng)
    offset = row + rng.randrange(dtype.itemsize)
    return [(offset, bytes([content[offset] ^ 1 << rng.randrange(8)]))], len(content)


def _random_bytes(content: bytes, rng: random.Random) -> Mutation:
    row, _, dtype = _two_rows(content, rng)
    offset = row + rng.randrange(dtype.itemsize)
    return [(offset, rng.randbytes(min(rng.randrange(1, 64), len(content) - offset)))], len(content)


def _swap_rows(content: bytes, rng: random.Random) -> Mutation:
    one, other, dtype = _two_rows(content, rng)
    size = dtype.itemsize
    return [(one, content[other : other + size]), (other, content[one : one + size])], len(content)


def _copy_row(content: bytes, rng: random.Random) -> Mutation:
    one, other, dtype = _two_rows(content, rng)
    return [(one, content[other : other + dtype.itemsize])], len(content)


def _move_addresses(content: bytes, rng: random.Random) -> Mutation:
    """Changes the image addresses in samples and allocations: shifts them, permutes them or makes them equal."""
    samples = np.frombuffer(content, SAMPLE, COUNT, SAMPLES_START).copy()
    table_at = len(content) - COUNT * ALLOCATION.itemsize
    table = np.frombuffer(content, ALLOCATION, COUNT, table_at).copy()
    addresses = table["ptr"].copy()
    kind = rng.randrange(3)
    if kind == 0:
        addresses += np.uint64(rng.choice([1, IMAGE_SIZE, PAGE_SIZE, 2**40, 2**64 - PAGE_SIZE]))
    elif kind == 1:
        addresses[:] = rng.choice([0, int(addresses[0]), len(content), 2**64 - 1])
    else:
        addresses = addresses[rng.sample(range(COUNT), COUNT)]
    samples["image"]["ptr"] = table["ptr"] = addresses
    return [(SAMPLES_START, samples.tobytes()), (table_at, table.tobytes())], len(content)


def _change_length(content: bytes, rng: random.Random) -> Mutation:
    """Truncates or lengthens the file. Half of the time, also sets the header's number of samples."""
    table_at, rows = len(content) - COUNT * ALLOCATION.itemsize, rng.randrange(0, 2 * COUNT)
    length = rng.choice([rng.randrange(len(content)), table_at + rows * ALLOCATION.itemsize, SAMPLES_START, 0])
    header = np.frombuffer(content, HEADER, 1).copy()
    header["num_samples"] = rng.choice([rows, COUNT])
    return [(0, header.tobytes())] if rng.random() < 0.5 else [], length


def _fill_gap(content: bytes, rng: random.Random) -> Mutation:
    """Writes one nonzero byte into the gap before or after the images."""
    last = FIRST_IMAGE + COUNT * IMAGE_SIZE**2 * 3
    end = len(content) - COUNT * ALLOCATION.itemsize
    start, stop = rng.choice([(SAMPLES_END, FIRST_IMAGE), (last, end)])
    return [(rng.randrange(start, stop), bytes([rng.randrange(1, 256)]))], len(content)


MUTATIONS: dict[str, Callable[[bytes, random.Random], Mutation]] = {
    "a number edited": _edit_number,
    "a bit flipped": _flip_bit,
    "random bytes": _random_bytes,
    "rows swapped": _swap_rows,
    "a row copied": _copy_row,
    "addresses moved": _move_addresses,
    "length changed": _change_length,
    "a gap filled": _fill_gap,
}
