"""Format names, bytes and durations for people."""

import re
from collections.abc import Sequence


def show_name(name: str) -> str:
    """Escape control characters in a name, as Python does, so that a terminal shows them on one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def show_first(items: Sequence[str], *, separator: str = ", ", limit: int = 5, of: int | None = None) -> str:
    """Join the first few items, and say how many more there are; `of` is their number if `items` are not all."""
    count = len(items) if of is None else of
    more = [f"{separator or ' '}and {count - limit:,} more"] if count > limit else []
    return separator.join(items[:limit]) + "".join(more)


def format_duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_bytes(text: str) -> int:
    """Parse `1500`, `512M` or `1.5G` (powers of 1024) as bytes.

    Raises:
        ValueError: it is something else, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.strip().upper(), re.ASCII)
    if not match or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"{text}: bytes above 0, with K, M or G if you like, such as 512M")
    return size


def parse_integers(text: str) -> tuple[int, ...]:
    """Return `5,48` as (5, 48).

    Raises:
        ValueError: it is something else.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{text}: whole numbers separated by commas, such as 5,48") from error


def format_bytes(size: int) -> str:
    """Write bytes in the largest unit that gives at least 1, rounded up to a tenth, so that the number is enough."""
    unit, scale = next(((u, s) for u, s in reversed(_UNITS.items()) if size >= s), ("", 1))
    tenths = -(-10 * size // scale)
    return f"{tenths // 10}{f'.{tenths % 10}' if tenths % 10 else ''}{unit}"
