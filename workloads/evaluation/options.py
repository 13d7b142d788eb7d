"""The options of ``python -m workloads.evaluate``. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from workloads.config import Positions
from workloads.errors import InputError

Task = Literal["perplexity", "passkey", "topics"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """One model and how it is evaluated."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """builtin:tiny, a folder (model, exported adapter, or trial), or a Hugging Face id."""
    tasks: tyro.conf.Positional[tuple[Task, ...]] = ("perplexity",)
    """What to evaluate: perplexity, passkey, topics; one or several."""
    lengths: tuple[int, ...] = ()
    """In tokens; by default the model's own. A shorter original context length is added, to show a loss there."""
    positions: Positions = "none"
    """How positions are extended to the longest length: none (as the model is), linear, yarn. A trial has its own."""

    checkpoint: str = "last"
    """Of a trial: last; best (the lowest perplexity at the trained length); or a step."""

    data: str = "builtin:stdlib"
    """perplexity: builtin:stdlib, a file or folder of .txt, .md, .tex, .jsonl or .parquet, or a Hugging Face id."""
    text_column: str | None = None
    """perplexity: column of .jsonl, .parquet and Hugging Face data that holds the text."""
    split: Literal["validation", "all"] = "validation"
    """perplexity: documents that a sweep on this corpus holds out, or all (of a corpus not trained on)."""
    documents: int = 100
    """perplexity: the most documents to score."""
    span: int | None = None
    """perplexity: tokens scored of each document, from its start; by default the longest length (--stride: twice)."""
    stride: int | None = None
    """perplexity: tokens between windows' starts (the paper: 256, a forward each); by default they do not overlap."""
    last_tokens: int = 256
    """perplexity: tokens of each window that the rule 'last' scores."""
    max_windows: int | None = None
    """perplexity: score a random part of the windows of each length, and report the error of that."""

    tests: int = 10
    """passkey, topics: prompts of each length (the paper: 10); with LongChat's cases, of each file."""
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """passkey: where the key is hidden, in percent of the filler before it; tests cycle through them."""
    form: Literal["topics", "lines"] = "topics"
    """topics: generate conversations and ask for the first topic, or lines and ask for one line's number."""
    cases: Path | None = None
    """topics: LongChat's own cases instead (a .jsonl file, or a folder of them), up to the longest of --lengths."""
    chat: bool = False
    """passkey, topics: put prompts into the tokenizer's chat template."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    batch_tokens: int = 8192
    """perplexity: about how many tokens one forward takes."""
    seed: int = 0
    """Of hidden keys, generated records, and the choice of windows."""
    output: Path = Path("evaluation")
    """Folder for the results, one JSON file and one picture a task; results of other options are kept."""
    dry_run: bool = False
    """Print the cost, and stop."""

    def __post_init__(self) -> None:
        for field in ("documents", "span", "stride", "last_tokens", "max_windows", "tests", "batch_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(f"--{field.replace('_', '-')} {value}: expected a positive number")
        if short := [length for length in self.lengths if length < 2]:
            raise InputError(f"--lengths {short[0]}: expected at least 2 tokens, since a window's first is not scored")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise InputError(f"--depths {' '.join(map(str, self.depths))}: expected percentages from 0 to 100")
        if self.stride and self.lengths and self.stride > min(self.lengths):
            raise InputError(
                f"--stride {self.stride} is longer than the shortest length, {min(self.lengths)}: tokens between its "
                f"windows would never be scored. Give at most {min(self.lengths)}"
            )
