"""What is held out, and that no copy of it is trained on."""

import json
import random
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tokenizers import byte_tokenizer, error_of
from workloads.data import Corpus, ExampleCorpus, Instructions, PackedCorpus, prepare, prepare_examples
from workloads.data.documents import text_hash
from workloads.data.hub import HubSource
from workloads.data.split import Division, divide

NOUNS = "river lamp captain letter garden clock window ship winter road song mirror coin harbour letter well".split()


def book(seed: int, words: int = 200) -> str:
    """A text of its own, in lines."""
    chosen = random.Random(seed).choices(NOUNS, k=words)
    return "\n".join(f"The {a} met the {b}, {seed}." for a, b in zip(chosen[::2], chosen[1::2]))


def divided(texts, share=None):
    """(text, split) of each text that is left, and the division."""
    division = Division()
    parts = [(None, ((f"{i}", text) for i, text in enumerate(texts)))]
    return [(found.item, found.split) for found in divide(parts, str, "texts", division, share=share)], division


@given(st.integers(2, 300), st.sampled_from([0.02, 0.1, 0.3, 0.5]), st.integers(0, 2**32), st.randoms())
def test_the_lowest_hashes_are_held_out_in_any_order_and_enough_of_them(number, share, seed, random):
    texts = [f"text {seed} of {i}" for i in range(number)]
    found, _ = divided(texts, share)
    assert [text for text, _ in found] == texts
    splits = dict(found)
    by_hash = sorted(texts, key=text_hash)
    held_out = sum(split == "validation" for split in splits.values())
    assert {splits[text] for text in by_hash[:held_out]} == {"validation"} and 1 <= held_out < number
    under = sum(text_hash(text) < share * 2**64 for text in texts)
    enough = min(8, round(number * share))
    if 8 <= under < number:
        assert held_out == under
    else:
        assert min(enough, number // 2) <= held_out <= min(max(under, enough, 1), number // 2)
    random.shuffle(texts)
    assert dict(divided(texts, share)[0]) == splits


def test_a_share_is_held_out():
    for given_share, expected in ((None, 0.1), (0.3, 0.3)):
        splits = [split for _, split in divided([f"book {i}" for i in range(5_000)], given_share)[0]]
        assert abs(splits.count("validation") / 5_000 - expected) < 0.02


def test_documents_are_streamed():
    pulled = []
    texts = (pulled.append(i) or f"text {i}" for i in count())
    next(divide([(None, ((text, text) for text in texts))], str, "texts", Division()))
    assert len(pulled) < 200


def test_of_a_single_document_the_last_part_is_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    for options, cut in (({}, 90), ({"holdout": 0.25}, 75)):
        train, validation = Corpus.parse(str(tmp_path), **options).documents()
        assert (train.split, len(train.text), validation.split, len(validation.text)) == (
            *("train", cut), *("validation", 100 - cut),
        )  # fmt: skip
        assert train.text + validation.text == "0123456789" * 10
    (tmp_path / "copy.txt").write_text("0123456789\n" * 10)
    assert len(list(Corpus.parse(str(tmp_path)).documents())) == 2


@pytest.mark.parametrize("holdout", [None, 0.3])
def test_the_same_books_are_held_out_whatever_their_files_are(tmp_path, holdout):
    books = [book(i) for i in range(25)]
    (tmp_path / "text").mkdir()
    (tmp_path / "windows" / "part").mkdir(parents=True)
    for i, text in enumerate(books):
        (tmp_path / "text" / f"{i}.txt").write_text(text + "\n")
        (tmp_path / "windows" / "part" / f"other-{99 - i}.md").write_bytes(text.replace("\n", "\r\n").encode())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"n": 1, "body": text}) + "\n" for text in books[::-1]))
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        pq.write_table(pa.table({"text": books[shard::3]}), tmp_path / "shards" / f"{shard}.parquet")
    scored = []
    for source in ("text", "windows", "rows.jsonl", "shards"):
        held_out = Corpus.parse(str(tmp_path / source), holdout=holdout).documents("validation")
        scored.append([document.text.split() for document in sorted(held_out, key=lambda document: document.order)])
    assert scored[0] == scored[1] == scored[2] == scored[3]
    assert 2 <= len(scored[0]) < 13 and (holdout is None or len(scored[0]) >= 7)


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ["instruction", "messages"])
def test_the_same_examples_are_held_out_whatever_their_files_are(tmp_path, form):
    def row(i: int, **more) -> dict:
        if form == "instruction":
            return {"instruction": book(i, 10), "input": None, "output": f"{i}", **more}
        return {
            "messages": [{"role": "user", "content": book(i, 10)}, {"role": "assistant", "content": f"{i}"}],
            **more,
        }

    first = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(30)])
    second = write_rows(tmp_path / "b.parquet", [row(i, id=f"id-{i}") for i in range(29, -1, -1)])

    def held_out(path: str) -> list[str]:
        splits = (
            (json.dumps(r.columns.get("messages") or r.columns["output"]), split)
            for r, split, _ in Instructions.parse(path).rows()
        )
        return sorted(text for text, split in splits if split == "validation")

    assert held_out(first) == held_out(second) and len(held_out(first)) >= 3


# Copies


def splits_of(corpus: Corpus, division: Division | None = None) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for document in corpus.documents(division=division):
        splits[document.split].append("".join(document.text.split()))
    return splits


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_no_text_is_on_both_sides_and_copies_are_counted(numbers, others):
    """Copies differ in white space; the oracle compares texts without it."""
    texts = [f"text {number}{' ' * (place % 3)}" for place, number in enumerate(numbers)]
    evaluation = [f"text\n{number}" for number in others]
    bare = lambda text: "".join(text.split())  # noqa: E731
    for mode in ("by hash", "own split", "eval data"):
        division = Division()
        parts = [(None, [(text, text) for text in texts])]
        others_of_mode = None
        if mode == "own split":
            parts = [("validation", [(text, text) for text in evaluation]), ("train", parts[0][1])]
        elif mode == "eval data":
            others_of_mode = ("other", [(None, [(text, text) for text in evaluation])])
        found = list(divide(parts, str, "texts", division, evaluation=others_of_mode))
        held_out = [bare(each.item) for each in found if each.split != "train"]
        trained = [bare(each.item) for each in found if each.split == "train"]
        assert len(set(held_out)) == len(held_out) and not set(held_out) & set(trained)
        given_texts = [*map(bare, texts), *(map(bare, evaluation) if mode != "by hash" else ())]
        assert set(held_out) | set(trained) == set(given_texts)
        assert division.copies_dropped == len(given_texts) - len(found)
        if mode != "by hash":
            assert set(held_out) == set(map(bare, evaluation))
            assert trained == [bare(text) for text in texts if bare(text) not in set(held_out)]


def test_own_held_out_data_leaves_the_rest_to_training(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
    for i in range(12):
        (tmp_path / "train" / f"{i}.txt").write_text(book(i))
    rows = [{"text": book(i) + "\n"} for i in (3, 40, 41, 40)]
    path = write_rows(tmp_path / "eval" / "rows.jsonl", rows)
    plain = Corpus.parse(str(tmp_path / "train"))
    corpus = Corpus.parse(str(tmp_path / "train"), eval_data=path)
    division = Division()
    splits = splits_of(corpus, division)
    assert splits["validation"] == ["".join(book(i).split()) for i in (3, 40, 41)]
    assert sorted(splits["train"]) == sorted("".join(book(i).split()) for i in range(12) if i != 3)
    assert division.copies_dropped == 2 and "rows.jsonl" in division.rule
    assert [d.text for d in corpus.documents("train")] == [d.text for d in corpus.documents() if d.split == "train"]
    identities = {
        plain.identity(), corpus.identity(), Corpus.parse(str(tmp_path / "train"), holdout=0.2).identity(),
        Corpus.parse(str(tmp_path / "train"), eval_data=str(tmp_path / "train" / "0.txt")).identity(),
    }  # fmt: skip
    assert len(identities) == 4
    assert Corpus.parse(str(tmp_path / "train"), holdout=0.1).identity() == plain.identity()  # the default


def test_data_with_its_own_split_keeps_it(monkeypatch):
    rows = {
        "train": [{"text": f"train {i}"} for i in range(30)] + [{"text": "held  out 1"}],
        "test": [{"text": f"held out {i}"} for i in range(4)],
    }
    monkeypatch.setattr(HubSource, "_load", lambda self: rows)
    name = f"org/own@{'0' * 40}"
    splits = splits_of(Corpus.parse(name))
    assert splits["validation"] == [f"heldout{i}" for i in range(4)] and len(splits["train"]) == 30
    # As held-out data it gives its held-out part; with other held-out data it gives its training part.
    assert splits_of(Corpus.parse(name, eval_data=name)) == splits
    with_stdlib = Corpus.parse("builtin:stdlib", eval_data=name)
    assert [document.text for document in with_stdlib.documents("validation")] == [row["text"] for row in rows["test"]]
    assert "--holdout 0.2 has no effect" in error_of(lambda: list(Corpus.parse(name, holdout=0.2).documents()))


def test_settings_that_cannot_be_or_have_no_effect_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    path = str(tmp_path)
    for share in (0, -0.1, 0.6, 20):
        assert f"--holdout {share:g}" in error_of(Corpus.parse, path, holdout=share)
        assert f"--holdout {share:g}" in error_of(Instructions.parse, path, share)
    assert "--holdout 0.2 has no effect with --eval-data" in error_of(Corpus.parse, path, holdout=0.2, eval_data=path)
    assert "builtin:stdlib has its own split" in error_of(Corpus.parse, "builtin:stdlib", holdout=0.2)
    assert "no local path" in error_of(Corpus.parse, path, eval_data="nowhere")
    same = Corpus.parse(path, eval_data=path)
    assert "nothing is left" in error_of(prepare, same, byte_tokenizer(), "bytes", tmp_path / ".data")


def test_a_text_column_may_be_of_the_held_out_data_alone(tmp_path):
    (tmp_path / "a.txt").write_text("to train on")
    rows = write_rows(tmp_path / "rows.jsonl", [{"title": "t", "body": "held out"}])
    corpus = Corpus.parse(str(tmp_path / "a.txt"), text_column="body", eval_data=rows)
    assert splits_of(corpus) == {"train": ["totrainon"], "validation": ["heldout"]}
    assert "has no effect" in error_of(Corpus.parse, str(tmp_path / "a.txt"), text_column="body")


# Near-copies, and few documents, as they are prepared


def shingles(tokens: list[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


def test_near_copies_are_those_of_a_count_of_all_shingles(tmp_path):
    """Held-out books of which training has from none to nearly all lines."""
    (tmp_path / "train").mkdir()
    (tmp_path / "eval").mkdir()
    for i in range(12):
        lines = book(i, 600).split("\n")
        (tmp_path / "train" / f"{i}.txt").write_text("\n".join(lines))
        changed = book(100 + i, 600).split("\n")
        kept = len(lines) * i // 12
        (tmp_path / "eval" / f"{i}.txt").write_text("\n".join(lines[:kept] + changed[kept:]))
    tokenizer = byte_tokenizer()
    corpus = Corpus.parse(str(tmp_path / "train"), eval_data=str(tmp_path / "eval"))
    packed = prepare(corpus, tokenizer, "bytes", tmp_path / "data")
    size = packed.division.shingle
    assert size == 52 and PackedCorpus.open(packed.folder).division == packed.division
    train = set().union(*(shingles(list(d.text.encode()), size) for d in corpus.documents("train")))
    expected = {}
    for document in corpus.documents("validation"):
        own = shingles(list(document.text.encode()), size)
        expected[document.name] = len(own & train) / len(own)
    found = packed.division.near_copies
    assert set(found) == {name for name, share in expected.items() if share > 0.5} and 4 <= len(found) <= 7
    assert all(abs(share - expected[name]) < 0.05 for name, share in found.items())


def test_examples_are_divided_and_compared_alike(tmp_path):
    rows = [{"instruction": book(i), "output": "yes"} for i in range(20)]
    near = [{"instruction": book(3) + " And so on.", "output": "no"}, {"instruction": book(99), "output": "yes"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(tmp_path / "eval.jsonl", [*near, rows[5]])
    data = Instructions.parse(path, eval_data=held_out)
    examples = prepare_examples(data, byte_tokenizer(), "bytes", tmp_path / "data")
    assert examples.examples == {"train": 19, "validation": 3} and examples.division.copies_dropped == 1
    assert list(examples.division.near_copies) == ["eval.jsonl#0"]
    assert ExampleCorpus.open(examples.folder).division == examples.division
    assert data.identity() != Instructions.parse(path).identity() != Instructions.parse(path, 0.3).identity()


def test_of_few_documents_further_spans_are_scored(tmp_path):
    for i, size in enumerate((950, 420, 90)):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * size)
    corpus = Corpus.parse("builtin:stdlib", eval_data=str(tmp_path), max_train_tokens=1_000)
    tokenizer = byte_tokenizer()
    packed = prepare(corpus, tokenizer, "bytes", tmp_path / ".data")
    for asked, spans in ((1, 1), (2, 2), (4, 4), (7, 7), (100, 13)):
        found = {d.name: d.tokens for d in packed.validation_windows(50, 100, asked)}
        assert len(found) == min(asked, 2)  # of 90 characters there is no span
        assert sum(tokens.size for tokens in found.values()) == 100 * spans
        taken = [tokens.size // 100 for tokens in found.values()]
        assert max(taken) - min(taken) <= 1 or len(found["1.txt"]) == 8  # in turns, while there are more
        for name, tokens in found.items():
            text = f"{name[0]}" * tokens.size
            assert tokens.shape[1] == 50 and tokens.ravel().tolist() == tokenizer(text)["input_ids"]
