"""How the report formats figures: percentages, durations, quantities, and a dash for an unknown value."""

import math

from data_prep.json_fields import Setting

NOTHING = "\N{EN DASH}"  # shown in place of an unknown figure


def percent(share: float | None, digits: int = 2) -> str:
    return NOTHING if share is None or math.isnan(share) else f"{share:.{digits}%}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def quantity(value: float | None, unit: str = "") -> str:
    if value is None:
        return NOTHING
    number = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{number} {unit}".strip()


def four_digits(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def plain(value: Setting) -> str:
    """The value of a setting as text. The values of a list are separated by spaces."""
    if isinstance(value, list):
        return " ".join(map(plain, value))
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
