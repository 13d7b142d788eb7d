"""How the report writes names and numbers: one place, so that figures and tables read alike."""

import math
from datetime import UTC, datetime

METHODS = {"full": "Full", "lora": "LoRA", "lora+norm": "LoRA+norm", "lora+embed": "LoRA+embed", "lora+": "LoRA+"}
EXPLAINED = {
    "full": "the weights themselves train",
    "lora": "low-rank updates of the attention weights train",
    "lora+norm": "low-rank updates train, and norms too",
    "lora+embed": "low-rank updates train, and embeddings too",
    "lora+": "low-rank updates train, and embeddings and norms too "
    "(the LongLoRA paper's improved LoRA, not the optimiser of that name)",
}
NOTHING = "–"


def method(name: str) -> str:
    return METHODS.get(name, name)


def perplexity(value: float | None, spare: int = 0) -> str:
    """About four significant digits, `spare` fewer where room is short, and never an exponent's letter."""
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
    return "" if low is None or high is None else f"{perplexity(low)} to {perplexity(high)}"


def percent(value: float | None) -> str:
    """A signed share with one decimal, and a true minus."""
    return NOTHING if value is None else f"{value:+.1f}%".replace("-", "−")


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def short_count(value: float) -> str:
    """For axes: 0, 500, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def gibibytes(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} GiB" if value < 10 else f"{value:.1f} GiB"


def small(value: float | None) -> str:
    """A learning rate: 0.003, 3e-5."""
    return NOTHING if value is None else f"{value:g}".replace("e-0", "e-")


def moment(iso: str) -> str:
    """23 November 2026, 10:00 UTC; what is no ISO date stays as it is."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when.astimezone(UTC) if when.tzinfo else when:%-d %B %Y, %H:%M}" + (" UTC" if when.tzinfo else "")


def trial_names(trials: list[dict]) -> list[str]:
    """A method's name; where a method has several trials, what tells them apart: learning rate, seed, fingerprint."""

    def name(trial: dict) -> str:
        siblings = [other for other in trials if other["method"] == trial["method"]]
        texts = {"learning_rate": f"lr {small(trial['learning_rate'])}", "seed": f"seed {trial.get('seed')}"}
        differing = [key for key in texts if len({other.get(key) for other in siblings}) > 1]
        alike = sum(all(other.get(key) == trial.get(key) for key in differing) for other in siblings)
        own = [trial["fingerprint"][:6]] if alike > 1 else []
        return " ".join([method(trial["method"]), *(texts[key] for key in differing), *own])

    return [name(trial) for trial in trials]


def hours(value: float | None) -> str:
    """Three significant digits."""
    return NOTHING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def dollars(value: float | None) -> str:
    return NOTHING if value is None else f"${value:,.2f}" if value == 0 or value >= 0.01 else "under $0.01"
