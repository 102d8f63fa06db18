"""Reads metrics.jsonl and steps.jsonl, which `metric_files` writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.json_fields import is_number

Record = dict[str, float]

LARGEST_FIGURE = 1e30  # values of this size or more are left out; float32 overflows at 3.4e38


def read_epochs(path: Path) -> tuple[Record, ...]:
    """One record per epoch, in order. If a crash cut off the last line, that line is left out."""
    records: dict[float, Record] = {}
    lines = _read_lines(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _parse_record(line)
        if record is not None and 1 <= record.get("epoch", 0) <= 1e9:
            records[record["epoch"]] = record
        elif number < len(lines):  # a newline ends this line, so no crash cut it off
            raise InputError(f"{path}, line {number}: not the JSON record of an epoch; remove the line")
    return tuple(records[epoch] for epoch in sorted(records))


def read_steps(path: Path) -> tuple[Record, ...]:
    """Records of steps, in order. They only refine the curves, so a line that is not a record is left out."""
    records = [record for line in _read_lines(path) if (record := _parse_record(line))]
    return tuple(sorted((record for record in records if "step" in record), key=lambda record: record["step"]))


def columns(records: Sequence[Record], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The figures `x` and `y` of all records that have both."""
    points = [(record[x], record[y]) for record in records if x in record and y in record]
    table = np.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _read_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; remove it")
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _parse_record(line: str) -> Record | None:
    """The figures of one line, without values that are too large or not finite; None if it is not a JSON object."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return {name: float(value) for name, value in fields.items() if is_number(value) and abs(value) < LARGEST_FIGURE}
