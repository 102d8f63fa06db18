"""Finds or downloads CIFAR-10 and CIFAR-100, verifies them, and reads them without unpacking anything to the disk.

The sha256 of an archive must be the one in SHA256 below. If the archive was extracted earlier, the md5 of each file
must be the one that torchvision lists. A file is read into memory once, so the bytes that are parsed are the
bytes that were verified. If the files exist, their folder need not be writable.
"""

import hashlib
import http.client
import io
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.errors import InputError, shell_path
from data_prep.files import open_regular, require_readable
from data_prep.machine_limits import due_to_machine
from data_prep.sources import ImageSet, Split
from data_prep.sources.array_pickle import read_arrays

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

TIMEOUT_SECONDS = 20.0  # time to wait for an answer from the server
CHUNK_BYTES = 2**18
MAX_ARCHIVE_BYTES = 2**28  # each archive is about 170 MB
SHA256 = {  # md5 of an archive, as torchvision lists it -> its sha256
    "c58f30108f718f92721af3b95e74349a": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "eb9058c3a382ffc7106e4002c42a8d85": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}

Progress = Callable[[int, int], object]  # bytes loaded so far, total (0: unknown)


def load_cifar(
    source: Literal["cifar10", "cifar100"], root: Path, *, progress: Progress = lambda done, total: None
) -> ImageSet:
    """The dataset in torchvision's order, in which the classes are mixed. CIFAR-100 has its 100 fine classes.

    `root` is the archive, the folder of the extracted files, or a folder that contains one of the two; if it contains
    neither, the archive is downloaded into it. Raises InputError if a file is not genuine, or is absent and cannot be
    downloaded.
    """
    require_readable(root)
    try:
        root.stat()
    except FileNotFoundError:
        pass  # it will be created
    except (OSError, ValueError) as error:
        raise InputError(f"--root {shell_path(root)} cannot be read ({getattr(error, 'strerror', error)})") from None
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source]
    files = _extracted_files(kind, root) or _archived_files(kind, root, progress)
    meta_name, classes_key = kind.meta["filename"], kind.meta["key"]
    try:
        classes = read_arrays(files[meta_name])[classes_key]
        train, test = (
            _to_split([read_arrays(files[name]) for name, _ in listed]) for listed in (kind.train_list, kind.test_list)
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{shell_path(root)}: {kind.filename} cannot be read ({error})") from None
    return ImageSet(source=source, classes=tuple(classes), train=train, test=test)


def _to_split(batches: list[dict]) -> Split:
    """Images and labels of all batches. In a batch, each row is an image, one color plane after the other."""
    images = np.concatenate([np.asarray(batch["data"]) for batch in batches])
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise ValueError(f"images must be ({len(labels)}, 3072) uint8, got {images.shape} {images.dtype}")
    pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64))


def _checksums(kind: type["CIFAR10"]) -> dict[str, str]:
    """md5 of each file that is read from the archive."""
    return {**dict([*kind.train_list, *kind.test_list]), kind.meta["filename"]: kind.meta["md5"]}


def _extracted_files(kind: type["CIFAR10"], root: Path) -> dict[str, bytes] | None:
    """Contents of the extracted files; None if not all of them exist. Raises InputError if one is not genuine."""
    fix = f"check --root and --source, or extract {kind.filename} again"
    for folder in (root / kind.base_folder, root):
        require_readable(folder)
        present = {name: md5 for name, md5 in _checksums(kind).items() if (folder / name).exists()}
        if present:
            contents = {name: _genuine(folder / name, md5, fix) for name, md5 in present.items()}
            return contents if len(present) == len(_checksums(kind)) else None
    return None


def _archived_files(kind: type["CIFAR10"], root: Path, progress: Progress) -> dict[str, bytes]:
    """Contents of the files in the archive, which is downloaded if it is absent."""
    path = root / kind.filename if root.is_dir() or not root.exists() else root
    if not path.exists():
        _download(kind, root, progress)
    is_named_so = path.name == kind.filename
    fix = "delete it and start again" if is_named_so else f"it is not {kind.filename}, so check --root and --source"
    archive = _genuine(path, kind.tgz_md5, fix)
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for name in _checksums(kind):
            member = members.extractfile(f"{kind.base_folder}/{name}")
            if member is None:
                raise InputError(f"{shell_path(path)}: its member {name} is not a file; download {kind.url} again")
            contents[name] = member.read()
    return contents


def _read(path: Path) -> bytes:
    require_readable(path)
    try:
        with open_regular(path) as file:
            return file.read(MAX_ARCHIVE_BYTES)
    except OSError as error:
        raise InputError(f"{shell_path(path)} cannot be read ({error.strerror})") from None


def _genuine(path: Path, md5: str, fix: str) -> bytes:
    """The bytes of `path`. Raises InputError with `fix` if the md5 or, for an archive, the sha256 is wrong."""
    content = _read(path)
    kinds = [("md5", md5, hashlib.md5(content, usedforsecurity=False).hexdigest())]
    if md5 in SHA256:
        kinds.insert(0, ("sha256", SHA256[md5], hashlib.sha256(content).hexdigest()))
    for kind, expected, found in kinds:
        if found != expected:
            problem = f"is incomplete or not genuine ({kind} {found}, not {expected})"
            raise InputError(f"{shell_path(path)} {problem}; {fix}")
    return content


def _download(kind: type["CIFAR10"], root: Path, progress: Progress) -> None:
    """Downloads the archive. It gets its final name when complete; an exception or Ctrl-C leaves no file behind."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".loading-{os.getpid()}-", dir=root, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(f"--root {shell_path(root)} is not writable ({error.strerror}); use another folder") from None
    with temporary as folder:
        part = Path(folder) / kind.filename
        try:
            with urllib.request.urlopen(kind.url, timeout=TIMEOUT_SECONDS) as response, part.open("wb") as file:
                total = int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    progress(file.tell(), total)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and due_to_machine(error):  # such as a full disk
                error.filename = error.filename or str(root)
                raise
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"{shell_path(root / kind.filename)} is missing and cannot be downloaded ({reason}); "
                f"download {kind.url} elsewhere and put it in {shell_path(root)}"
            ) from None
        try:
            _genuine(part, kind.tgz_md5, "try again")
        except InputError:
            raise InputError(f"the download of {kind.url} is incomplete or not genuine; try again") from None
        part.replace(root / kind.filename)
