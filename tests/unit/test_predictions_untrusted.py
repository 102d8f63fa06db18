"""An untrusted predictions.npz is refused, or gives arrays of matching shapes and limited size."""

import os
import random
import re
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import InputError
from ddp_trainer.report.confusion import cells_png
from ddp_trainer.tracking import predictions
from ddp_trainer.tracking.predictions import Predictions, most_confident_mistakes, read_predictions
from tests.support.run_directories import draw_predictions, make_run


def control_characters(text: str) -> set[str]:
    return {char for char in text if unicodedata.category(char) in ("Cc", "Cs")} - {"\n", "\t"}


def test_a_named_pipe_and_headers_that_claim_huge_arrays_are_refused(tmp_path: Path) -> None:
    arrays = {key: array for key, array in make_run(tmp_path / "run").items() if np.ndim(array)}
    path = tmp_path / "run" / "predictions.npz"
    for name, shape in (
        ("indices", (2**40,)),
        ("probabilities", (300, 2**30)),
        ("wrong_images", (48, 2**20, 2**20, 3)),
    ):
        np.savez_compressed(path, **arrays)
        replace_header(path, name, shape)
        with pytest.raises(InputError, match=r"predictions\.npz"):
            read_predictions(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        read_predictions(path)


def replace_header(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Makes the header of one array in an npz file claim another shape."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    header = BytesIO()
    dtype = np.load(BytesIO(members[f"{name}.npy"])).dtype
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    members[f"{name}.npy"] = header.getvalue() + members[f"{name}.npy"][128:]
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


@pytest.mark.parametrize(
    ("limit", "value", "expected"),
    [
        ("MAX_BYTES", 12_000_000, "bytes in its arrays; the limit is 12,000,000"),
        ("MAX_IMAGES", 299, "300 images; the limit is 299"),
        ("MAX_CLASSES", 9_999, "10,000 classes; the limit is 9,999"),
        ("MAX_MISTAKES", 47, "at most 47 images, got 48"),
    ],
)
def test_arrays_beyond_a_limit_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, expected: str
) -> None:
    """An array contains only zeros, so the compressed file is much smaller than the array."""
    arrays = {key: array for key, array in make_run(tmp_path / "run").items() if np.ndim(array)}
    arrays["probabilities"] = np.zeros((300, 10_000), np.float32)
    path = tmp_path / "run" / "predictions.npz"
    np.savez_compressed(path, **arrays)
    assert path.stat().st_size < 1e5
    monkeypatch.setattr(predictions, limit, value)
    monkeypatch.setattr(
        np.lib.format, "read_array", lambda *arguments, **options: pytest.fail("the array was unpacked")
    )
    with pytest.raises(InputError, match=expected):
        read_predictions(path)


class NeverIterated(np.ndarray):
    def __iter__(self):  # type: ignore[no-untyped-def]
        pytest.fail("a loop over all images would take minutes")


def test_mistakes_are_found_without_a_loop_over_all_images() -> None:
    found = Predictions(**draw_predictions(num_classes=10))
    expected = most_confident_mistakes(found, "abcdefghij")
    assert [mistake.sample for mistake in expected] == found.wrong_indices.tolist()
    for mistake in expected:
        (row,) = np.flatnonzero(found.indices == mistake.sample)
        assert mistake[1:3] == ("abcdefghij"[found.labels[row]], "abcdefghij"[found.predicted[row]])
    large = replace(found, indices=found.indices.view(NeverIterated))
    assert [mistake[:4] for mistake in most_confident_mistakes(large, "abcdefghij")] == [each[:4] for each in expected]


@pytest.mark.parametrize("num_classes", [200, 300])
def test_small_integers_do_not_overflow_in_the_confusion_matrix(tmp_path: Path, num_classes: int) -> None:
    arrays: dict[str, Any] = dict(draw_predictions(num_classes))
    path = tmp_path / "predictions.npz"
    arrays["labels"] %= 200
    pictures = []
    for dtype in (np.int64, np.uint8):
        arrays["labels"] = arrays["labels"].astype(dtype)
        np.savez(path, **arrays)
        found = read_predictions(path)
        assert found is not None
        pictures.append(cells_png(found, transparent=False))
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_predictions_are_refused_or_have_matching_shapes(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays = {key: array for key, array in make_run(tmp_path / "run").items() if np.ndim(array)}
    path, rng = tmp_path / "run" / "predictions.npz", random.Random(0)
    save(path, **arrays)
    original, messages = path.read_bytes(), []
    headers = [match.start() for match in re.finditer(rb"PK|NUMPY|descr|shape", original)]
    for number in range(300):
        content = bytearray(original)
        start = rng.choice(headers) + rng.randrange(60) if number % 2 else rng.randrange(len(content))
        content[start : start + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        path.write_bytes(content)
        try:
            found = read_predictions(path)
        except InputError as error:
            messages.append(str(error))
        else:
            assert found is not None and found.labels.shape == (300,)
    assert len(messages) > 200 and not control_characters("".join(messages))
