"""Documents for tests: lines of numbers, the same under every Python version."""

from pathlib import Path

import numpy as np

from workloads.data import Corpus, prepare
from workloads.models.source import ModelSource

TINY = ModelSource.parse("builtin:tiny")


def write_texts(folder: Path, documents: int, lines: int) -> Path:
    """So many files of so many lines, of about 20 bytes each, in ``folder``, which is returned."""
    generator = np.random.default_rng(0)
    for number in range(documents):
        values = generator.integers(10_000, size=lines)
        (folder / f"{number}.txt").write_text("\n".join(f"value_{v} = {v} + {number}" for v in values))
    return folder


def prepare_texts(make_folder, documents: int, lines: int):
    """The same as a corpus of builtin:tiny's tokens; ``make_folder`` is ``mktemp`` of pytest's tmp_path_factory."""
    texts = Corpus.parse(str(write_texts(make_folder("text"), documents, lines)))
    return prepare(texts, TINY.tokenizer, TINY.tokenizer_identity, make_folder("data"))
