"""Injects faults many times: kills, signals, damaged files and broken ranks. `python -m tests.soak [--kills N ...]`

Prints a table with a row for each kind of fault: what must happen after it (the promise), how often the fault was
injected ("tried"), and how often the promise was broken ("lost"). The exit status is 1 if any promise was broken.
`make soak` runs all parts, and `make test` runs a short form of them.
"""

import argparse
import functools
import random
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.results import count_usable_gpus
from tests.soak import damage, fuzz, launchers, ranks, stops
from tests.soak.outcome import Outcome, table, write_outcomes

PARTS = ("damage", "fuzz", "kills", "signals", "launchers", "ranks", "counts")
# Signals are also tested with four processes: with two, the order of summation cannot affect the gradients.
PROCESSES = {"kills": (1, 2), "signals": (1, 2, 4)}


def main() -> int:
    options = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    rng = random.Random(options.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = prepare(folder)
        for part in options.parts:
            outcomes += run_part(part, data, folder, options, rng)
            print(table(outcomes), flush=True)
            if options.result:
                write_outcomes(options.result, outcomes, device=options.device, seed=options.seed)
    return int(any(outcome.losses for outcome in outcomes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="number of kills for each number of processes")
    parser.add_argument(
        "--signals",
        type=int,
        default=10,
        help="number of signals for each number of processes",
    )
    parser.add_argument("--launched", type=int, default=6, help="number of signals to real launchers")
    parser.add_argument(
        "--damages", type=int, default=210, help="number of damaged checkpoints, and of damaged datasets"
    )
    parser.add_argument("--mutations", type=int, default=20_000, help="number of mutations of a beton file")
    parser.add_argument(
        "--ranks",
        type=int,
        default=2,
        help="repetitions of each fault: a rank is killed, is frozen, or raises an error",
    )
    parser.add_argument("--world-sizes", type=int, nargs="*", default=[1, 2, 3, 4, 7])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device of the runs in the parts damage, kills and signals",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, help="write the table here as JSON")
    return parser.parse_args()


def prepare(folder: Path) -> Path:
    """Writes a dataset of 96 training and 40 test images.

    Also imports and compiles what a trainer needs, because most trainers are forked from this process.
    """
    import torch

    import tests.support.workers.preloaded  # noqa: F401
    from data_prep.dataset import write_dataset
    from data_prep.sources.synthetic import draw_synthetic

    torch.set_num_threads(1)  # in all runs, because the number of threads affects the weights
    data = folder / "data"
    write_dataset(draw_synthetic(train_count=96, test_count=40, seed=1), data)
    return data


@functools.cache
def scene_of(data: Path, folder: Path, processes: int, device: str) -> stops.Scene:
    """Returns the uninterrupted run with this number of processes. Stopped runs are compared with it.

    Cached, so that the run takes place only once.
    """
    return stops.Scene(data, folder, processes, device)


def process_counts(part: str, device: str) -> list[int]:
    """Returns the numbers of processes to use in a part. With --device cuda, each process needs its own GPU."""
    most = count_usable_gpus() if device == "cuda" else max(PROCESSES[part])
    return [processes for processes in PROCESSES[part] if processes <= most]


def run_part(part: str, data: Path, folder: Path, options: argparse.Namespace, rng: random.Random) -> list[Outcome]:
    if part == "damage":
        scene = scene_of(data, folder, 1, options.device)
        return [
            damage.damaged_checkpoints(scene.whole / "checkpoints", options.damages, rng),
            damage.damaged_datasets(data, options.damages, rng),
        ]
    if part == "fuzz":
        return [fuzz.fuzzed_betons(folder, options.mutations, options.seed)]
    if part in ("kills", "signals"):
        work = stops.killed_runs if part == "kills" else stops.signalled_runs
        scenes = [scene_of(data, folder, count, options.device) for count in process_counts(part, options.device)]
        return [work(scene, getattr(options, part), rng) for scene in scenes]
    if part == "launchers":
        return [launchers.signalled_launchers(data, folder, options.launched, rng)]
    if part == "ranks":
        return ranks.broken_ranks(data, folder, options.ranks, rng)
    return [ranks.exact_counts(data, folder, options.world_sizes)]


if __name__ == "__main__":
    sys.exit(main())
