"""The page that puts several runs side by side: a table, means over seeds, curves, the settings that differ."""

import json
import math
from collections.abc import Mapping, Sequence

from ddp_trainer.report import charts, scores
from ddp_trainer.report.page import chart, count, duration, page, percent, section, table, text
from ddp_trainer.report.rundata import RunData

NOT_COMPARED = {"seed", "out", "resume", "wandb", "trackers", "keep_checkpoints", "checkpoint_every_steps"}
HEAD = ["run", "seed", "epochs", "accuracy", "95 % interval", "with flips", "loss", "training time", "images/s"]


def comparison_page(runs: Mapping[str, RunData], panels: Mapping[str, charts.Draw]) -> str:
    names = ", ".join(runs)
    drawn = "".join(
        chart(charts.svg(panel), f"{name.replace('_', ' ')} by epoch of {names}") for name, panel in panels.items()
    )
    body = [
        f'<h1>{len(runs)} runs</h1>\n<p class="quiet">{text(names)}</p>\n',
        section("Results", "", table(HEAD, [row(name, run) for name, run in runs.items()])),
        seeds(runs),
        section("Curves", "", f'<div class="charts">{drawn}</div>\n'),
        differences(runs),
    ]
    return page(f"{len(runs)} runs: {names}", body)


def row(name: str, run: RunData) -> list[str]:
    summary = run.summary
    last = run.records[-1] if run.records else {}
    shown = summary or {"test_accuracy": last.get("test_accuracy"), "test_loss": last.get("test_loss")}
    interval = "not complete"
    if summary is not None:
        low, high = scores.wilson_interval(int(summary["test_correct"]), int(summary["test_total"]))
        interval = f"{percent(low)} – {percent(high)}"
    seconds = float(shown.get("train_seconds") or sum(run.column("seconds")) or math.nan)
    speed = float(shown.get("images_per_second") or last.get("images_per_second") or math.nan)
    return [
        text(name),
        text(run.settings.get("seed", "–")),
        str(len(run.records)),
        percent(number(shown.get("test_accuracy"))),
        interval,
        percent(number(shown.get("test_accuracy_tta"))),
        f"{number(shown.get('test_loss')):.4f}",
        "–" if math.isnan(seconds) else duration(seconds),
        "–" if math.isnan(speed) else count(speed),
    ]


def number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def identity(run: RunData) -> str:
    """Equal for runs that differ in nothing but the seed."""
    kept = {name: value for name, value in run.settings.items() if name not in NOT_COMPARED}
    return json.dumps([run.config.get("recipe"), run.classes, kept], sort_keys=True, default=str)


def seeds(runs: Mapping[str, RunData]) -> str:
    """Mean and standard deviation of complete runs that differ by their seed alone."""
    groups: dict[str, list[tuple[str, RunData]]] = {}
    for name, run in runs.items():
        if run.summary is not None:
            groups.setdefault(identity(run), []).append((name, run))
    rows = [spread(members) for members in groups.values() if len(members) > 1]
    if not rows:
        return ""
    lead = "Runs with the same settings but for the seed; ± is the standard deviation from run to run."
    return section("Over seeds", lead, table(["runs", "n", "accuracy", "with flips", "training time"], rows))


def spread(members: Sequence[tuple[str, RunData]]) -> list[str]:
    def over(key: str) -> tuple[float, float]:
        return scores.mean_and_std([number((run.summary or {}).get(key)) for _, run in members])

    def shares(key: str) -> str:
        mean, deviation = over(key)
        return f"{percent(mean)} ± {percent(deviation)}"

    names = ", ".join(name for name, _ in members)
    return [text(names), str(len(members)), shares("test_accuracy"), shares("test_accuracy_tta"),
            duration(over("train_seconds")[0])]  # fmt: skip


def differences(runs: Mapping[str, RunData]) -> str:
    """The settings, hardware and versions in which the runs differ."""
    described = {name: flat(run) for name, run in runs.items()}
    keys = sorted({key for values in described.values() for key in values})
    rows = [
        [text(key.replace("_", " ")), *(text(values.get(key, "–")) for values in described.values())]
        for key in keys
        if len({str(values.get(key, "–")) for values in described.values()}) > 1
    ]
    if not rows:
        return section("Settings that differ", "None.")
    return section("Settings that differ", "", table(["setting", *runs], rows))


def flat(run: RunData) -> dict[str, object]:
    about = {name: run.config.get(name) for name in ("recipe", "world_size", "device_name", "precision", "git_commit")}
    return {
        **{k: v for k, v in run.settings.items() if k not in NOT_COMPARED - {"seed"}},
        **about,
        **(run.config.get("versions") or {}),
    }
