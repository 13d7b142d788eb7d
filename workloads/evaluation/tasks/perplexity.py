"""Perplexity over held-out documents at several lengths, by two rules (see ``workloads.evaluation.windows``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from workloads.data import Corpus
from workloads.errors import InputError
from workloads.evaluation import pictures
from workloads.evaluation.documents import ScoredDocument, documents_to_score
from workloads.evaluation.intervals import (
    FEWEST_DOCUMENTS,
    DocumentScores,
    perplexity_interval,
    subsampling_error,
)
from workloads.evaluation.options import CommonOptions
from workloads.evaluation.task import EvaluationTask, Result, Run

if TYPE_CHECKING:
    from workloads.evaluation.subject import Subject


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(CommonOptions):
    """The documents that are scored, and how they are cut into windows."""

    data: str = "builtin:stdlib"
    """perplexity: builtin:stdlib, a file or folder of .txt, .md, .tex, .jsonl or .parquet, or a Hugging Face id."""
    text_column: str | None = None
    """perplexity: column of .jsonl, .parquet and Hugging Face data that holds the text."""
    split: Literal["validation", "all"] = "validation"
    """perplexity: documents that a sweep on this corpus holds out, or all (of a corpus not trained on, such as a
    sweep's --eval-data)."""
    holdout: float | None = None
    """perplexity: the share of documents that the sweep held out, if it was given one."""
    documents: int = 100
    """perplexity: the most documents to score; where fewer are long enough, further spans of theirs follow."""
    span: int | None = None
    """perplexity: tokens scored of each document, from its start; by default the longest length (--stride: twice)."""
    stride: int | None = None
    """perplexity: tokens between windows' starts (the paper: 256, a forward each); by default they do not overlap."""
    last_tokens: int = 256
    """perplexity: tokens of each window that the rule 'last' scores."""
    max_windows: int | None = None
    """perplexity: score a random part of the windows of each length, and report the error of that."""
    batch_tokens: int = 8192
    """perplexity: about how many tokens one forward takes."""

    def __post_init__(self) -> None:
        """Checks the values."""
        self._require_positive("documents", "span", "stride", "last_tokens", "max_windows", "batch_tokens")
        if self.stride and self.lengths and self.stride > min(self.lengths):
            raise InputError(
                f"--stride {self.stride} is longer than the shortest length, {min(self.lengths)}: tokens between its "
                f"windows would never be scored. Give at most {min(self.lengths)}"
            )
        super().__post_init__()


def _prepare(subject: Subject, options: PerplexityOptions, console: Console) -> Run:
    """Prepares windows of documents, to be scored by the rules ``all`` and ``last``."""
    from workloads.evaluation.time_estimate import print_cost, progress  # imports torch, which --help does not need
    from workloads.evaluation.windows import cut_windows, score_windows

    longest = max(subject.lengths)
    span = options.span or (2 * longest if options.stride else longest)
    if span < longest:
        raise InputError(f"--span {span:,}: expected at least the longest length, {longest:,}")
    corpus = Corpus.parse(options.data, options.text_column, holdout=options.holdout)
    documents = documents_to_score(
        corpus, subject.tokenizer, span, options.documents, held_out_only=options.split == "validation"
    )
    if len(documents) < options.documents:
        console.print(
            f"note: only {len(documents)} of the {options.documents} requested documents have {span:,} tokens; further "
            "spans of them are scored where they are longer"
        )
    if len(documents) < FEWEST_DOCUMENTS:
        console.print(
            f"note: {len(documents)} scored documents are too few for an interval; expected at least {FEWEST_DOCUMENTS}"
        )
    if len(subject.lengths) > 1 and not options.stride:
        console.print(
            f"note: if windows do not overlap, their last {options.last_tokens} tokens differ between lengths; compare "
            f"lengths by every token, or with --stride {options.last_tokens}"
        )
    generator = np.random.default_rng(options.seed)
    cut = {}
    for length in subject.lengths:
        windows, owner = cut_windows(
            [document.tokens for document in documents], length, min(options.stride or length, length)
        )
        kept = np.arange(len(windows))
        if options.max_windows and options.max_windows < len(windows):
            kept = np.sort(generator.choice(len(windows), options.max_windows, replace=False))
        cut[length] = windows[kept], owner[kept], len(windows)
    counts = {length: len(windows) for length, (windows, _, _) in cut.items()}
    cost = print_cost(subject, "perplexity", counts, 0, console)

    def run() -> Result:
        rows = []
        with progress(console, cost.tokens) as advance:
            for length, (windows, owner, num_windows) in cut.items():
                scored = {"all": length - 1, "last": min(options.last_tokens, length - 1)}

                def on_progress(num_windows: int, length: int = length) -> None:
                    advance(num_windows * length)

                nll = score_windows(
                    subject.model, windows, list(scored.values()), subject.engine, options.batch_tokens, on_progress
                )
                rows.append(_row(documents, length, owner, nll, scored, num_windows))
        return {
            "rules": {
                "all": "every token of each window but its first",
                "last": f"the last {options.last_tokens} tokens of each window",
            },
            "data": {
                "name": corpus.name,
                "identity": corpus.identity(),
                "split": options.split,
                "documents": len(documents),
                "span": span,
                "stride": options.stride,
            },
            "cost": vars(cost),
            "lengths": rows,
        }

    return run


def _row(
    documents: list[ScoredDocument],
    length: int,
    owner: np.ndarray,
    nll: np.ndarray,
    scored: dict[str, int],
    num_windows: int,
) -> dict[str, Any]:
    """The results of one length: each rule's perplexity over all documents, and each document's summed nll.

    Args:
        owner: each scored window's document by index, (windows,).
        nll: its scores, (windows, rules).
        scored: the tokens that each rule scores of a window.
        num_windows: of which the scored ones were drawn.
    """
    row: dict[str, Any] = {"length": length, "windows": num_windows, "windows_scored": len(owner), "rules": {}}
    per_document: list[dict[str, Any]] = [{"name": document.name} for document in documents]
    for rule, (name, num_scored) in enumerate(scored.items()):
        scores = DocumentScores.of_windows(owner, nll[:, rule], num_scored, len(documents))
        for entry, document_nll, tokens in zip(per_document, scores.nll.tolist(), scores.tokens.tolist()):
            entry[name] = {"nll": document_nll, "tokens": tokens}
        interval = perplexity_interval(scores)
        row["rules"][name] = {
            "perplexity": interval.value,
            "low": interval.low,
            "high": interval.high,
            "tokens": int(scores.tokens.sum()),
            "subsampling_error": subsampling_error(nll[:, rule], num_scored, num_windows),
        }
    return row | {"documents": [entry for entry in per_document if entry["all"]["tokens"]]}


def _table(result: Result) -> tuple[str, Table]:
    """A heading, and one row a length; each rule's perplexity with its interval over documents."""
    data, rules = result["data"], result["rules"]
    table = Table(box=None, pad_edge=False)
    heading = (
        f"\nPerplexity of {result['model']['label']} on {data['documents']} documents of {data['name']}, "
        f"{result['confidence']:.0%} intervals over documents"
    )
    subsampled = any(row["windows_scored"] < row["windows"] for row in result["lengths"])
    table.add_column("length", justify="right")
    table.add_column("windows", justify="right")
    for text in rules.values():
        table.add_column(text, justify="right")
        table.add_column("interval", justify="right")
        if subsampled:
            table.add_column("subsampling", justify="right")
    for row in result["lengths"]:
        whole = row["windows_scored"] == row["windows"]
        windows = f"{row['windows']:,}" if whole else f"{row['windows_scored']:,} of {row['windows']:,}"
        cells = [f"{row['length']:,}", windows]
        for rule in rules:
            score = row["rules"][rule]
            known = score["low"] is not None
            cells += [f"{score['perplexity']:,.3f}", f"{score['low']:,.3f} to {score['high']:,.3f}" if known else "-"]
            if subsampled:
                cells.append(f"± {score['subsampling_error']:.1%}")
        table.add_row(*cells)
    return heading, table


def _picture(result: Result, path: Path) -> Path:
    """Perplexity against length, a line for each rule, with intervals over documents."""
    lengths = [row["length"] for row in result["lengths"]]
    with pictures.style():
        figure, axes = pictures.figure(
            result, "Perplexity by length", 470, 308,
            f"{result['data']['name']}, {result['data']['documents']} documents, full attention; "
            f"{result['confidence']:.0%} intervals",
        )  # fmt: skip
        for (rule, text), colour, marker in zip(result["rules"].items(), (pictures.BLUE, pictures.ORANGE), "os"):
            scores = [row["rules"][rule] for row in result["lengths"]]
            values = [score["perplexity"] for score in scores]
            if len(lengths) == 1:
                _single_score(axes, lengths[0], scores[0], text, colour, marker, left=rule == "all")
                continue
            if all(score["low"] is not None for score in scores):
                low, high = ([score[end] for score in scores] for end in ("low", "high"))
                axes.fill_between(lengths, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(lengths, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=text)
        everything = [row["rules"][rule]["perplexity"] for row in result["lengths"] for rule in result["rules"]]
        if max(everything) > 4 * min(everything):
            axes.set_yscale("log")
            axes.set_yticks(pictures.plain_ticks(*axes.get_ylim()))
            axes.set_yticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, axis="y")
        axes.set_ylabel("perplexity per token" + (", log scale" if axes.get_yscale() == "log" else ""))
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(4 / 470, 1 - 50 / 308),
            ncols=2,
            frameon=False,
            fontsize=9,
            handlelength=1.6,
        )
        pictures.length_axis(axes, lengths, result)
        return pictures.save(figure, path)


def _single_score(
    axes: Any, length: int, score: dict[str, Any], rule: str, colour: str, marker: str, left: bool
) -> None:
    """Draws a point a rule, side by side, with interval and value: one length has no line and no band."""
    place, side = (length / 1.02, -1) if left else (length * 1.02, 1)
    if score["low"] is not None:
        axes.plot([place, place], [score["low"], score["high"]], color=colour, linewidth=3, alpha=0.3)
    axes.plot([place], [score["perplexity"]], marker, color=colour, markersize=5, label=rule)
    axes.annotate(
        f"{score['perplexity']:,.3f}", (place, score["perplexity"]), (8 * side, 0), "data", "offset points",
        ha="right" if left else "left", va="center", color=colour,
    )  # fmt: skip


PERPLEXITY = EvaluationTask(
    name="perplexity", options=PerplexityOptions, prepare=_prepare, table=_table, picture=_picture
)
