"""What was read as data, in a few lines: files, columns, how it begins, documents, tokens, and what is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from orchestrator.planning.preparation import Identified, Prepared
from orchestrator.terminal import first_of
from workloads.data import Corpus, ExampleCorpus, Instructions, PackedCorpus
from workloads.data.documents import first_words
from workloads.data.local import FoundFiles, LocalSource
from workloads.data.tables import file_format
from workloads.terminal import printable

# File names that a line has room for.
_NAMES = 5


def data_summary(sweep: Identified) -> Iterator[str]:
    """One line each; of data that is not tokenised yet, only what its files hold."""
    for what, read in (("data", sweep.corpus), ("held-out data", sweep.corpus.evaluation)):
        files = getattr(read.source, "files", None) if read else None
        if read and files is not None:
            yield _files_line(what, read, files)
    if isinstance(sweep, Prepared):
        yield from _prepared_lines(sweep.packed)
    elif isinstance(sweep.corpus, Corpus) and isinstance(sweep.corpus.source, LocalSource):
        sample = first_words(sweep.corpus.source.first_text())
        yield from _content_lines(sweep.corpus.columns, sample)


def _files_line(what: str, corpus: Corpus | Instructions, files: FoundFiles) -> str:
    kinds = Counter(file_format(path) for _, path in files.read).most_common()
    listing = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
    line = f"{what}: {_counted(len(files.read), 'file')} of {corpus.name} read ({listing})"
    if files.passed_over:
        line += f"; {len(files.passed_over):,} passed over: {first_of(files.passed_over, _NAMES)}"
    return printable(line, one_line=True)


def _prepared_lines(packed: PackedCorpus | ExampleCorpus) -> Iterator[str]:
    yield from _content_lines(packed.columns, packed.sample)
    if isinstance(packed, ExampleCorpus):
        what, documents, tokens = "example", packed.examples, packed.tokens
    else:
        what = "document"
        documents = {"train": packed.train_documents, "validation": len(packed.validation_names)}
        tokens = {"train": packed.train_tokens, "validation": packed.validation_tokens}
    division = packed.division
    yield printable(
        f"data: {_counted(documents['train'], what)} of {tokens['train']:,} tokens to train on, "
        f"{documents['validation']:,} of {tokens['validation']:,} tokens held out: {division.rule}",
        one_line=True,
    )
    if division.copies_dropped:
        copies = "copies" if division.copies_dropped > 1 else "copy"
        yield f"data: {division.copies_dropped:,} {copies} of held-out {what}s dropped"
    if near := division.near_copies:
        share, their = ("share", "their") if len(near) > 1 else ("shares", "its")
        names = first_of([f"{name} ({part:.0%})" for name, part in near.items()], _NAMES)
        yield printable(
            f"data: {_counted(len(near), f'held-out {what}')} {share} over half of {their} {division.shingle}-token "
            f"shingles with training {what}s: {names}",
            one_line=True,
        )


def _content_lines(columns: list[str], sample: str) -> Iterator[str]:
    column = f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}, which begins" if columns else "it begins"
    yield printable(f"data: {column}: {sample}", one_line=True)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
