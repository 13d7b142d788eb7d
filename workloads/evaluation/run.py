"""The tasks of ``python -m workloads.evaluate``: from options to results, told and written as they come."""

from __future__ import annotations

import itertools
import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers.utils import logging as transformers_logging

from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.config import Positions
from workloads.data import Corpus
from workloads.engines.allocator import keep_freed_memory
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.evaluation import pictures, tables
from workloads.evaluation.bootstrap import (
    CONFIDENCE,
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
from workloads.evaluation.topics import generated_tests, longchat_tests
from workloads.models.adapters import load_adapter
from workloads.models.positions import extended_by_longspan, is_extended, max_context_length, original_context_length
from workloads.models.source import ModelSource, check_vocabulary, is_adapter
from workloads.trained import TrainedTrial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Run = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """The model under evaluation. ``about`` is what the results say of it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    lengths: list[int]
    about: dict[str, Any]


def evaluate(options: Options, console: Console) -> list[Path]:
    """Runs every task, prints its table, and returns the files written.

    Raises:
        InputError: whatever the user gave that cannot work.
    """
    if options.cases and options.tasks == ("topics",) and not options.lengths:
        options = _with_lengths_of_cases(options)
    subject = load_subject(options, console)
    # What cannot work, of any task, is found before the first one runs.
    ready = {task: TASKS[task](subject, options, console) for task in dict.fromkeys(options.tasks)}
    files = []
    for task, run in {} if options.dry_run else ready.items():
        result = {"task": task, "model": subject.about, **run(), "seed": options.seed, "confidence": CONFIDENCE}
        result |= {"options": asked(options), "environment": environment(subject.engine)}
        for part in tables.TABLES[task](result):
            console.print(part)
        files += _write(result, task, options)
    return files


def load_subject(options: Options, console: Console) -> Subject:
    """The model on its device, its positions reaching the longest length.

    Raises:
        InputError: the model cannot be loaded, its positions are its own, or its tokenizer has more tokens than it has
            embeddings.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; leave the flag out to compute on the CPU")
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if not gpu:
        keep_freed_memory()
    precision = ("bfloat16" if gpu else "float32") if options.precision == "auto" else options.precision
    engine = Engine(torch.device("cuda" if gpu else "cpu"), precision)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is wrong with a model is said in one error
    path = Path(options.model)
    about: dict[str, Any] = {"name": options.model, "label": path.resolve().name if path.exists() else options.model}
    if (path / "trial.json").is_file():
        if options.positions != "none":
            raise InputError(f"--positions {options.positions}: a trial has its own positions; leave the flag out")
        trial = TrainedTrial.open(path)
        step = trial.step(unfinished=True, checkpoint=options.checkpoint)
        source, training = trial.base(), trial.training
        model = trial.build(source, step, engine)
        positions = training.positions
        about |= {"label": f"{Path(source.name).name}, {trial.label}", "base": source.name}
        about |= {"method": training.method, "step": step, "steps": training.steps}
        longest = max(options.lengths, default=training.context_length)
        if step < training.steps:
            console.print(f"note: {trial.describe_step(step, options.checkpoint)}")
    else:
        if options.checkpoint != "last":
            raise InputError(f"--checkpoint {options.checkpoint}: {options.model} is no trial's folder; leave it out")
        source = ModelSource.parse(options.model)
        longest = max(options.lengths, default=max_context_length(source.config()))
        positions = _positions(source.config(), longest, options, console)
        if is_adapter(Path(source.location)):
            model = load_adapter(Path(source.location), dtype=engine.dtype)
            use_pattern(model.get_base_model(), AttentionPattern(name="full"))
            about["base"] = model.peft_config["default"].base_model_name_or_path
        else:
            model = source.load(longest, positions, engine.dtype, device=engine.device)
            use_pattern(model, AttentionPattern(name="full"))
        model = model.to(engine.device)
    original = original_context_length(model.config)
    lengths = sorted({*(options.lengths or [longest]), *([original] if original < longest else [])})
    if longest > max_context_length(model.config):
        console.print(
            f"note: {longest:,} tokens lie beyond the {max_context_length(model.config):,} that this model's positions are made for"
            + ("" if is_extended(model.config) else "; --positions yarn or linear would stretch them")
        )
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, options.model)
    about |= {
        "identity": source.identity,
        "positions": positions,
        "original_context_length": original,
        "reach": max_context_length(model.config),
        "attention": "full",
    }
    return Subject(model, tokenizer, engine, lengths, about)


def _positions(config: Any, longest: int, options: Options, console: Console) -> Positions:
    """How the positions of a model that is no trial are to reach ``longest`` tokens.

    Raises:
        InputError: it was trained with extended positions of its own, which others would replace.
    """
    positions, reached = options.positions, max_context_length(config)
    if positions == "none":
        return "none"
    if longest <= reached:
        console.print(f"note: --positions {positions} changes nothing: the model reaches {reached:,} tokens as it is")
        return "none"
    if extended_by_longspan(config):
        raise InputError(
            f"--positions {positions}: this model was exported with positions of its own, made for {reached:,} tokens, "
            f"and would be another model with others. Give --lengths up to {reached:,}, or leave --positions out: "
            "beyond, it is then scored with the positions that it has"
        )
    if is_extended(config):
        original = original_context_length(config)
        console.print(
            f"note: the model comes with positions of its own, from {original:,} to {reached:,} tokens; --positions "
            f"{positions} replaces them by others, from {original:,} to {longest:,}, at every length that is scored"
        )
    return positions


def perplexity(subject: Subject, options: Options, console: Console) -> Run:
    longest = max(subject.lengths)
    span = options.span or (2 * longest if options.stride else longest)
    if span < longest:
        raise InputError(f"--span {span:,}: expected at least the longest length, {longest:,}")
    corpus = Corpus.parse(options.data, options.text_column)
    documents = documents_to_score(
        corpus, subject.tokenizer, span, options.documents, held_out_only=options.split == "validation"
    )
    if len(documents) < options.documents:
        console.print(f"note: {len(documents)} documents have {span:,} tokens, not {options.documents}")
    if len(subject.lengths) > 1 and not options.stride:
        console.print(
            f"note: where windows do not overlap, their last {options.last_tokens} tokens are others at each length; "
            f"compare lengths by every token, or with --stride {options.last_tokens}"
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
    cost = _say_cost(subject, "perplexity", counts, 0, console)

    def run() -> dict[str, Any]:
        rows = []
        with _progress(console, cost.tokens) as advance:
            for length, (windows, owner, num_windows) in cut.items():
                scored = {"all": length - 1, "last": min(options.last_tokens, length - 1)}
                nll = score_windows(
                    subject.model, windows, list(scored.values()), subject.engine, options.batch_tokens,
                    on_progress=lambda done, length=length: advance(done * length),
                )  # fmt: skip
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
    """What one length gave: each rule's perplexity over all documents, and each document's summed nll.

    ``owner`` (windows,) is the document of each scored window, ``nll`` (windows, rules) its scores, ``scored`` the
    tokens that each rule scores of a window, and ``num_windows`` how many there were to draw from.
    """
    row: dict[str, Any] = {"length": length, "windows": num_windows, "windows_scored": len(owner), "rules": {}}
    per_document: list[dict[str, Any]] = [{"name": document.name} for document in documents]
    for rule, (name, num_scored) in enumerate(scored.items()):
        scores = by_document(owner, nll[:, rule], num_scored, len(documents))
        for entry, document_nll, tokens in zip(per_document, scores.nll.tolist(), scores.tokens.tolist()):
            entry[name] = {"nll": document_nll, "tokens": tokens}
        sampled = scores.tokens > 0
        interval = perplexity_interval(DocumentScores(scores.nll[sampled], scores.tokens[sampled]))
        several = int(sampled.sum()) > 1  # the spread between documents cannot be told from one
        row["rules"][name] = {
            "perplexity": interval.value,
            "low": interval.low if several else None,
            "high": interval.high if several else None,
            "tokens": int(scores.tokens.sum()),
            "subsampling_error": subsampling_error(nll[:, rule], num_scored, num_windows),
        }
    return row | {"documents": [entry for entry in per_document if entry["all"]["tokens"]]}


def passkey(subject: Subject, options: Options, console: Console) -> Run:
    prompter = Prompter(subject.tokenizer, options.chat)
    depths = [depth / 100 for depth in options.depths]

    def make(length: int) -> list[RetrievalTest]:
        return passkey_tests(prompter, [length], depths, options.tests, options.seed)

    return _retrieve(subject, options, console, "passkey", _of_each_length(subject, options, console, make))


def topics(subject: Subject, options: Options, console: Console) -> Run:
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
            f"note: {len(tests) - len(short)} of {len(tests)} cases are left out: longer than "
            f"{max(subject.lengths):,} tokens"
        )
    if not short:
        raise InputError(
            f"--cases {options.cases}: the shortest case has {min(test.length for test in tests):,} tokens, more than "
            f"the longest length, {max(subject.lengths):,}; give longer --lengths"
        )
    return _retrieve(subject, options, console, f"LongChat's cases, {options.cases.name}", short)


# Each finds what cannot work and says what it will cost; what it returns runs it.
TASKS: dict[Task, Callable[[Subject, Options, Console], Run]] = {
    "perplexity": perplexity,
    "passkey": passkey,
    "topics": topics,
}


def _of_each_length(
    subject: Subject, options: Options, console: Console, make: Callable[[int], list[RetrievalTest]]
) -> list[RetrievalTest]:
    """Tests of every length; one that was added because it is the original length may be too short for a prompt."""
    tests: list[RetrievalTest] = []
    for length in subject.lengths:
        try:
            tests += make(length)
        except InputError as error:
            if length in options.lengths or len(subject.lengths) == 1:
                raise
            console.print(f"note: nothing is asked at the original length: {error}")
    return tests


def _retrieve(subject: Subject, options: Options, console: Console, what: str, tests: list[RetrievalTest]) -> Run:
    """Has the model answer the tests; accuracy by group, and by depth within it."""
    counts = Counter(len(test.tokens) for test in tests)
    cost = _say_cost(subject, what, counts, max(test.answer_tokens for test in tests), console)

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


def _with_lengths_of_cases(options: Options) -> Options:
    """LongChat's cases have lengths of their own, so positions have to reach the longest of them."""
    if (Path(options.model) / "trial.json").is_file():
        return options
    prompter = Prompter(ModelSource.parse(options.model).tokenizer(), options.chat)
    return replace(options, lengths=(max(t.length for t in longchat_tests(prompter, options.cases, options.tests)),))


def _say_cost(subject: Subject, what: str, counts: dict[int, int], answer_tokens: int, console: Console) -> Cost:
    """Prints what the forwards of ``counts`` (length to number) will take, before they are run."""
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


def _write(result: dict[str, Any], task: str, options: Options) -> list[Path]:
    path = Path(options.model)
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name if path.exists() else options.model).strip("-")
    stretched = options.positions != "none" and result["model"]["positions"] != "none"
    suffix = f"-{options.positions}" if stretched else ""
    options.output.mkdir(parents=True, exist_ok=True)
    path = _place(options.output, f"{task}-{name}{suffix}", result)
    path.write_text(json.dumps(result, indent=1))
    return [path, pictures.PICTURES[task](result, path.with_suffix(".png"))]


def _place(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Where a result goes: ``name.json``, else ``name-2.json`` and so on, the first that is free or holds an earlier
    answer to the same question. What was found with other lengths, data or weights is kept.
    """
    question = json.loads(json.dumps([result["model"], result["options"]]))
    for number in itertools.count(1):
        path = folder / (f"{name}-{number}.json" if number > 1 else f"{name}.json")
        try:
            there = json.loads(path.read_text())
            if [there["model"], there["options"]] == question:
                return path
        except FileNotFoundError:
            return path
        except (ValueError, KeyError, TypeError):
            continue  # something else that has this name


def asked(options: Options) -> dict[str, Any]:
    """What was asked for, and with that all that a result depends on beside the model and the data."""
    no_matter = ("model", "tasks", "output", "dry_run", "batch_tokens")
    fields = {field: value for field, value in asdict(options).items() if field not in no_matter}
    return fields | {field: str(value) for field, value in fields.items() if isinstance(value, Path)}


def environment(engine: Engine) -> dict[str, Any]:
    """What the numbers were computed with."""
    packages = {}
    for package in ("longspan", "torch", "transformers", "tokenizers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue  # longspan itself, where it is run from its source tree
    gpu = engine.device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(engine.device) if gpu else f"{torch.get_num_threads()} CPU threads",
        "precision": str(engine.dtype).removeprefix("torch."),
        "peak_memory_gib": engine.peak_memory_gib(),
        "python": platform.python_version(),
        "packages": packages,
    }
