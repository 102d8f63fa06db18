"""Lists the image files in folders of classes: ROOT/train/CLASS/** and ROOT/test/CLASS/**.

Nothing below the two splits is skipped silently: every entry is used as an image, reported as an error, or counted.
"""

import errno
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import InputError, require, shell_path, visible
from data_prep.files import open_regular, require_readable
from data_prep.sources import MAX_NAMED, count_of, name_some
from data_prep.sources.picture import SUFFIXES, starts_like_image

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval")
MAX_DEPTH = 100  # levels of nested folders
Visited = dict[tuple[int, int], Path]  # (device, inode) of each visited folder -> the path of its first visit
LAYOUT = "ROOT must have the folders train/CLASS and test/CLASS, or test/CLASS alone, with images in them"


@dataclass
class Listing:
    """The image files of one split, sorted by class and name, and counts of everything else."""

    root: Path
    classes: dict[str, Path] = field(default_factory=dict)  # name in Unicode form NFC -> folder
    images: list[tuple[Path, int]] = field(default_factory=list)  # files and their labels
    # Links, pipes and devices that are named like images but cannot be read, and the reasons.
    broken: list[tuple[Path, str]] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)  # suffixes of all other visible files
    hidden: int = 0

    def note(self) -> str | None:
        """One line about the files that were ignored, or None."""
        parts = []
        if self.other:
            kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in self.other.most_common(MAX_NAMED))
            more = ", ..." if len(self.other) > MAX_NAMED else ""
            parts.append(f"{count_of(self.other.total(), 'other file')} ({kinds}{more})")
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        return f"ignored in {shell_path(self.root)}: {', '.join(parts)}" if parts else None


def list_splits(root: Path) -> tuple[Listing, Listing, list[str]]:
    """(train, test, notes). The notes say which folders are used as splits, and which are ignored or missing.

    Raises InputError for a layout without classes, different classes in the splits, or a class without images.
    """
    require_readable(root)
    if not os.path.isdir(root):
        problem = "a file, not a folder" if os.path.exists(root) else "no such folder"
        raise InputError(f"--root {shell_path(root)}: {problem}; {LAYOUT}")
    train_roots, test_roots = (_split_folders(root, names) for names in (TRAIN_NAMES, TEST_NAMES))
    if not test_roots:
        raise InputError(f"--root {shell_path(root)}: no test folder ({' or '.join(TEST_NAMES)}) in it; {LAYOUT}")
    train, test = (
        Listing(_first_with_classes(train_roots or [root / "train"])),
        Listing(_first_with_classes(test_roots)),
    )
    present = [train, test] if train_roots else [test]
    for listing in present:
        _list_classes(listing)
    if train in present:
        _check_class_count(train)
        _check_same_classes(train, test)
    for listing in present:
        _list_images(listing)
    notes = [
        f"ignored {shell_path(folder)}, because {shell_path(listing.root)} is the {name} split"
        for name, listing, folders in (("train", train, train_roots), ("test", test, test_roots))
        for folder in folders
        if folder != listing.root
    ]
    if train not in present:
        notes.append(f"{shell_path(root)} has no train folder, so the dataset is only for evaluation")
    for name, listing in (("train", train), ("test", test)):
        if listing.root.name != name:
            notes.append(f"{name} split: {shell_path(listing.root)}")
    return train, test, notes


def check_outside_splits(out: Path, root: Path) -> None:
    """Raises InputError if the dataset would be written among the images, where it would look like a class."""
    out, root = out.resolve(), root.resolve()
    if root in out.parents and out.relative_to(root).parts[0].lower() in (*TRAIN_NAMES, *TEST_NAMES):
        raise InputError(f"--out {shell_path(out)} is among the images of --root; use another folder")


def _split_folders(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The folders in `root` whose names, in lower case, are in `names`. The preferred name comes first."""
    found = [Path(entry.path) for entry in _entries(root) if entry.name.lower() in names]
    found.sort(key=lambda path: (names.index(path.name.lower()), path.name != path.name.lower()))
    for path in found:
        if not _is_folder(path):
            raise InputError(f"{shell_path(path)} is a file, not a folder of classes; {LAYOUT}")
    return found


def _first_with_classes(folders: list[Path]) -> Path:
    """The first of `folders` that has subfolders, or simply the first one if none of them has any."""
    if len(folders) == 1:
        return folders[0]
    return next((folder for folder in folders if any(entry.is_dir() for entry in _visible(folder))), folders[0])


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of `folder` that are not hidden, sorted by name. Raises InputError if the folder is not readable."""
    return [entry for entry in _entries(folder) if not entry.name.startswith(".")]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{shell_path(folder)} cannot be read ({error.strerror}); change its permissions") from None


def _list_classes(listing: Listing) -> None:
    named: dict[str, str] = {}  # folder name without invisible characters -> folder name
    for entry in _entries(listing.root):
        if entry.name.startswith("."):
            listing.hidden += 1
        elif not _is_folder(Path(entry.path)):
            listing.other[_suffix(entry.name)] += 1
        else:
            name = _class_name(entry.name, listing.root)
            other = named.setdefault(visible(name), entry.name)
            if other != entry.name:
                raise InputError(
                    f"{shell_path(listing.root)}: the classes {other!a} and {entry.name!a} look alike; rename one"
                )
            listing.classes[name] = Path(entry.path)
    if not listing.classes:
        raise InputError(f"{shell_path(listing.root)}: no class folders in it; {LAYOUT}")
    listing.classes = dict(sorted(listing.classes.items()))


def _check_class_count(listing: Listing) -> None:
    if len(listing.classes) == 1:
        line = f"{shell_path(listing.root)}: only one class folder, but at least two are needed"
        raise InputError(f"{line}; is --root one level too high or too low?")


def _class_name(name: str, root: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{shell_path(root)}: the name of class folder {name!a} is not UTF-8; rename it") from None
    return unicodedata.normalize("NFC", name)  # macOS writes the decomposed form


def _check_same_classes(train: Listing, test: Listing) -> None:
    here, there = set(train.classes), set(test.classes)
    if here == there:
        return
    folded = {_fold(name): name for name in there - here}
    alike = [(name, folded[_fold(name)]) for name in sorted(here - there) if _fold(name) in folded]
    if alike:
        pairs = name_some([f"{one!a} and {other!a}" for one, other in alike])
        must = f"{train.root.name} and {test.root.name} must have the same class folders"
        raise InputError(f"{must}, but {pairs} only look alike; rename one")
    problems = [
        f"{name_some([shell_path(name) for name in sorted(only)])} only in {shell_path(listing.root)}"
        for only, listing in ((here - there, train), (there - here, test))
        if only
    ]
    raise InputError(f"the class folders differ: {', '.join(problems)}; both splits need the same classes")


def _fold(name: str) -> str:
    """Returns the same text for names that look alike: ignores case and white space, and uses one Unicode form."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def _list_images(listing: Listing) -> None:
    for label, (name, folder) in enumerate(listing.classes.items()):
        num_broken = len(listing.broken)
        found = sorted(_files_below(folder, listing, visited={}), key=lambda path: path.relative_to(folder).parts)
        if not found and len(listing.broken) == num_broken:
            raise InputError(f"{shell_path(folder)}: no images in it; add some, or remove the class {shell_path(name)}")
        listing.images += [(path, label) for path in found]


def _files_below(folder: Path, listing: Listing, visited: Visited, depth: int = 0) -> Iterator[Path]:
    """The image files in `folder` and its subfolders; links are followed.

    Raises InputError for a second visit to a folder: with a few links, an image would be listed thousands of times.
    """
    status = folder.stat()
    first = visited.setdefault((status.st_dev, status.st_ino), folder)
    require(first == folder, f"{shell_path(folder)} is the same folder as {shell_path(first)}; remove the link")
    advice = "move its images to a higher one"
    require(depth < MAX_DEPTH, f"{shell_path(folder)}: nested more than {MAX_DEPTH} folders deep; {advice}")
    for entry in _entries(folder):
        path = Path(entry.path)
        if entry.name.startswith("."):
            listing.hidden += 1
        elif (kind := _kind(path)) == "folder":
            yield from _files_below(path, listing, visited, depth + 1)
        elif kind != "file":
            # A broken link without an image's suffix may have led to a whole folder of images, so it is an error.
            require(path.suffix.lower() in SUFFIXES, f"{shell_path(path)}: {kind}; restore or remove it")
            listing.broken.append((path, kind))
        elif looks_like_image(path):
            yield path
        else:
            listing.other[_suffix(entry.name)] += 1


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises InputError if it is neither a folder nor a regular file."""
    kind = _kind(path)
    require(kind in ("folder", "file"), f"{shell_path(path)}: {kind}; restore or remove it")
    return kind == "folder"


def _kind(path: Path) -> str:
    """Returns "folder" or "file", or what is wrong with anything else: a broken link, a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        is_broken_link = path.is_symlink() and error.errno == errno.ENOENT
        return "a link to something that does not exist" if is_broken_link else str(error.strerror)
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "not a regular file"


def looks_like_image(path: Path) -> bool:
    """Whether a file's name or its first bytes are those of an image."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with open_regular(path) as file:
            return starts_like_image(file.read(16))
    except OSError:
        return False


def _suffix(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return suffix if len(suffix) <= 8 else ""  # the end of a name such as `Mr. Smith` is no suffix
