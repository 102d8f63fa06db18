"""The installed FFCV, which scripts/ffcv builds without OpenCV and TurboJPEG, writes the same files as a full build."""

import shutil
import subprocess
import sys
from pathlib import Path

import ffcv
import pytest

INSTALLED = Path(ffcv.__path__[0])
LIBRARIES = ("opencv4", "libturbojpeg")

WRITE_AND_READ = """
import sys
from pathlib import Path
import numpy as np
import ffcv
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

folder = Path(sys.argv[1])
assert Path(ffcv.__file__).is_relative_to(folder), ffcv.__file__
images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
DatasetWriter(str(folder / "images.beton"), fields, num_workers=1).from_indexed_dataset(list(zip(images, range(20))))
pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
loader = Loader(
    str(folder / "images.beton"), batch_size=10, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines
)
batches = [np.array(batch) for batch, _ in loader]
assert np.array_equal(np.concatenate(batches), images)
"""


def full_build(folder: Path) -> None:
    """Copies the installed FFCV to `folder` and compiles it with the real OpenCV and TurboJPEG."""
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", *LIBRARIES], text=True, capture_output=True, check=True)
    python = subprocess.run(["python3-config", "--includes"], text=True, capture_output=True, check=True)
    library = shutil.copytree(INSTALLED, folder / "ffcv") / "_libffcv.abi3.so"
    library.unlink()
    command = ["g++", "-O2", "-shared", "-fPIC", "-w", INSTALLED / "libffcv.cpp", *python.stdout.split()]
    subprocess.run([*command, *flags.stdout.split(), "-o", library], check=True)


def can_build_in_full() -> bool:
    if not all(shutil.which(program) for program in ("g++", "python3-config", "pkg-config")):
        return False
    return subprocess.run(["pkg-config", "--exists", *LIBRARIES]).returncode == 0


@pytest.mark.skipif(
    not can_build_in_full(), reason="needs g++, python3-config, pkg-config, and the headers of OpenCV and TurboJPEG"
)
def test_both_builds_write_the_same_files(tmp_path: Path) -> None:
    ours, full = tmp_path / "ours", tmp_path / "full"
    shutil.copytree(INSTALLED, ours / "ffcv")
    full_build(full)
    for folder in (ours, full):
        command = [sys.executable, "-c", WRITE_AND_READ, folder]
        subprocess.run(command, env={"PYTHONPATH": str(folder), "HOME": str(tmp_path)}, check=True, timeout=120)
    assert (ours / "images.beton").read_bytes() == (full / "images.beton").read_bytes()


@pytest.mark.parametrize(
    ("call", "left_out"),
    [
        ("resize_crop(images, 0, 4, 0, 4, images)", "resize images"),
        ("imdecode(images, images, 4, 4, 4, 4)", "decode JPEG"),
        ("imdecode(images, images, 4, 4, 4, 4, do_flip=True)", "decode JPEG"),
    ],
)
def test_calling_a_left_out_function_ends_the_process_with_one_line(call: str, left_out: str) -> None:
    code = f"import numpy as np; from ffcv.libffcv import *; images = np.zeros((4, 4, 3), np.uint8); {call}"
    finished = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert finished.returncode == 1
    assert finished.stderr == f"error: this build of FFCV cannot {left_out}: it reads and writes raw images only\n"
