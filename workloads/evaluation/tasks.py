"""The tasks of ``python -m workloads.evaluate``: each prepares prompts or windows and prints its cost, then runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from workloads.data import Corpus
from workloads.errors import InputError
from workloads.evaluation import tables
from workloads.evaluation.bootstrap import (
    DocumentScores,
    accuracy_interval,
    perplexity_interval,
    subsampling_error,
)
from workloads.evaluation.cost import Cost, forward_cost, seconds_per_forward
from workloads.evaluation.documents import ScoredDocument, documents_to_score
from workloads.evaluation.options import Options, Task
from workloads.evaluation.passkey import passkey_tests
from workloads.evaluation.perplexity import by_document, cut_windows, score_windows
from workloads.evaluation.retrieval import Prompter, RetrievalResult, RetrievalTest, run_tests
from workloads.evaluation.subject import Subject
from workloads.evaluation.topics import generated_tests, longchat_tests

# Runs a prepared task and returns its results, as they are written.
Run = Callable[[], dict[str, Any]]


def perplexity(subject: Subject, options: Options, console: Console) -> Run:
    """Prepares windows of documents, to be scored by the rules ``all`` and ``last``."""
    longest = max(subject.lengths)
    span = options.span or (2 * longest if options.stride else longest)
    if span < longest:
        raise InputError(f"--span {span:,}: expected at least the longest length, {longest:,}")
    corpus = Corpus.parse(options.data, options.text_column)
    documents = documents_to_score(
        corpus, subject.tokenizer, span, options.documents, held_out_only=options.split == "validation"
    )
    if len(documents) < options.documents:
        console.print(
            f"note: only {len(documents)} of the {options.documents} requested documents have {span:,} tokens"
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
    cost = _print_cost(subject, "perplexity", counts, 0, console)

    def run() -> dict[str, Any]:
        rows = []
        with _progress(console, cost.tokens) as advance:
            for length, (windows, owner, num_windows) in cut.items():
                scored = {"all": length - 1, "last": min(options.last_tokens, length - 1)}

                def on_progress(num_windows: int, length: int = length) -> None:
                    advance(num_windows * length)

                nll = score_windows(
                    subject.model, windows, list(scored.values()), subject.engine, options.batch_tokens, on_progress
                )
                rows.append(_perplexity_row(documents, length, owner, nll, scored, num_windows))
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


def _perplexity_row(
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
        scores = by_document(owner, nll[:, rule], num_scored, len(documents))
        for entry, document_nll, tokens in zip(per_document, scores.nll.tolist(), scores.tokens.tolist()):
            entry[name] = {"nll": document_nll, "tokens": tokens}
        sampled = scores.tokens > 0
        interval = perplexity_interval(DocumentScores(scores.nll[sampled], scores.tokens[sampled]))
        several = int(sampled.sum()) > 1  # one document shows no spread between documents
        row["rules"][name] = {
            "perplexity": interval.value,
            "low": interval.low if several else None,
            "high": interval.high if several else None,
            "tokens": int(scores.tokens.sum()),
            "subsampling_error": subsampling_error(nll[:, rule], num_scored, num_windows),
        }
    return row | {"documents": [entry for entry in per_document if entry["all"]["tokens"]]}


def passkey(subject: Subject, options: Options, console: Console) -> Run:
    """Prepares passkey prompts of each length."""
    prompter = Prompter(subject.tokenizer, options.chat)
    depths = [depth / 100 for depth in options.depths]

    def make(length: int) -> list[RetrievalTest]:
        return passkey_tests(prompter, [length], depths, options.tests, options.seed)

    return _retrieve(subject, options, console, "passkey", _of_each_length(subject, options, console, make))


def topics(subject: Subject, options: Options, console: Console) -> Run:
    """Prepares topic or line prompts: generated ones of each length, or LongChat's cases."""
    prompter = Prompter(subject.tokenizer, options.chat)
    if options.cases is None:

        def make(length: int) -> list[RetrievalTest]:
            return generated_tests(prompter, options.form, [length], options.tests, options.seed)

        tests = _of_each_length(subject, options, console, make)
        return _retrieve(subject, options, console, f"generated {options.form}", tests)
    tests = longchat_tests(prompter, options.cases, options.tests)
    short = [test for test in tests if test.length <= max(subject.lengths)]
    if len(short) < len(tests):
        console.print(
            f"note: {len(tests) - len(short)} of {len(tests)} cases are left out: they are longer than "
            f"{max(subject.lengths):,} tokens"
        )
    if not short:
        raise InputError(
            f"--cases {options.cases}: the shortest case has {min(test.length for test in tests):,} tokens, more than "
            f"the longest length, {max(subject.lengths):,}; give longer --lengths"
        )
    return _retrieve(subject, options, console, f"LongChat's cases, {options.cases.name}", short)


# Each raises InputError for what cannot work, prints its cost, and returns a function that runs it.
TASKS: dict[Task, Callable[[Subject, Options, Console], Run]] = {
    "perplexity": perplexity,
    "passkey": passkey,
    "topics": topics,
}


def _of_each_length(
    subject: Subject, options: Options, console: Console, make: Callable[[int], list[RetrievalTest]]
) -> list[RetrievalTest]:
    """Tests of every length. The original length, if it was only added, may be too short for a prompt."""
    tests: list[RetrievalTest] = []
    for length in subject.lengths:
        try:
            tests += make(length)
        except InputError as error:
            if length in options.lengths or len(subject.lengths) == 1:
                raise
            console.print(f"note: no tests at the original length: {error}")
    return tests


def _retrieve(subject: Subject, options: Options, console: Console, what: str, tests: list[RetrievalTest]) -> Run:
    """Runs the tests: accuracy by group, and by depth within it."""
    counts = Counter(len(test.tokens) for test in tests)
    cost = _print_cost(subject, what, counts, max(test.answer_tokens for test in tests), console)

    def run() -> dict[str, Any]:
        with _progress(console, cost.tokens) as advance:
            results = run_tests(
                subject.model, subject.tokenizer, tests, subject.engine,
                on_progress=lambda test: advance(len(test.tokens)),
            )  # fmt: skip
        return {
            "what": what,
            "rule": "greedy answer contains what was hidden; length counts the prompt and the room for the answer",
            "chat": options.chat,
            "cost": vars(cost),
            "lengths": _accuracies(results),
            "answers": [result.to_dict() for result in results],
        }

    return run


def _accuracies(results: list[RetrievalResult]) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(result.group for result in results):
        mine = [result for result in results if result.group == group]
        interval = accuracy_interval(sum(result.correct for result in mine), len(mine))
        cells = {}
        for depth in sorted({result.depth for result in mine}):
            cell = [result.correct for result in mine if result.depth == depth]
            cells[depth] = {"depth": depth, "correct": sum(cell), "tests": len(cell)}
        rows.append(
            {
                "group": group,
                "length": round(np.mean([result.length for result in mine])),
                "correct": sum(result.correct for result in mine),
                "tests": len(mine),
                "accuracy": interval.value,
                "low": interval.low,
                "high": interval.high,
                "depths": list(cells.values()),
            }
        )
    return rows


def _print_cost(subject: Subject, what: str, counts: dict[int, int], answer_tokens: int, console: Console) -> Cost:
    """Prints the cost of the forwards of ``counts`` (length to number) before they run."""
    seconds = seconds_per_forward(subject.model, counts, subject.engine, logits_to_keep=1 if answer_tokens else 0)
    cost = forward_cost(subject.model, counts, seconds)
    answers = f", and after each an answer of up to {answer_tokens} tokens" if answer_tokens else ""
    console.print(
        f"{what}: {cost.tokens:,} tokens to forward in {cost.forwards:,} sequences{answers}; "
        f"{cost.flops / 1e12:,.2f} TFLOP, {cost.attention_flops / cost.flops:.0%} of it attention; about "
        f"{tables.duration(cost.seconds)}, by one forward at the shortest and the longest length"
    )
    return cost


@contextmanager
def _progress(console: Console, tokens: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokens", total=tokens)
        yield lambda done: progress.advance(task, done)
