"""Reads the file of an offline W&B run, and uses W&B's own message types to parse the records."""

import json
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7


def read_records(run_dir: Path) -> list[Any]:
    """Returns the records of the only W&B file below `run_dir`.

    The file has a header and then LevelDB's log format: blocks that contain pieces of records. Each piece has a header
    with checksum, length and type (1: whole record, 2: first, 3: middle, 4: last piece).
    """
    parse = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]
    (file,) = run_dir.rglob("*.wandb")
    data, place, whole, found = file.read_bytes(), FILE_HEADER, b"", []
    while place + HEADER <= len(data):
        left_in_block = BLOCK - place % BLOCK
        if left_in_block < HEADER:
            place += left_in_block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole = (b"" if kind in (1, 2) else whole) + data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            found.append(parse(whole))
    return found


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def value_of(item: Any) -> tuple[str, Any]:
    """Returns (name, value) of one logged item; the parts of a nested name are joined by dots."""
    return item.key or ".".join(item.nested_key), json.loads(item.value_json)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the logged rows, without W&B's own columns."""
    rows = [dict(map(value_of, row.item)) for row in of_kind(read_records(run_dir), "history")]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Returns the final summary."""
    found: dict[str, Any] = {}
    for change in of_kind(read_records(run_dir), "summary"):
        found |= dict(map(value_of, change.update))
    return found
