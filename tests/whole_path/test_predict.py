"""Classifying image files: the same answers as the model itself, whatever the files are."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.augment import batch_normalize
from data_prep.sources.picture import read_image
from ddp_trainer.models.spec import ModelSpec, build_model, load_model
from ddp_trainer.predict import main
from ddp_trainer.run.outputs import write_model

CLASSES = ("cat", "dog", "<b>", "x y")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    spec = ModelSpec(classes=CLASSES, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), image_size=32, widths=(4, 8, 8, 16))
    torch.manual_seed(0)
    write_model(run, build_model(spec), spec)
    return run


def draw(path: Path, mode: str = "RGB", size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_answers_are_the_models_own(run_dir, tmp_path, capsys):
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


def test_text_has_a_line_per_image(run_dir, tmp_path, capsys):
    path = draw(tmp_path / "an image.png")
    assert main([str(run_dir), str(path)]) == 0
    first, name, probability, after = capsys.readouterr().out.rstrip("\n").split("\t")
    assert first == str(path) and name in CLASSES and probability.endswith("%") and after.startswith("next: ")


def test_a_name_that_is_no_text_is_printed_as_it_is(run_dir, tmp_path, capfdbinary):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    draw(tmp_path / "x.png").rename(path)
    assert main([str(run_dir), str(path)]) == 0
    assert capfdbinary.readouterr().out.startswith(os.fsencode(path))


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
def test_any_size_and_mode(run_dir, tmp_path, capsys, mode, suffix, size):
    assert main([str(run_dir), str(draw(tmp_path / f"x.{suffix}", mode, size))]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def answer_for(run_dir, path, capsys):
    assert main([str(run_dir), str(path), "--json"]) == 0
    return {name: value for name, value in json.loads(capsys.readouterr().out).items() if name != "path"}


def test_sixteen_bits_and_a_camera_held_sideways_change_nothing(run_dir, tmp_path, capsys):
    grey = np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert answer_for(run_dir, tmp_path / "deep.png", capsys) == answer_for(run_dir, tmp_path / "grey.png", capsys)
    upright = Image.open(draw(tmp_path / "upright.png"))
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif = sideways.getexif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    sideways.save(tmp_path / "sideways.png", exif=exif)
    expected = answer_for(run_dir, tmp_path / "upright.png", capsys)
    assert answer_for(run_dir, tmp_path / "sideways.png", capsys) == expected


def test_folder_means_the_images_below_it(run_dir, tmp_path, capsys):
    expected = [str(draw(tmp_path / name)) for name in ("a/1.png", "b.jpeg", "c/d/2.JPG")]
    draw(tmp_path / ".hidden/3.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert main([str(run_dir), str(tmp_path), "--json"]) == 0
    assert [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()] == expected


def test_unreadable_images_are_named_and_the_others_answered(run_dir, tmp_path, capsys):
    good = [draw(tmp_path / "1.png"), draw(tmp_path / "2.png", seed=1)]
    broken, empty = tmp_path / "broken.png", tmp_path / "empty"
    broken.write_bytes(good[0].read_bytes()[:200])
    empty.mkdir()
    given = [good[0], broken, tmp_path / "absent.png", empty, good[1]]
    assert main([str(run_dir), *map(str, given)]) == 1
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [str(path) for path in good]
    assert said.err.count("\n") == 3
    assert all(str(path) in said.err for path in (broken, tmp_path / "absent.png", empty))


def test_bad_input_is_one_line_and_exit_2(run_dir, tmp_path, capsys):
    for arguments in ([str(tmp_path), "x.png"], [str(run_dir)], []):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
