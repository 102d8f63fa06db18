"""Small files: a write is complete or has no effect, reads are limited in size, and each error is one line."""

import errno
import json
import os
import random
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_prep import files
from data_prep.dataset import read_dataset, verify_dataset
from data_prep.errors import InputError, quoted, shell_path
from data_prep.files import open_regular, read_json, replace_file, sync
from data_prep.sources.cifar import load_cifar
from data_prep.sources.listing import list_splits
from ddp_trainer.models.initial_weights import read_weights
from ddp_trainer.tracking.run_record import load_run


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "bashrc").write_text("mine")
    (tmp_path / "a.json").symlink_to("bashrc")
    replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "bashrc").read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()


def fail_with(number: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_is_reported_with_sizes_and_the_old_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match=r"3 bytes are needed, [0-9,]+ are free.*/a'") as caught:
        replace_file(tmp_path / "a", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_is_tolerated(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(number))
    sync(tmp_path)
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_is_an_error_with_the_path(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path}'"):
        sync(tmp_path)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "/dev/zero", "/", "loop"):
        with pytest.raises(OSError, match=r"not a regular file|a folder|symbolic links"):
            open_regular(tmp_path / name)


JSON_FAULTS = {
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "33 levels": b'{"a":' * 33 + b"1" + b"}" * 33,
    "list": b"[]",
    "number": b"1",
    "empty": b"",
    "not text": b"\xff\xfe\x00\xd8",
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a surrogate pair as a key": b'{"\\ud800": 1}',
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "too large": b'{"a": "' + b" " * 2000 + b'"}',
}


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_unusable_json_is_reported_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(JSON_FAULTS[name])
    if name == "too large":
        monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} cannot be read: ")
    assert str(caught.value).isprintable()


def test_a_missing_json_file_reads_as_none_and_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") is None
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path / "a.json")


ODD_VALUES = [
    *(None, True, -1, 0, 1.5, 10**40, float("nan"), float("inf")),
    *("", "\x1b[31mred\x07", "a\nb", "a\0b", "../x", "/etc/passwd", "x" * 100_000),
    *([], {}, [[]], ["a", 1], {"a": 1}, ["\x1b]0;title\x07"]),
]


def mutate(fields: dict, rng: random.Random) -> None:
    """Replaces, removes or adds random values anywhere in `fields`."""
    for _ in range(rng.randrange(1, 4)):
        place: dict = fields
        while True:
            inner = [value for value in place.values() if isinstance(value, dict) and value]
            if not inner or rng.random() < 0.4:
                break
            place = rng.choice(inner)
        name = rng.choice([*place, "unknown\x1b"])
        if rng.random() < 0.2:
            place.pop(name, None)
        else:
            place[name] = rng.choice(ODD_VALUES)


def test_a_randomly_changed_dataset_json_is_read_or_refused_in_one_printable_line(
    tiny_dir: Path, tmp_path: Path
) -> None:
    text, messages = (tiny_dir / "dataset.json").read_text(), []
    for number in range(500):
        fields = json.loads(text)
        mutate(fields, random.Random(number))
        (tmp_path / "dataset.json").write_text(json.dumps(fields))
        try:
            read_dataset(tmp_path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 400
    for message in messages:
        assert message.isprintable()
        assert message.startswith((f"{tmp_path}/dataset.json ", f"{tmp_path} has no training images"))
        assert len(message) < 1000


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"source"', '"origin"', "it lacks the field source"),
        ('"source"', '"x": 0, "source"', "it has an unknown field, 'x'"),
        ('"tables_sha256"', '"tables"', "splits.train lacks the field tables_sha256"),
        ('"count"', '"x": 0, "count"', "splits.train has an unknown field, 'x'"),
        ('"test": {', '"later": {', "splits lacks the split test"),
    ],
)
def test_a_missing_or_unknown_field_of_dataset_json_is_named(
    old: str, new: str, problem: str, tiny_dir: Path, tmp_path: Path
) -> None:
    text = (tiny_dir / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=f"dataset.json cannot be used: {problem}; prepare the data again"):
        read_dataset(tmp_path)


def test_messages_have_no_control_characters() -> None:
    assert str(InputError("a\nb\x1b[31m\x9b\u202e\ud800")) == r"a\nb\x1b[31m\x9b\u202e\ud800"
    assert quoted("\x1b" * 1000).startswith(r"'\x1b\x1b")
    assert len(quoted("\x1b" * 1000)) < 300


@pytest.mark.parametrize(
    "name", ["plain.png", "two  spaces.png", "it's.png", "a\nb\t.png", "$(id)`id`\\.png", "caf\xe9"]
)
def test_a_path_in_a_message_can_be_pasted_into_a_shell(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf %s {shell_path(tmp_path / name)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == str(tmp_path / name)
    assert shell_path(tmp_path / name).isprintable()


READERS: dict[str, Callable[[Path], object]] = {
    "--data-dir": read_dataset,
    "--root": list_splits,
    "--root of CIFAR-10": partial(load_cifar, "cifar10"),
    "--init-from": read_weights,
    "a run directory": load_run,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("refuses", ["access", "stat"])
def test_a_lack_of_permission_is_named_as_the_cause(
    reader: str, refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fakes `os.access` or `os.stat`, because root may read any file.

    `os.access` is False if the file or folder itself cannot be read. `os.stat` fails if a parent folder lacks the
    search (x) permission.
    """

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "dataset.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, refuses, refuse if refuses == "stat" else lambda *_: False)
        with pytest.raises(InputError, match="cannot be read: permission denied; change its permissions or those of"):
            READERS[reader](tmp_path)


def test_a_beton_file_that_may_not_be_read_is_not_called_damaged(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = read_dataset(tiny_dir)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"beton cannot be read: permission denied; [^;:]*$"):
        verify_dataset(tiny_dir, info, full=False)
