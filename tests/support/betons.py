"""Writes beton files from arrays, without the rest of a dataset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.beton_writer import write_betons
from data_prep.sources import Split
from data_prep.spool import open_spool


def write_splits(folder: Path, splits: Mapping[str, Split], **options: Any) -> None:
    """Writes NAME.beton in `folder` for each split, as `write_dataset` does."""
    for name, split in splits.items():
        with open_spool(folder, name) as spool:
            spool.add(split)
    write_betons(folder, list(splits), **options)
