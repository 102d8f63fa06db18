"""Writes run directories with random results, as if a run had finished. This takes milliseconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def draw_predictions(num_classes: int, count: int = 300, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    logits = rng.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:48]
    indices = np.arange(count) * 3 + 1  # positions in the evaluated file; only some of its images were evaluated
    return {
        "indices": indices,
        "labels": labels,
        "probabilities": probabilities.astype(np.float32),
        "wrong_indices": indices[wrong],
        "wrong_images": rng.integers(256, size=(len(wrong), 8, 8, 3), dtype=np.uint8),
    }


def make_run(
    path: Path,
    *,
    num_classes: int = 10,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    peak_lr: float = 0.4,
    num_epochs: int = 3,
) -> dict[str, Any]:
    """Writes the directory of a finished run. Returns its predictions and the counts `correct` and `total`."""
    path.mkdir(parents=True)
    found: dict[str, Any] = draw_predictions(num_classes, seed=seed)
    found["correct"] = int((found["probabilities"].argmax(axis=1) == found["labels"]).sum())
    found["total"] = len(found["labels"])
    names = classes or tuple(f"kind-{label}" for label in range(num_classes))
    config = {
        "recipe": "baseline",
        "data_dir": "data/x",
        "settings": {"epochs": num_epochs, "seed": seed, "peak_lr": peak_lr},
        "versions": {"torch": "2.15.0"},
        "git_commit": "0" * 40,
        "world_size": 2,
        "device": "cuda",
        "device_name": "Imagined GPU",
        "dataset": {"source": "cifar10", "classes": names, "image_size": 8},
    }
    summary = {
        "test_accuracy": found["correct"] / found["total"],
        "test_correct": found["correct"],
        "test_total": found["total"],
        "test_accuracy_tta": 0.875,
        "test_loss": 0.5,
        "evaluation_split": "test",
        "epochs": num_epochs,
        "train_seconds": 61.25,
        "train_pflops": 1.5,
        "optimizer_pflops": 0.25,
        "parameters": 6573130,
        "images_per_second": 1234.0,
    }
    epochs = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 2 / epoch,
            "train_accuracy": 0.6 * epoch / num_epochs,
            "split": "test",
            "test_loss": 2.1 / epoch,
            "test_accuracy": 0.57 * epoch / num_epochs,
            "learning_rate": 0.1,
            "seconds": 20.5,
            "images_per_second": 1200.0 + epoch,
        }
        for epoch in range(1, num_epochs + 1)
    ]
    steps = [
        {"epoch": (step - 1) // 10 + 1, "step": step, "learning_rate": 0.1, "train_loss": 20 / step}
        for step in range(5, 10 * num_epochs + 1, 5)
    ]
    for name, content in (("config", config), ("summary", summary), ("model", {"classes": names})):
        (path / f"{name}.json").write_text(json.dumps(content))
    for name, records in (("metrics", epochs), ("steps", steps)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    np.savez(path / "predictions.npz", **{key: value for key, value in found.items() if np.ndim(value)})
    return found
