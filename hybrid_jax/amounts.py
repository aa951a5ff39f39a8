"""Amounts as people write them."""


def count(number: int, one: str) -> str:
    """So many things: "1 step", "2,000 steps"."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds: "42 s", "12 min", "3 h 20 min", "5 days 2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


def quantity(number: float) -> str:
    """A number of which three figures are enough: 950, 12.3k, 4.56M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def gigabytes(size: int) -> str:
    """Bytes: "4.2 GB", "17.0 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
