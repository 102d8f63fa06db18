"""Messages of image decoders are not printed, but collected in one line that names the first few files."""

import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from data_prep.sources.decoder_messages import DecoderMessages, collected_messages, reading
from tests.support.photos import BAD_EXIF, damaged_tiff, read_image, save


def test_each_file_is_counted_once_and_the_first_ones_are_named() -> None:
    messages = DecoderMessages()

    def read(number: int) -> None:
        with reading(Path(f"{number}\n.png")):
            for _ in range(2):
                warnings.warn(f"oddity\nof {number}", stacklevel=1)

    with collected_messages(messages), ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(12)))
        warnings.warn("about no file", stacklevel=1)
    note = messages.note()
    assert note is not None
    assert note.startswith("decoders warned about 12 image files: $'")  # names with line breaks, quoted for a shell
    assert note.endswith(" and 7 more")
    assert note.isprintable()
    for entry in messages.first:
        number = entry.removeprefix("$'").partition("\\x0a")[0]
        assert entry.endswith(f"(oddity of {number})"), "a file has the warning of another file"
    assert DecoderMessages().note() is None


def test_decoders_print_nothing_while_messages_are_collected_and_stderr_works_afterwards(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exif = save(tmp_path / "exif.jpg", Image.new("RGB", (8, 8)), exif=BAD_EXIF)
    tiff, messages = damaged_tiff(tmp_path / "damaged.tif"), DecoderMessages()
    with collected_messages(messages):
        read_image(exif, 8)
        with pytest.raises(OSError, match="decoder error"):
            read_image(tiff, 8)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
    note = messages.note()
    assert note is not None
    assert f"1 image file: {exif} (Corrupt EXIF data." in note
    assert "; decoders printed 1 line about damaged data: " in note


def test_without_a_temporary_folder_only_warnings_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    messages = DecoderMessages()
    with collected_messages(messages), reading(Path("a.png")):
        warnings.warn("oddity", stacklevel=1)
    assert messages.note() == "decoders warned about 1 image file: a.png (oddity)"
