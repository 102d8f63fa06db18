"""CIFAR's files are parsed only if they have the right checksum. If a download fails, one line says what to do."""

import errno
import hashlib
import io
import os
import pickle
import tarfile
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from data_prep.errors import InputError
from data_prep.sources.cifar import SHA256, load_cifar
from tests.support.folders import names_in


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Response(io.BytesIO):
    """An HTTP response with a Content-Length."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(len(content))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **options: object) -> None:
        raise urllib.error.URLError(OSError("Network is unreachable"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def load_error(root: Path) -> str:
    """The error message of `load_cifar`, which must fail."""
    with pytest.raises(InputError) as caught:
        load_cifar("cifar10", root)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def make_files() -> dict[str, bytes]:
    """A small CIFAR-10: the same files, with 4 images in each batch."""
    batches = [name for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]
    files = {}
    for number, name in enumerate(batches):
        data = np.full((4, 3072), number, dtype=np.uint8)
        data[:, :1024] = 200  # CIFAR stores one color plane after the other, red first
        files[name] = pickle.dumps({"data": data, "labels": [number, 7, 8, 9]})
    return {**files, "batches.meta": pickle.dumps({"label_names": [f"class {number}" for number in range(10)]})}


def pack(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small CIFAR-10 archive, whose checksums replace the real ones."""
    files, kind = make_files(), datasets.CIFAR10
    content = pack(files)
    monkeypatch.setattr(kind, "train_list", [[name, md5(files[name])] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, md5(files[name])] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setattr(kind, "tgz_md5", md5(content))
    return content


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_an_extracted_file_with_a_wrong_checksum_is_not_unpickled(name: str, tmp_path: Path, archive: bytes) -> None:
    """All other files have the right checksum."""
    folder, marker = tmp_path / "cifar-10-batches-py", tmp_path / "marker"
    folder.mkdir()
    for file, content in make_files().items():
        (folder / file).write_bytes(content)
    (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    line = load_error(tmp_path)
    fix = "check --root and --source, or extract cifar-10-python.tar.gz again"
    assert str(folder / name) in line and line.endswith(f"; {fix}")
    assert not marker.exists()


def test_unpickling_the_trap_creates_a_file(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_an_archive_with_a_wrong_checksum_is_not_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(pack(dict.fromkeys(make_files(), pickle.dumps(Trap(marker)))))
    assert str(path) in load_error(tmp_path)
    assert names_in(tmp_path) == {path.name}  # no marker, nothing extracted, and the file is still there


@pytest.mark.parametrize(("source", "file"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_without_internet_access_one_line_says_what_to_download(source: Any, file: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        load_cifar(source, tmp_path / "raw")
    line = str(caught.value)
    assert f"{tmp_path}/raw/{file}.tar.gz" in line
    assert f"https://www.cs.toronto.edu/~kriz/{file}.tar.gz" in line
    assert "Network is unreachable" in line
    assert len(line.splitlines()) == 1
    assert names_in(tmp_path / "raw") == set()
    assert time.perf_counter() - start < 10


def test_an_archive_that_was_copied_into_the_root_is_loaded(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    found = load_cifar("cifar10", tmp_path)
    assert found.classes == tuple(f"class {number}" for number in range(10))
    assert (found.train.images.shape, found.test.images.shape) == ((20, 32, 32, 3), (4, 32, 32, 3))
    assert (found.train.images.dtype, found.train.labels.dtype) == (np.uint8, np.int64)
    assert found.train.images[::4, 0, 0].tolist() == [[200, number, number] for number in range(5)]
    assert found.train.labels[::4].tolist() == [0, 1, 2, 3, 4]
    assert found.test.labels.tolist() == [5, 7, 8, 9]


def test_a_downloaded_archive_is_used_again(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    with monkeypatch.context() as online:
        online.setattr(urllib.request, "urlopen", lambda url, **options: Response(archive))
        first = load_cifar("cifar10", tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(archive), len(archive))
    assert names_in(tmp_path) == {"cifar-10-python.tar.gz"}
    assert np.array_equal(load_cifar("cifar10", tmp_path).train.images, first.train.images)  # offline


@pytest.mark.parametrize("root", ["raw", "raw/cifar-10-batches-py", "media/cifar-10-python.tar.gz", "media"])
def test_extracted_files_and_archives_are_found_and_nothing_is_written(
    root: str, tmp_path: Path, archive: bytes
) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "cifar-10-python.tar.gz").write_bytes(archive)
    (tmp_path / "raw" / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in make_files().items():
        (tmp_path / "raw" / "cifar-10-batches-py" / name).write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert load_cifar("cifar10", tmp_path / root).test.labels.tolist() == [5, 7, 8, 9]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_sha256_is_known_for_each_real_archive() -> None:
    assert {datasets.CIFAR10.tgz_md5, datasets.CIFAR100.tgz_md5} == set(SHA256)


def test_a_pickle_in_an_archive_with_the_right_checksum_runs_no_code(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, files = tmp_path / "marker", make_files()
    content = pack({**files, "test_batch": pickle.dumps({"data": Trap(marker), "labels": [1]})})
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(content))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    assert "not part of an array" in load_error(tmp_path)
    assert not marker.exists()


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cifar-10-python.tar.gz")
    assert "not a regular file" in load_error(tmp_path)


def test_a_full_disk_during_the_download_is_not_taken_for_a_network_problem(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(response: Response, size: int) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **options: Response(archive))
    monkeypatch.setattr(Response, "read", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_cifar("cifar10", tmp_path)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("part", [0, 100, 10_000])
def test_an_incomplete_download_leaves_no_files(
    part: int, tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = archive[: min(part, len(archive) - 1)]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **options: Response(sent))
    assert "incomplete or not genuine" in load_error(tmp_path)
    assert names_in(tmp_path) == set()


def test_an_interrupted_download_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Response):
        def read(self, size: int | None = -1, /) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **options: Interrupted(b"x"))
    with pytest.raises(KeyboardInterrupt):
        load_cifar("cifar10", tmp_path)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("cifar-10-python.tar.gz", "delete it and start again"),
        ("my-notes", "it is not cifar-10-python.tar.gz, so check --root and --source"),
    ],
)
def test_only_a_file_with_the_name_of_the_archive_is_to_be_deleted(name: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    line = load_error(tmp_path / name)
    assert line.startswith(f"{tmp_path}/{name} is incomplete or not genuine (sha256 ")
    assert line.endswith(f"; {fix}")


@pytest.mark.parametrize(("name", "reason"), [("a" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_a_root_that_cannot_exist_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^--root .* cannot be read \({reason}\)$"):
        load_cifar("cifar10", tmp_path / name)


def test_error_names_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path)  # root may read any folder
    assert "cifar-10-batches-py cannot be read: permission denied; change its perm" in load_error(tmp_path)
