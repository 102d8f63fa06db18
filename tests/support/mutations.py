"""Makes damaged and hostile variants of JSON files. The same seed gives the same variants."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "-f",
        "\x1b[31mred\x1b[0m",
        "a\nb\tc\r",
        "\u202egnp.exe",
        "\ud800",
        "`$(id)`",
        "--><script>",
        "x" * 5000,
    ),
    *([], {}, [None], [1, [2]], {"a": {"b": []}}, ["a"] * 300, [0.5, 0.5, 0.5], [1, 1, 1, 1], [10**6] * 4),
)


def mutations(content: str, count: int, seed: int) -> Iterator[str]:
    """Yields `count` variants of the text of a JSON or JSON-lines file."""
    rng = random.Random(seed)
    for _ in range(count):
        change = rng.choice([_replace_value, _replace_value, _replace_value, _remove, _damage_text, _nest])
        yield change(content, rng)


def _replace_value(content: str, rng: random.Random) -> str:
    return _edit(content, rng, lambda holder, key: holder.__setitem__(key, copy.deepcopy(rng.choice(VALUES))))


def _remove(content: str, rng: random.Random) -> str:
    return _edit(content, rng, lambda holder, key: holder.__delitem__(key))


def _nest(content: str, rng: random.Random) -> str:
    """Replaces a value with nested lists, sometimes nested too deeply for a recursive parser."""
    depth = rng.choice([40, 100_000])
    return _edit(content, rng, lambda holder, key: holder.__setitem__(key, "NESTED")).replace(
        '"NESTED"', "[" * depth + "]" * depth
    )


def _damage_text(content: str, rng: random.Random) -> str:
    start = rng.randrange(len(content))
    stop = min(start + rng.randrange(1, 20), len(content))
    return content[:start] + rng.choice(["", "\0", "{", "9" * 5000, "}\n{", "\n\n"]) + content[stop:]


def _edit(content: str, rng: random.Random, change: Any) -> str:
    """Applies `change` to a random value at any depth. In a JSON-lines file, the value is from a random line."""
    lines = content.splitlines() if content.count("\n{") else [content]
    number = rng.randrange(len(lines))
    parsed = {"": json.loads(lines[number])}
    holder, key = rng.choice(list(_places(parsed)))
    change(holder, key)
    lines[number] = json.dumps(parsed.get("", "gone"))
    return "\n".join(lines) + "\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) for every value inside `value`."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children):
        yield value, key
        yield from _places(child)


def write_text(path: Path, content: str) -> None:
    """Writes `content`; lone surrogates become bytes that are not valid UTF-8."""
    path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
