import json
import multiprocessing
import os
import pickle
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import EOS, byte_tokenizer, error_of
from workloads.data import Corpus, PackedCorpus, prepare
from workloads.data.hub import HubSource

SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the locks of whatever threads run here
LENGTHS = [(i * 37) % 211 + 1 for i in range(60)]


class BytesOfPython:
    """The least that ``prepare`` asks of a tokenizer without the fast backend; needs no transformers."""

    eos_token_id = EOS

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(EOS + 1)}

    def __call__(self, texts: list[str], **kwargs) -> dict[str, list[list[int]]]:
        assert kwargs["add_special_tokens"] is False
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """60 documents of 1 to 211 bytes; every text is different."""
    folder = tmp_path_factory.mktemp("corpus")
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (60, 211))
    for i, length in enumerate(LENGTHS):
        (folder / f"{i:02}.txt").write_text("".join(letters[i, :length]))
    return Corpus.parse(str(folder))


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory) -> PackedCorpus:
    return prepare(corpus, tokenizer, "bytes", tmp_path_factory.mktemp("data"))


def train_stream(packed: PackedCorpus) -> np.ndarray:
    return np.fromfile(packed.folder / "train.bin", dtype=packed.dtype)


def corpus_of(folder: Path, *texts: str) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return Corpus.parse(str(folder))


# What is written


def test_the_streams_are_the_documents_each_with_an_end(corpus, packed, tokenizer):
    for split, tokens in (("train", packed.train_tokens), ("validation", packed.validation_tokens)):
        expected = []
        for document in corpus.documents(split):
            expected += [*tokenizer(document.text, add_special_tokens=False)["input_ids"], EOS]
        stream = np.fromfile(packed.folder / f"{split}.bin", dtype=packed.dtype)
        assert stream.tolist() == expected and len(stream) == tokens
    held_out = list(corpus.documents("validation"))
    assert packed.validation_names == [document.name for document in held_out]
    assert np.diff(packed.validation_offsets).tolist() == [len(document.text) + 1 for document in held_out]
    assert packed.train_documents == 60 - len(held_out)


def test_the_smallest_dtype_that_holds_the_vocabulary(packed, corpus, tokenizer, tmp_path):
    assert packed.dtype == "uint16"  # 257 ids
    large = byte_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(70_000)])
    assert prepare(corpus, large, "large", tmp_path).dtype == "uint32"
    small = BytesOfPython()
    small.eos_token_id, small.get_vocab = 0, lambda: {str(i): i for i in range(256)}
    assert prepare(corpus, small, "small", tmp_path).dtype == "uint8"


def test_a_tokenizer_without_the_fast_backend_gives_the_same_streams(corpus, packed, tmp_path):
    class Slow:
        eos_token_id = EOS

        def __init__(self):
            self.inner = byte_tokenizer()
            self.get_vocab = self.inner.get_vocab

        def __call__(self, texts, **kwargs):
            return self.inner(texts, **kwargs)

    assert (train_stream(prepare(corpus, Slow(), "slow", tmp_path)) == train_stream(packed)).all()


def test_settings_the_tokenizer_came_with_do_not_cut_or_pad(corpus, packed, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=300)
    assert (train_stream(prepare(corpus, tokenizer, "cuts", tmp_path)) == train_stream(packed)).all()


def test_prepared_once_for_each_corpus_and_tokenizer(corpus, tokenizer, tmp_path):
    def load():
        loads.append(1)
        return tokenizer

    loads, done = [], []
    first = prepare(corpus, load, "bytes", tmp_path, on_progress=done.append)
    assert loads == [1] and done[-1] == 60
    again = prepare(corpus, load, "bytes", tmp_path)
    assert loads == [1] and again.folder == first.folder
    assert prepare(corpus, load, "other", tmp_path).folder != first.folder
    assert prepare(corpus_of(tmp_path / "other", "text"), load, "bytes", tmp_path).folder != first.folder
    assert first.corpus_identity == corpus.identity() and first.tokenizer_identity == "bytes"


def test_documents_come_in_batches_and_progress_counts_them(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("workloads.data.packing._BATCH_CHARACTERS", 500)
    done = []
    batched = prepare(corpus, tokenizer, "bytes", tmp_path / "a", on_progress=done.append)
    assert len(done) > 5 and done == sorted(done) and done[-1] == 60
    monkeypatch.undo()
    assert (train_stream(batched) == train_stream(prepare(corpus, tokenizer, "bytes", tmp_path / "b"))).all()


# A budget of training tokens, for what does not fit on a disk


def test_a_budget_takes_the_beginning_of_each_side(corpus, packed, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("workloads.data.packing.BUDGETED_VALIDATION_TOKENS", 300)
    held_out = set()
    for budget in (100, 1_000, packed.train_tokens + 1):
        bounded = replace(corpus, max_train_tokens=budget)
        part = prepare(bounded, tokenizer, "bytes", tmp_path)
        assert (train_stream(part) == train_stream(packed)[:budget]).all()
        assert part.train_tokens == min(budget, packed.train_tokens)
        assert bounded.identity() == f"{corpus.identity()}:{budget} tokens"
        held_out.add((tuple(part.validation_names), (part.folder / "validation.bin").read_bytes()))
    ((names, stream),) = held_out  # the same whatever the budget
    assert list(names) == packed.validation_names[: len(names)]
    assert (packed.folder / "validation.bin").read_bytes().startswith(stream)
    tokens = len(stream) // np.dtype(packed.dtype).itemsize
    assert 300 <= tokens < packed.validation_tokens and part.validation_offsets[-2] < 300


@pytest.mark.parametrize("own_validation_split", [True, False])
def test_no_more_is_read_than_the_budget_needs(tokenizer, tmp_path, monkeypatch, own_validation_split):
    """A data set without an end."""
    monkeypatch.setattr("workloads.data.packing.BUDGETED_VALIDATION_TOKENS", 1_000)
    monkeypatch.setattr("workloads.data.packing._BATCH_CHARACTERS", 500)
    pulled = {"train": 0, "validation": 0}

    def rows(split):
        for number in count():
            pulled[split] += 1
            yield {"text": f"{split} {number:089}"[-99:].ljust(99, ".")}

    splits = ("validation", "train") if own_validation_split else ("train",)
    monkeypatch.setattr(HubSource, "_load", lambda self: {split: rows(split) for split in splits})
    corpus = Corpus.parse(f"org/endless@{'0' * 40}", max_train_tokens=20_000)
    packed = prepare(corpus, tokenizer, "bytes", tmp_path)
    assert packed.train_tokens == 20_000 and packed.validation_tokens == 1_000
    if own_validation_split:
        assert pulled["train"] < 210 and pulled["validation"] < 20
    else:
        assert pulled["train"] < 300


def test_a_budget_that_is_none():
    assert "--max-train-tokens 0" in error_of(Corpus.parse, "builtin:stdlib", max_train_tokens=0)


# Training batches


@settings(max_examples=60, deadline=None)
@given(context_length=st.integers(1, 700), batch=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_every_token_of_the_stream_once_an_epoch(packed, context_length, batch, seed):
    sequences = packed.num_train_sequences(context_length)
    stream = train_stream(packed)[: sequences * context_length].reshape(sequences, context_length)
    epochs = 2
    steps = -(-epochs * sequences // batch)
    rows = np.concatenate([packed.train_batch(step, batch, context_length, seed) for step in range(steps)])
    for epoch in range(epochs):
        seen = rows[epoch * sequences : (epoch + 1) * sequences]
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, stream.tolist()))
    assert packed.train_tokens - stream.size < context_length


def test_a_batch_depends_on_step_batch_and_seed_alone(packed):
    batch = packed.train_batch(5, 8, 64, seed=1)
    assert batch.shape == (8, 64) and batch.dtype == np.int64
    for step in (9, 0, 40):
        packed.train_batch(step, 8, 64, seed=2)
    assert (PackedCorpus.open(packed.folder).train_batch(5, 8, 64, seed=1) == batch).all()
    assert (packed.train_batch(5, 8, 64, seed=2) != batch).any()
    for workers in (1, 2, 4):
        share = 8 // workers
        parts = [packed.train_batch(5, 8, 64, 1, slice(i * share, (i + 1) * share)) for i in range(workers)]
        assert (np.concatenate(parts) == batch).all()


def test_the_order_changes_from_epoch_to_epoch_and_is_the_one_it_always_was(packed):
    sequences = packed.num_train_sequences(64)
    first, second = (packed.train_batch(step, sequences, 64, seed=0) for step in (0, 1))
    assert (first != second).any() and sorted(first.tolist()) == sorted(second.tolist())
    # A checkpoint's place in the data is its step: another order here would continue a run with other data.
    stream = train_stream(packed)[: sequences * 64].reshape(sequences, 64).tolist()
    assert [stream.index(row) for row in first[:8].tolist()] == [31, 72, 80, 16, 52, 42, 75, 84]


def test_a_corpus_shorter_than_a_context_says_by_how_much(packed):
    tokens = packed.train_tokens
    packed.check(tokens, 1)
    for call in (packed.check, lambda context_length, batch: packed.train_batch(0, batch, context_length, 0)):
        message = error_of(call, tokens + 1, 1)
        assert f"{tokens:,} training tokens" in message and f"{tokens + 1:,}" in message and packed.corpus in message
    with pytest.warns(UserWarning, match="fewer than the batch of 64"):
        packed.check(tokens // 3, 64)


# Validation windows


@settings(max_examples=60, deadline=None)
@given(context_length=st.integers(1, 40), windows=st.integers(1, 5), num_documents=st.integers(1, 12))
def test_windows_are_the_first_spans_of_documents_and_never_cross_them(
    corpus, packed, tokenizer, context_length, windows, num_documents
):
    span = context_length * windows
    texts = {document.name: document.text for document in corpus.documents("validation")}
    long_enough = {name for name, text in texts.items() if len(text) >= span}
    if not long_enough:
        assert f" has {max(map(len, texts.values()))}." in error_of(
            packed.validation_windows, context_length, span, num_documents
        )
        return
    found = packed.validation_windows(context_length, span, num_documents)
    assert (
        len({document.name for document in found} & long_enough) == len(found) == min(num_documents, len(long_enough))
    )
    spans = [document.tokens.size // span for document in found]
    assert sum(spans) == min(num_documents, sum(len(text) // span for text in texts.values()))
    assert num_documents > len(long_enough) or set(spans) == {1}
    for document in found:
        assert document.tokens.shape[1] == context_length and document.tokens.dtype == np.int64
        expected = tokenizer(texts[document.name], add_special_tokens=False)["input_ids"][: document.tokens.size]
        assert document.tokens.ravel().tolist() == expected


def test_one_span_scores_the_same_tokens_at_every_length(packed):
    by_length = [packed.validation_windows(length, 64, 3) for length in (8, 16, 64)]
    for documents in by_length:
        assert [document.name for document in documents] == [document.name for document in by_length[0]]
        for document, reference in zip(documents, by_length[0]):
            assert (document.tokens.ravel() == reference.tokens.ravel()).all()


def test_the_sample_is_stable_when_documents_are_added(tokenizer, tmp_path):
    folder = tmp_path / "corpus"
    texts = [f"{number:03}" * 20 for number in range(220)]
    before = prepare(corpus_of(folder, *texts[:200]), tokenizer, "bytes", tmp_path / "data")
    after = prepare(corpus_of(folder, *texts), tokenizer, "bytes", tmp_path / "data")
    assert before.folder != after.folder
    old, new = ([d.name for d in packed.validation_windows(10, 50, 100)] for packed in (before, after))
    assert [name for name in new if name in old] == old
    assert old != sorted(old)  # a sample by name would be one of the alphabet's first


def test_a_span_that_the_window_does_not_divide_is_refused(packed):
    message = error_of(packed.validation_windows, 48, 100, 1)
    assert "100" in message and "48" in message and "Give 144" in message


# Any process may die at any time


def prepare_there(corpus: str, root: str, barrier=None, die: bool = False) -> None:
    def kill(done: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if barrier:
        barrier.wait()
    prepare(Corpus.parse(corpus), BytesOfPython(), "bytes", root, on_progress=kill if die else None)


def process(*args, **kwargs) -> multiprocessing.Process:
    started = SPAWN.Process(target=prepare_there, args=args, kwargs=kwargs)
    started.start()
    return started


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.suffix != ".lock"}


def test_processes_at_once_are_harmless(tmp_path):
    corpus = corpus_of(tmp_path / "corpus", *["text " * 100] * 30)
    barrier = SPAWN.Barrier(3)
    processes = [process(str(tmp_path / "corpus"), str(tmp_path / "data"), barrier) for _ in range(3)]
    for started in processes:
        started.join(60)
        assert started.exitcode == 0
    packed = prepare(corpus, lambda: pytest.fail("prepared again"), "bytes", tmp_path / "data")
    assert names_in(tmp_path / "data") == {packed.folder.name}


def test_a_killed_process_leaves_nothing_under_the_final_name(tokenizer, tmp_path):
    corpus = corpus_of(tmp_path / "corpus", *["text " * 100] * 30)
    killed = process(str(tmp_path / "corpus"), str(tmp_path / "data"), die=True)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    (left,) = names_in(tmp_path / "data")
    assert left.startswith(".")
    packed = prepare(corpus, tokenizer, "bytes", tmp_path / "data")
    assert names_in(tmp_path / "data") == {packed.folder.name}  # what was left is gone


def test_a_failure_leaves_nothing_and_the_next_one_succeeds(corpus, tokenizer, tmp_path):
    message = error_of(prepare, corpus, byte_tokenizer(eos=None), "no eos", tmp_path)
    assert "no eos" in message and "end-of-sequence" in message
    assert names_in(tmp_path) == set()
    broken = corpus_of(tmp_path / "corpus", "fine")
    (tmp_path / "corpus" / "9.txt").write_bytes(b"\xff")
    assert "9.txt" in error_of(prepare, Corpus.parse(str(tmp_path / "corpus")), tokenizer, "bytes", tmp_path / "data")
    assert names_in(tmp_path / "data") == set()
    prepare(broken, tokenizer, "bytes", tmp_path / "data")


# Opening


def test_a_packed_corpus_is_pickled_by_its_place(packed):
    packed.train_batch(0, 2, 64, 0)
    content = pickle.dumps(packed)
    assert len(content) < 1_000
    assert (pickle.loads(content).train_batch(3, 2, 64, 0) == packed.train_batch(3, 2, 64, 0)).all()


@pytest.mark.parametrize("damage", ["truncated stream", "no index", "broken index", "other version", "no folder"])
def test_a_damaged_folder_says_to_delete_it(corpus, tokenizer, tmp_path, damage):
    folder = prepare(corpus, tokenizer, "bytes", tmp_path).folder
    index = folder / "index.json"
    match damage:
        case "truncated stream":
            os.truncate(folder / "validation.bin", 10)
        case "no index":
            index.unlink()
        case "broken index":
            index.write_text(index.read_text()[:50])
        case "other version":
            index.write_text(json.dumps({**json.loads(index.read_text()), "format_version": 0}))
        case "no folder":
            folder.rename(tmp_path / "away")
    message = error_of(PackedCorpus.open, folder)
    assert str(folder) in message and "Delete that folder" in message


INDEXES = {
    "dtype": ["O", "float32", "int32", "V8", "", None, 4],
    "train_tokens": [-1, "10", 1.5, None, 10**30],
    "validation_offsets": [[], [0, 10**30], [1, 2], [0, 5, 3], ["a"], [[0], [1]], None, "0"],
    "validation_names": [[], None, [1] * 60],
    "validation_hashes": [[], None, ["1"] * 60],
    "division": [None, {"rule": 1}, {"rule": "a", "copies_dropped": -1}, {"near_copies": {"a": "b"}}, {"other": 1}],
    "sha256": [{"train.bin": "0" * 64}, {}, 1, [1]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in INDEXES for value in INDEXES[field]])
def test_an_index_is_not_believed(packed, tmp_path, field, value):
    """A dtype of objects would have numpy follow the file's bytes as addresses."""
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {field: value}))
    assert "Delete that folder" in error_of(PackedCorpus.open, folder)


def test_tokens_that_changed_without_their_size_are_found(packed, tmp_path):
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    content = bytearray((folder / "train.bin").read_bytes())
    content[10] ^= 1
    (folder / "train.bin").write_bytes(content)
    assert "train.bin is not what was prepared" in error_of(PackedCorpus.open, folder)


def test_an_empty_side_opens_and_says_what_is_missing(tokenizer, tmp_path):
    packed = prepare(corpus_of(tmp_path / "corpus", "x"), tokenizer, "bytes", tmp_path / "data")
    assert packed.train_documents == 0 and packed.num_train_sequences(4) == 0
    assert "0 training tokens" in error_of(packed.train_batch, 0, 1, 4, 0)
    assert "the longest of 1 has 1" in error_of(packed.validation_windows, 4, 4, 1)
