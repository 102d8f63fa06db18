"""The predict command classifies image files with a run's model, and names the files that it cannot read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.augment import batch_normalize
from ddp_trainer.models.spec import ModelSpec, build_model, load_model
from ddp_trainer.predict import main
from ddp_trainer.run.outputs import write_model
from tests.support.photos import BAD_EXIF, damaged_tiff, read_image, save
from tests.support.trainer import environment

CLASSES = ("cat", "dog", "<b>", "x y")


def write_random_model(run: Path, classes: tuple[str, ...]) -> Path:
    run.mkdir(exist_ok=True)
    spec = ModelSpec(classes=classes, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), image_size=32, widths=(4, 8, 8, 16))
    torch.manual_seed(0)
    write_model(run, build_model(spec), spec)
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("run"), CLASSES)


def draw(path: Path, mode: str = "RGB", size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_predictions_are_those_of_the_model(run_dir, tmp_path, capsys):
    paths = [draw(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)]
    assert main([str(run_dir), *map(str, paths), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, spec = load_model(run_dir)
    for path, answer in zip(paths, answers, strict=True):
        pixels = torch.from_numpy(read_image(path, 32)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            shares = model(batch_normalize(pixels, spec.mean, spec.std, torch.float32)).double().softmax(dim=1)[0]
        first, second = shares.argsort(descending=True)[:2].tolist()
        assert answer["path"] == str(path)
        assert (answer["class"], answer["next_class"]) == (CLASSES[first], CLASSES[second])
        assert answer["probability"] == pytest.approx(shares[first].item(), abs=1e-5)
        assert answer["next_probability"] == pytest.approx(shares[second].item(), abs=1e-5)


def test_text_output_has_one_line_per_image(run_dir, tmp_path, capsys):
    path = draw(tmp_path / "an image.png")
    assert main([str(run_dir), str(path)]) == 0
    first, name, probability, after = capsys.readouterr().out.rstrip("\n").split("\t")
    assert first == str(path) and name in CLASSES and probability.endswith("%") and after.startswith("next: ")


@pytest.mark.parametrize("name", ["two\nlines.png", "a\ttab.png", "\x1b[31mred.png", "line\u2028separator.png"])
def test_a_file_name_with_control_characters_stays_on_its_line(run_dir, tmp_path, capsys, name):
    path = draw(tmp_path / name)
    assert main([str(run_dir), str(path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    columns = line.split("\t")
    assert len(columns) == 4
    assert columns[0] == f"{tmp_path}/{name.encode('unicode_escape').decode()}"
    assert main([str(run_dir), str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(path)


def test_a_class_name_with_control_characters_stays_in_its_column(tmp_path, capsys):
    write_random_model(tmp_path / "run", ("two\nlines", "a\ttab"))
    assert main([str(tmp_path / "run"), str(draw(tmp_path / "x.png"))]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert {line.split("\t")[1], line.split("\t")[3].split()[1]} <= {"two\\nlines", "a\\ttab"}


def test_a_full_disk_is_reported_in_one_line(run_dir, tmp_path, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([str(run_dir), str(draw(tmp_path / "x.png"))]) == 1
    assert capsys.readouterr().err == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "é\\udce9.png".encode()), ("ascii", b"\\xe9\\udce9.png")])
def test_a_file_name_that_the_encoding_cannot_express_is_printed_with_escapes(run_dir, tmp_path, encoding, shown):
    path = os.fsencode(tmp_path) + "é".encode() + b"\xe9.png"
    draw(tmp_path / "x.png").rename(os.fsdecode(path))
    command = [sys.executable, "-m", "ddp_trainer.predict", run_dir, path]
    found = environment(PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    done = subprocess.run(command, env=found, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(b"\t")[0] == os.fsencode(tmp_path) + shown


@pytest.mark.parametrize(
    ("mode", "suffix", "size"),
    [
        ("L", "png", (50, 31)),
        ("P", "png", (8, 8)),
        ("RGBA", "png", (64, 200)),
        ("LA", "png", (1, 1)),
        ("CMYK", "jpg", (90, 40)),
        ("1", "png", (33, 33)),
        ("RGB", "webp", (40, 40)),
        ("RGB", "bmp", (10, 70)),
        ("P", "gif", (40, 20)),
        ("RGB", "tiff", (2000, 3)),
        ("RGB", "ppm", (31, 32)),
    ],
)
def test_images_of_any_size_and_mode_are_classified(run_dir, tmp_path, capsys, mode, suffix, size):
    assert main([str(run_dir), str(draw(tmp_path / f"x.{suffix}", mode, size))]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def answer_for(run_dir, path, capsys):
    assert main([str(run_dir), str(path), "--json"]) == 0
    return {name: value for name, value in json.loads(capsys.readouterr().out).items() if name != "path"}


def test_sixteen_bits_and_exif_orientation_do_not_change_the_prediction(run_dir, tmp_path, capsys):
    grey = np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert answer_for(run_dir, tmp_path / "deep.png", capsys) == answer_for(run_dir, tmp_path / "grey.png", capsys)
    sideways = Image.open(draw(tmp_path / "upright.png")).transpose(Image.Transpose.ROTATE_90)
    exif = sideways.getexif()
    exif[0x0112] = 6  # EXIF orientation: viewers turn the image clockwise by 90 degrees
    sideways.save(tmp_path / "sideways.png", exif=exif)
    expected = answer_for(run_dir, tmp_path / "upright.png", capsys)
    assert answer_for(run_dir, tmp_path / "sideways.png", capsys) == expected


def paths_in(output: str) -> list[str]:
    return [json.loads(line)["path"] for line in output.splitlines()]


def test_all_images_below_a_folder_are_classified(run_dir, tmp_path, capsys):
    expected = [str(draw(tmp_path / name)) for name in ("a/1.png", "b.jpeg", "c/d/2.JPG")]
    draw(tmp_path / ".hidden/3.png")
    (tmp_path / "notes.txt").write_text("not an image")
    draw(tmp_path / "z.png").rename(tmp_path / "image without a suffix")
    assert main([str(run_dir), str(tmp_path), "--json"]) == 0
    assert paths_in(capsys.readouterr().out) == [*expected, str(tmp_path / "image without a suffix")]


def test_linked_folders_are_searched_once(run_dir, tmp_path, capsys):
    photos, other = tmp_path / "photos", tmp_path / "other"
    draw(photos / "1.png")
    draw(other / "2.png")
    links = {photos / "other": other, other / "back": photos, photos / "self": photos, photos / "twin": other}
    for link, target in links.items():
        link.symlink_to(target)
    assert main([str(run_dir), str(photos), "--json"]) == 0
    printed = capsys.readouterr()
    assert paths_in(printed.out) == [str(photos / name) for name in ("1.png", "other/2.png")]
    assert printed.err == ""


def test_unreadable_images_are_named_and_the_others_are_classified(run_dir, tmp_path, capsys):
    good = [draw(tmp_path / "1.png"), draw(tmp_path / "2.png", seed=1)]
    broken, empty, linked = tmp_path / "broken.png", tmp_path / "empty", tmp_path / "linked"
    broken.write_bytes(good[0].read_bytes()[:200])
    empty.mkdir()
    linked.mkdir()
    (linked / "dead.png").symlink_to(tmp_path / "nowhere.png")
    given = [good[0], broken, tmp_path / "absent.png", empty, linked, good[1]]
    assert main([str(run_dir), *map(str, given)]) == 1
    printed = capsys.readouterr()
    assert [line.split("\t")[0] for line in printed.out.splitlines()] == [str(path) for path in good]
    assert printed.err.count("\n") == 4
    assert all(str(path) in printed.err for path in (broken, tmp_path / "absent.png", empty, linked / "dead.png"))


def test_a_path_in_an_error_can_be_pasted_into_a_shell(run_dir, tmp_path, capsys):
    names = ["a b.png", "line\nbreak.png", "a" * 300]
    assert main([str(run_dir), *(str(tmp_path / name) for name in names)]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"error: '{tmp_path}/a b.png': No such file or directory"
    assert second == f"error: $'{tmp_path}/line\\x0abreak.png': No such file or directory"
    assert third.endswith("aaa: File name too long")


def test_folders_nested_too_deep_are_refused(run_dir, tmp_path, capsys):
    (tmp_path / "/".join("a" * 100)).mkdir(parents=True)
    assert main([str(run_dir), str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("/a: nested more than 100 folders deep; move its images to a higher one\n")


@pytest.mark.parametrize("given", ["pipe.png", "."])
def test_a_pipe_is_refused_at_once(run_dir, tmp_path, capsys, given):
    """In a folder, only a pipe that is named like an image is refused; other pipes are ignored."""
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    assert main([str(run_dir), str(tmp_path / given)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'pipe.png'}: not a regular file\n"


@pytest.mark.parametrize(
    ("mode", "values"), [("F", (0.0, 1.0)), ("F", (0.0, 255.0)), ("I", (0, 70_000)), ("I", (-1, 200))]
)
def test_an_image_with_an_unknown_range_of_values_is_refused(run_dir, tmp_path, capsys, mode, values):
    path = tmp_path / "measured.tif"
    Image.fromarray(np.array([values, values], dtype=np.float32 if mode == "F" else np.int32)).save(path)
    assert main([str(run_dir), str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {path}: ") and "range" in printed.err


def test_wrong_input_gives_one_line_and_exit_status_2(run_dir, tmp_path, capsys):
    for arguments in ([str(tmp_path), "x.png"], [str(run_dir)], [], [str(run_dir), ""]):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.out == ""


def test_dark_16_bit_images_are_reported(run_dir, tmp_path, capsys):
    """Images with 12-bit values in 16-bit files look almost black."""
    Image.fromarray(np.full((32, 32), 4095, np.uint16)).save(tmp_path / "12bit.png")
    assert main([str(run_dir), str(draw(tmp_path / "a.png")), str(tmp_path / "12bit.png")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the 16-bit images are dark: their largest value is 4095 of 65535; ")


def test_a_wrong_pixel_limit_is_refused(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.sources.picture.MAX_PIXELS", 0)
    assert main([str(run_dir), str(draw(tmp_path / "a.png"))]) == 2
    assert "DATA_PREP_MAX_PIXELS must be a positive whole number" in capsys.readouterr().err


def test_decoder_warnings_take_one_line(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.jpg", Image.new("RGB", (8, 8)), exif=BAD_EXIF)
    damaged_tiff(tmp_path / "damaged.tif")
    assert main([str(run_dir), str(tmp_path)]) == 1
    printed = capfd.readouterr()
    assert len(printed.out.splitlines()) == 3
    error, warning = printed.err.splitlines()
    assert error.startswith("error: ") and "damaged.tif" in error
    assert warning.startswith(f"warning: decoders warned about 3 image files: {tmp_path}/0.jpg (Corrupt EXIF data.")
