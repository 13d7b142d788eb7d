"""The options that all evaluations share. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from workloads.errors import InputError
from workloads.models.positions import Positions


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """One model, and what all evaluations need to know.

    Raises:
        InputError: an option has a value that cannot work.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """builtin:tiny, a folder (model, exported adapter, or trial), or a Hugging Face id."""
    tasks: tyro.conf.Positional[tuple[str, ...]] = ("perplexity",)
    """What to evaluate."""
    lengths: tuple[int, ...] = ()
    """In tokens; by default the model's own. A shorter original context length is added, to show a loss there."""
    positions: Positions = "none"
    """How positions are extended to the longest length; none: as the model is. A trial has its own."""
    original_length: int | None = None
    """Tokens that the model was pretrained on, where its config.json leaves that open. A trial has its own."""
    checkpoint: str = "last"
    """Of a trial: last; best (the lowest perplexity at the trained length); or a step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of hidden keys, generated records, and the choice of windows."""
    output: Path = Path("evaluation")
    """Folder for the results, one JSON file and one picture a task; results of other options are kept."""
    dry_run: bool = False
    """Print the cost, and stop."""

    def __post_init__(self) -> None:
        """Checks the values; a subclass checks its own and calls this."""
        self._require_positive("original_length")
        if short := [length for length in self.lengths if length < 2]:
            raise InputError(f"--lengths {short[0]}: expected at least 2 tokens, since a window's first is not scored")

    def _require_positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(f"--{field.replace('_', '-')} {value}: expected a positive number")
