"""An untrusted predictions.npz is refused, or gives arrays of matching shapes and limited size."""

import os
import random
import re
import unicodedata
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from ddp_trainer.tracking import predictions
from ddp_trainer.tracking.predictions import read_predictions
from tests.support.run_directories import make_run


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


def test_array_beyond_the_limit_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The array contains only zeros, so the compressed file is much smaller than the array."""
    arrays = {key: array for key, array in make_run(tmp_path / "run").items() if np.ndim(array)}
    arrays["probabilities"] = np.zeros((300, 10_000), np.float32)
    path = tmp_path / "run" / "predictions.npz"
    np.savez_compressed(path, **arrays)
    assert path.stat().st_size < 1e5
    monkeypatch.setattr(predictions, "MAX_BYTES", 10_000_000)
    monkeypatch.setattr(
        np.lib.format, "read_array", lambda *arguments, **options: pytest.fail("the array was unpacked")
    )
    with pytest.raises(InputError, match=r"take 12\.0 MB; the limit is 10\.0 MB"):
        read_predictions(path)


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
