"""How the report writes numbers, durations, sizes and dates, in figures and tables alike."""

import math
from datetime import UTC, datetime

NOTHING = "–"


def perplexity(value: float | None, spare: int = 0) -> str:
    """About four significant digits, `spare` fewer if room is short; large values as 3.0×10⁴⁰."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if value >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}×10" + str(int(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    digits = 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:,.{max(0, digits - spare)}f}"


def interval(low: float | None, high: float | None) -> str:
    """Two perplexities as `2.77 to 2.97`; nothing if either is missing."""
    return "" if low is None or high is None else f"{perplexity(low)} to {perplexity(high)}"


def percent(value: float | None) -> str:
    """A signed share with one decimal and a minus sign, not a hyphen."""
    return NOTHING if value is None else f"{value:+.1f}%".replace("-", "−")


def count(value: float | None) -> str:
    """Thousands separated: 49,152."""
    return NOTHING if value is None else f"{value:,.0f}"


def short_count(value: float) -> str:
    """For axes: 0, 500, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    """45.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def gibibytes(value: float | None) -> str:
    """0.91 GiB, 14.2 GiB."""
    return NOTHING if value is None else f"{value:.2f} GiB" if value < 10 else f"{value:.1f} GiB"


def small(value: float | None) -> str:
    """A learning rate: 0.003, 3e-5."""
    return NOTHING if value is None else f"{value:g}".replace("e-0", "e-")


def moment(iso: str) -> str:
    """23 November 2026, 10:00 UTC; text that is not an ISO date is returned unchanged."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when.astimezone(UTC) if when.tzinfo else when:%-d %B %Y, %H:%M}" + (" UTC" if when.tzinfo else "")


def hours(value: float | None) -> str:
    """Three significant digits."""
    return NOTHING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def dollars(value: float | None) -> str:
    """$1,234.50; less than a cent is `under $0.01`."""
    return NOTHING if value is None else f"${value:,.2f}" if value == 0 or value >= 0.01 else "under $0.01"
