"""Image files in folders named after their classes: found, read, made square and put in a fixed mixed order.

ROOT/train/CLASS/*.{png,jpg,jpeg} and ROOT/test/CLASS/* (or ROOT/val/CLASS/*). What the images are written to is not
this file's concern.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_prep.errors import InputError
from data_prep.sources import ImageSet, Split

SUFFIXES = {".png", ".jpg", ".jpeg"}
FORMATS = ("PNG", "JPEG")  # by content; MPO, which phones write into .jpg files, is read as the JPEG it begins with
MIN_SIZE, MAX_SIZE = 8, 1024
Image.MAX_IMAGE_PIXELS = 250_000_000  # Pillow refuses twice as many: half of it would refuse large photographs
NUM_NAMED = 5  # unreadable files that an error names; it counts the others
CHUNK = 64  # images a thread reads at a time

Progress = Callable[[int, int], object]  # images read so far, images there are
Listing = list[tuple[Path, int]]  # image files and their labels


def load_folder(root: Path, *, size: int = 32, progress: Progress = lambda done, total: None) -> ImageSet:
    """All images below `root` as `size` x `size` pixels, in an order that the file names alone decide.

    Sorted by class and file name, then shuffled with a fixed seed, so that any prefix mixes the classes. Hidden files
    and other kinds of files are passed over. Raises InputError for a missing folder, an empty class, classes that
    differ between train and test, and images that cannot be read.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(f"--size {size}: take images of {MIN_SIZE} to {MAX_SIZE} pixels")
    train_root, test_root = _find_splits(root)
    classes = _list_classes(train_root)
    _check_same(classes, _list_classes(test_root), train_root, test_root)
    train, test = (_list_images(folder, classes) for folder in (train_root, test_root))
    images = _read_all([path for path, _ in train + test], size, progress)
    labels = np.array([label for _, label in train + test], dtype=np.int64)
    return ImageSet(
        source="folder",
        classes=tuple(classes),
        train=_mix(images[: len(train)], labels[: len(train)]),
        test=_mix(images[len(train) :], labels[len(train) :]),
    )


def read_image(path: Path, size: int, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """(size, size, 3) uint8 of one image file, which must be of one of Pillow's `formats`.

    Turned upright as its EXIF orientation says; of an image that is not square the central square is taken; then
    resized with an antialiasing filter. Transparent pixels are laid over white, 16-bit values are scaled to 8 bits,
    grey, palette and CMYK images become RGB. Raises whatever the decoder raises for a damaged file (not only OSError).
    """
    with Image.open(path, formats=formats) as image:
        # Large JPEGs are decoded at an eighth to a half of their size, still four times as fine as what is kept.
        image.draft(image.mode, (4 * size, 4 * size))
        image.load()
        upright = _to_rgb(ImageOps.exif_transpose(image))
    side = min(upright.size)
    left, top = (upright.width - side) // 2, (upright.height - side) // 2
    if upright.size == (size, size):
        return np.array(upright)
    box = (left, top, left + side, top + side)
    return np.array(upright.resize((size, size), Image.Resampling.LANCZOS, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("the range of its floating-point values is unknown; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"the range of its values is unknown: {values.min()} to {values.max()}, not 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _find_splits(root: Path) -> tuple[Path, Path]:
    layout = "expected are ROOT/train/CLASS/*.{png,jpg,jpeg} and ROOT/test/CLASS/*"
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; {layout}")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        missing = "test (or val)" if train.is_dir() else "train"
        raise InputError(f"--root {root}: it has no folder {missing}; {layout}")
    return train, test


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is not hidden in `folder`, sorted by name."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); mend its permissions") from None


def _list_classes(folder: Path) -> list[str]:
    classes = [entry.name for entry in _entries(folder) if entry.is_dir()]
    if not classes:
        raise InputError(f"{folder}: no class folders in it; expected are {folder}/CLASS/*.{{png,jpg,jpeg}}")
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{folder}: the name of class folder {name!a} is not UTF-8; rename it") from None
    return classes


def _check_same(train: Sequence[str], test: Sequence[str], train_root: Path, test_root: Path) -> None:
    problems = [
        f"{_name_some(sorted(set(here) - set(there)))} only in {folder}"
        for here, there, folder in ((train, test, train_root), (test, train, test_root))
        if set(here) - set(there)
    ]
    if problems:
        raise InputError(f"the class folders differ: {', '.join(problems)}; both need the same ones")


def _name_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _list_images(folder: Path, classes: Sequence[str]) -> Listing:
    """Sorted by class, then by file name."""
    images: Listing = []
    for label, name in enumerate(classes):
        paths = [
            Path(entry.path)
            for entry in _entries(folder / name)
            if Path(entry.name).suffix.lower() in SUFFIXES and not entry.is_dir()
        ]
        if not paths:
            raise InputError(f"{folder / name}: no .png, .jpg or .jpeg in it; add images, or remove the class")
        images += [(path, label) for path in paths]
    return images


def _read_all(paths: Sequence[Path], size: int, progress: Progress) -> np.ndarray:
    """(N, size, size, 3) uint8. Pillow decodes outside Python's lock, so threads are enough."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    problems: list[str] = []

    def read(start: int) -> list[str]:
        found = []
        for position in range(start, min(start + CHUNK, len(paths))):
            try:
                images[position] = read_image(paths[position], size)
            except Exception as error:  # decoders raise nearly anything for damaged files
                found.append(f"{paths[position]} ({why_unreadable(error)})")
        return found

    pool = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16))
    try:
        starts = range(0, len(paths), CHUNK)
        for start, found in zip(starts, pool.map(read, starts), strict=True):
            problems += found
            progress(min(start + CHUNK, len(paths)), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # after an interruption nothing more is begun
    if problems:
        files = "1 image file" if len(problems) == 1 else f"{len(problems)} image files"
        raise InputError(f"{files} cannot be read: {_name_some(problems)}; replace or remove what is named")
    return images


def why_unreadable(error: Exception, formats: tuple[str, ...] = FORMATS) -> str:
    """What `read_image` has raised, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known kind ({', '.join(formats)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _mix(images: np.ndarray, labels: np.ndarray) -> Split:
    order = np.random.default_rng(0).permutation(len(labels))
    return Split(images[order], labels[order])
