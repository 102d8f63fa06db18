"""CIFAR-10 and CIFAR-100 through torchvision: the files are fetched, and proved genuine before anything is unpickled.

A pickle can run any code, so neither the archive nor the files from it are opened before their md5 sums are those that
torchvision lists.
"""

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.errors import InputError
from data_prep.sources import ImageSet, Split

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

TIMEOUT_SECONDS = 20.0  # of silence from the server
CHUNK_BYTES = 2**18

Progress = Callable[[int, int], object]  # bytes loaded so far, bytes there are (0: unknown)


def load_cifar(
    source: Literal["cifar10", "cifar100"], root: Path, *, progress: Progress = lambda done, total: None
) -> ImageSet:
    """The dataset in torchvision's order, which mixes the classes; CIFAR-100 with its 100 fine ones.

    Taken from the extracted files in `root`, else from the archive there, else downloaded. Raises InputError for files
    that are not the genuine ones, and where there is neither file nor network.
    """
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source]
    if not _has_files(kind, root):
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--root {root}: cannot be made ({error.strerror}); name another folder") from None
        archive = root / kind.filename
        if not archive.exists():
            _download(kind, root, progress)
        _check_md5(archive, kind.tgz_md5)
        _extract(kind, root)
    with warnings.catch_warnings():
        # The files were pickled by a NumPy of 2009, which passed a number where today's wants a boolean.
        warnings.simplefilter("ignore", category=np.exceptions.VisibleDeprecationWarning)
        train, test = (kind(root, train=is_train) for is_train in (True, False))
    return ImageSet(source=source, classes=tuple(train.classes), train=_to_split(train), test=_to_split(test))


def _to_split(dataset: "CIFAR10") -> Split:
    return Split(np.ascontiguousarray(dataset.data, dtype=np.uint8), np.array(dataset.targets, dtype=np.int64))


def _checksums(kind: type["CIFAR10"]) -> dict[str, str]:
    """md5 of each file that will be unpickled."""
    lists = [*kind.train_list, *kind.test_list]
    return {**dict(lists), kind.meta["filename"]: kind.meta["md5"]}


def _has_files(kind: type["CIFAR10"], root: Path) -> bool:
    """Whether all extracted files are there. Raises InputError where one is not genuine."""
    folder = root / kind.base_folder
    present = {name: md5 for name, md5 in _checksums(kind).items() if (folder / name).exists()}
    for name, md5 in present.items():
        _check_md5(folder / name, md5)
    return len(present) == len(_checksums(kind))


def _check_md5(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend its permissions or remove it") from None
    if found != expected:
        raise InputError(f"{path}: incomplete or not genuine (md5 {found}, not {expected}); remove it and start again")


def _download(kind: type["CIFAR10"], root: Path, progress: Progress) -> None:
    """The archive gets its name only when it is whole: what an interrupted download leaves is removed."""
    with _temporary_folder(root) as folder:
        part = folder / kind.filename
        try:
            with urllib.request.urlopen(kind.url, timeout=TIMEOUT_SECONDS) as response, part.open("wb") as file:
                total = int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    progress(file.tell(), total)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"{root / kind.filename} is missing and cannot be downloaded ({_one_line(reason)}); "
                f"fetch {kind.url} elsewhere and put it in {root}"
            ) from None
        _check_download(part, kind)
        part.replace(root / kind.filename)


def _check_download(part: Path, kind: type["CIFAR10"]) -> None:
    try:
        _check_md5(part, kind.tgz_md5)
    except InputError:
        raise InputError(
            f"what {kind.url} sent is incomplete or not genuine (md5 not {kind.tgz_md5}) and was dropped; try again"
        ) from None


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split()) or type(reason).__name__


def _extract(kind: type["CIFAR10"], root: Path) -> None:
    """Only the files we read, from an archive whose md5 is right."""
    target = root / kind.base_folder
    try:
        with _temporary_folder(root) as folder, tarfile.open(root / kind.filename) as archive:
            for name in _checksums(kind):
                # Content only, by name: no member decides where it lands, on Python 3.11.2 too, which knows no filters.
                content = archive.extractfile(f"{kind.base_folder}/{name}")
                if content is None:
                    raise InputError(f"{root / kind.filename}: {name} in it is no file; fetch it anew from {kind.url}")
                (folder / name).write_bytes(content.read())
            target.mkdir(exist_ok=True)
            for name, md5 in _checksums(kind).items():
                _check_md5(folder / name, md5)
                (folder / name).replace(target / name)
    except OSError as error:
        reason = _one_line(error.strerror or error)
        raise InputError(f"{target}: cannot be written ({reason}); name another --root") from None


@contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".loading-{os.getpid()}-", dir=root))
    except OSError as error:
        raise InputError(f"--root {root}: cannot be written ({error.strerror}); name another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
