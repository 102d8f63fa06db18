"""A prepared dataset: a folder with train.beton, test.beton and dataset.json, which describes them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.beton import check_beton, tables_sha256
from data_prep.beton_writer import write_betons
from data_prep.color_statistics import ColorCounts
from data_prep.encoding import RAW, Encoding
from data_prep.errors import InputError, quoted, shell_path
from data_prep.files import file_sha256, read_json, require_readable, sync
from data_prep.machine_limits import require_space
from data_prep.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    DatasetInfo,
    SplitInfo,
    check_description,
    parse_manifest,
)
from data_prep.output import BETONS, check_out, files_locked, remove_left_behind, temporary_folder
from data_prep.parallel import map_in_order, num_threads
from data_prep.sources import SOURCES, Findings, Source, Split, name_some
from data_prep.spool import open_spool

HASHED_BYTES = 2**29  # files up to this size are hashed at every start, which takes about a second
TYPICAL_COMPRESSION = 6  # raw size of a photograph, divided by its size as a JPEG of quality 90

Progress = Callable[[str, int, int], object]  # "reading" or "writing", number of images done, total


def write_dataset(
    source: Source,
    out: Path,
    *,
    progress: Progress = lambda work, done, total: None,
    say: Callable[[str], object] = lambda note: None,
    encoding: Encoding = RAW,
) -> DatasetInfo:
    """Writes the files of a dataset to `out`. They get their final names only when all are complete and checked.

    The images are read once, a few at a time. Then `say` is called with each of the source's notes. An older dataset in
    `out` stays intact until the end. Raises InputError if `check_out` refuses `out` or its disk has too little free
    space, and ValueError or TypeError if the source provides invalid data. Errors of the source are not caught.
    """
    check_description(source)
    check_out(out)
    with files_locked(out):
        if not os.path.lexists(out / MANIFEST):  # only a part of an earlier dataset was moved, so it cannot be read
            for name in BETONS:
                (out / name).unlink(missing_ok=True)
    remove_left_behind(out)  # this may free the space that is needed
    image_bytes = source.image_size**2 * 3 // (1 if encoding.name == "raw" else TYPICAL_COMPRESSION)
    # During writing, the images are on the disk twice: in the writer's input and in the beton file.
    require_space(out, 2 * sum(map(source.count, SPLITS)) * image_bytes + 2**24)
    with temporary_folder(out) as temporary:
        counts, colors, labels = _spool(source, temporary, encoding, progress)
        findings = source.findings()
        absent = [name for label, name in enumerate(source.classes) if label not in labels]
        if absent and "train" in counts:
            raise ValueError(f"no training images for {name_some(absent)}; add some, or leave out these classes")
        for note in findings.notes:
            say(note)
        _write_betons(temporary, counts, progress)
        splits = {name: _describe_split(temporary / f"{name}.beton", count) for name, count in counts.items()}
        info = _describe(source, splits, encoding, colors, findings)
        parse_manifest(json.loads(json.dumps(info.to_dict())))  # raises an exception if `read_dataset` would refuse it
        for split in splits.values():
            check_beton(temporary / split.file, info.expected(split))
        (temporary / MANIFEST).write_text(json.dumps(info.to_dict(), indent=2) + "\n")
        names = (*(split.file for split in splits.values()), MANIFEST)
        for name in names:  # syncing is slow, so it comes first, while the older dataset is still intact
            sync(temporary / name)
        with ThreadPoolExecutor(1) as pool:  # a signal handler interrupts only the main thread, not this one
            pool.submit(int).result()  # starts the thread; a signal during the start could leave it out of the wait
            pool.submit(_move, temporary, out, names).result()
        sync(out)
    return info


def _move(temporary: Path, out: Path, names: Sequence[str]) -> None:
    """Replaces the dataset in `out` with the files `names` of `temporary`. The last of them must be the manifest."""
    with files_locked(out):
        # The old manifest is deleted before new files are moved, so that no reader can combine it with new images.
        (out / MANIFEST).unlink(missing_ok=True)
        for name in set(BETONS) - set(names):  # splits that only the older dataset has
            (out / name).unlink(missing_ok=True)
        for name in names:
            (temporary / name).replace(out / name)


def _spool(
    source: Source, folder: Path, encoding: Encoding, progress: Progress
) -> tuple[dict[str, int], ColorCounts, set[int]]:
    """Reads all images and keeps them, encoded, in temporary files in `folder` (see `spool`).

    Returns the number of images in each split, and the color counts and the labels of the first split.
    """
    total, counts, colors, labels = sum(map(source.count, SPLITS)), {}, ColorCounts(), set[int]()
    names = [name for name in SPLITS if source.count(name)]

    def encode(chunk: Split) -> tuple[Split, list[bytes]]:
        return chunk, [encoding.encode(image) for image in chunk.images]

    for name in names:
        with (
            open_spool(folder, name, encoding.name, side=source.image_size, num_classes=len(source.classes)) as spool,
            closing(source.chunks(name)) as chunks,
            closing(map_in_order(encode, chunks, threads=num_threads())) as encoded,
        ):
            for chunk, stored in encoded:
                spool.add(chunk, stored)
                if name == names[0]:
                    colors.add(chunk.images)
                    labels.update(chunk.labels.tolist())
                progress("reading", sum(counts.values()) + spool.count, total)
        counts[name] = spool.count
    return counts, colors, labels


def _write_betons(folder: Path, counts: Mapping[str, int], progress: Progress) -> None:
    written: dict[str, int] = {}

    def show(name: str, count: int) -> None:
        written[name] = count
        progress("writing", sum(written.values()), sum(counts.values()))

    write_betons(folder, list(counts), progress=show)


def _describe_split(path: Path, count: int) -> SplitInfo:
    return SplitInfo(
        file=path.name,
        count=count,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        tables_sha256=tables_sha256(path),
    )


def _describe(
    source: Source, splits: Mapping[str, SplitInfo], encoding: Encoding, colors: ColorCounts, findings: Findings
) -> DatasetInfo:
    mean, std = colors.mean_and_std()
    return DatasetInfo(
        format_version=FORMAT_VERSION,
        source=source.source,
        classes=source.classes,
        image_size=source.image_size,
        channels=3,
        encoding=encoding.name,
        quality=encoding.quality,
        splits=splits,
        mean=mean,
        std=std,
        ffcv_version=metadata.version("ffcv"),
        skipped=findings.skipped,
    )


def read_dataset(directory: Path, *, needed: Sequence[str] = SPLITS) -> DatasetInfo:
    """The description of a prepared dataset.

    Raises InputError if there is none, if this code cannot read it, or if it lacks a split in `needed`.
    """
    path, prepare = directory / MANIFEST, preparation(directory, {})
    require_readable(path)
    try:
        fields = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; prepare the data again: {prepare}") from None
    if fields is None:
        raise InputError(f"{directory} contains no prepared dataset; make one: {prepare}")
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        problem = f"has format version {quoted(version)}, not {FORMAT_VERSION}"
        raise InputError(f"{path} {problem}; prepare the data again: {prepare}")
    try:
        info = parse_manifest(fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be used: {error}; prepare the data again: {prepare}") from None
    if not info.splits.keys() >= set(needed):
        raise InputError(
            f"{directory} has no training images, so it can only be used for evaluation; prepare "
            f"FOLDER/train together with FOLDER/test: {preparation(directory, asdict(info))}"
        )
    return info


def preparation(directory: Path, dataset: Mapping[str, Any]) -> str:
    """The command that prepares a dataset again. `dataset`: the fields of its dataset.json.

    If `dataset` is empty, the source is guessed from the folder's name. The seed of synthetic images is not recorded,
    so the command uses the default seed.
    """
    source = dataset.get("source") or directory.name
    source = source if source in SOURCES else "SOURCE"
    words = ["python", "-m", "data_prep", "--source", source, "--out", str(directory)]
    if source == "folder":
        words += ["--root", "FOLDER", *(["--skip-unreadable"] if dataset.get("skipped") else [])]
    if source in ("folder", "synthetic") and "image_size" in dataset:
        words += ["--size", str(dataset["image_size"])]
    if dataset.get("encoding") == "jpeg":
        words += ["--encoding", "jpeg", "--quality", str(dataset["quality"])]
    if source == "synthetic":
        for name, split in dataset.get("splits", {}).items():
            words += [f"--{name}-count", str(split.get("count"))]
    return " ".join(map(shell_path, words))


def verify_dataset(directory: Path, info: DatasetInfo, *, full: bool) -> None:
    """Raises InputError unless all beton files are complete and match dataset.json.

    The structure, the labels and the stored checksums of the images are always verified; this reads no pixels. If
    `full`, or if a file has at most HASHED_BYTES, the whole file is hashed as well. In any case, each image is compared
    with its checksum when it is read, so a damaged image is never trained on.
    """
    for split in info.splits.values():
        require_readable(directory / split.file)
    try:
        for split in info.splits.values():
            path = directory / split.file
            check_beton(path, info.expected(split))
            if path.stat().st_size != split.bytes or tables_sha256(path) != split.tables_sha256:
                raise InputError(f"{path} is damaged (its tables differ from {MANIFEST}); prepare the data again")
            if (full or split.bytes <= HASHED_BYTES) and file_sha256(path) != split.sha256:
                raise InputError(f"{path} is damaged (sha256 differs from {MANIFEST}); prepare the data again")
    except InputError as error:
        raise InputError(f"{error}: {preparation(directory, asdict(info))}") from None
