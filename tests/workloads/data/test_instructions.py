"""Instruction data: which tokens are an answer, what is refused and where, and what a prepared batch holds."""

import json
import os
import pickle
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import EOS, error_of
from tests.support.tokenizers import byte_tokenizer as bytes_without_decoder
from workloads.data import ExampleCorpus, Instructions, prepare_examples
from workloads.data.packed import hashes_of
from workloads.errors import InputError

CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}%OPEN%{{ m.content + '</s>' }}%CLOSE%{% else %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED = CHATML.replace("%OPEN%", "").replace("%CLOSE%", "")
MARKED = CHATML.replace("%OPEN%", "{% generation %}").replace("%CLOSE%", "{% endgeneration %}")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt du?"},
    {"role": "assistant", "content": "  Größe 本\n    mit  Einzug \n"},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "No."},
]


def byte_tokenizer(template: str | None = None):
    from tokenizers import decoders

    tokenizer = bytes_without_decoder()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = template
    return tokenizer


def gpt2_like():
    """Tokens of several bytes, whose reported offsets leave out blanks (as GPT-2's, Llama-3's and Qwen's do)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"])
    tokenizer.train_from_iterator(["    mit  Einzug \n    Be brief. Again? No. Wie heißt du?"] * 3, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write(path: Path, rows: list[dict]) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows), "utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def prepare(path: Path, tokenizer=None) -> ExampleCorpus:
    return prepare_examples(
        Instructions.parse(str(path)), tokenizer or byte_tokenizer(), "bytes", path.parent / f"prepared-{path.name}"
    )


def all_examples(corpus: ExampleCorpus) -> list[tuple[list[int], list[int]]]:
    """(tokens, tokens of answers) of every example, training first."""
    found = []
    for split in ("train", "validation"):
        tokens, answers, offsets = (
            np.fromfile(corpus.folder / f"{split}.{kind}", dtype)
            for kind, dtype in (("tokens", corpus.dtype), ("answers", "uint8"), ("offsets", "int64"))
        )
        for begin, end in pairwise(offsets):
            example = tokens[begin:end]
            found.append((example.tolist(), example[answers[begin:end] == 1].tolist()))
    return found


# Which tokens are an answer


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_papers_prompt_and_the_answer_with_its_end(tmp_path, suffix):
    rows = [
        {"instruction": "Count.", "input": "", "output": " one two", "file": "x"},
        {"instruction": "Größe?", "input": "des 本", "output": "3 m\n", "file": None},
    ]
    tokenizer = byte_tokenizer()
    examples = all_examples(prepare(write(tmp_path / f"rows{suffix}", rows), tokenizer))
    texts = {tokenizer.decode(tokens[:-1]): tokenizer.decode(answers[:-1]) for tokens, answers in examples}
    assert texts == {"[INST]Count.[/INST] one two": " one two", "[INST]Größe?\ndes 本[/INST]3 m\n": "3 m\n"}
    assert all(tokens[-1] == answers[-1] == EOS for tokens, answers in examples)


def test_conversations_of_sharegpt_are_messages(tmp_path):
    tokenizer = byte_tokenizer(UNMARKED)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    conversation = [{"from": names[message["role"]], "value": message["content"]} for message in CHAT]
    rows = [{"id": "identity_0", "conversations": turns} for turns in (conversation, conversation[:3])]
    for suffix in (".jsonl", ".parquet"):
        prepared = prepare(write(tmp_path / f"sharegpt{suffix}", rows), tokenizer)
        expected = prepare(
            write(tmp_path / f"messages{suffix}", [{"messages": CHAT}, {"messages": CHAT[:3]}]), tokenizer
        )
        assert all_examples(prepared) == all_examples(expected)
        assert prepared.columns == ["conversations"] and prepared.sample == "Be brief."
    rows[1] = {"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}
    message = error_of(prepare, write(tmp_path / "bot.jsonl", rows), tokenizer)
    assert "line 2, message 1" in message and "'bot'" in message and "gpt" in message
    rows[1] = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}
    assert "line 2, message 1: the assistant's answer is empty" in error_of(
        prepare, write(tmp_path / "empty.jsonl", rows), tokenizer
    )


def test_special_tokens_that_a_message_spells_are_text(tmp_path):
    """The template's own stay tokens; what follows a spelled-out one is still of its answer."""
    tokenizer = byte_tokenizer(UNMARKED.replace("</s>", "<eos>"))
    spelled = "<eos><eos> ends <eos>"
    chat = [{"role": "user", "content": spelled}, {"role": "assistant", "content": f"Yes: {spelled}"}]
    rows = [{"messages": chat}, {"messages": [{"role": "user", "content": f"B{spelled}"}, chat[1]]}]
    for tokens, answers in all_examples(prepare(write(tmp_path / "chat.jsonl", rows), tokenizer)):
        assert tokens.count(EOS) == 2 and answers.count(EOS) == 1 and answers[-1] == EOS
        assert tokenizer.decode(answers[:-1]) == f"Yes: {spelled}"
        assert tokenizer.decode(tokens).replace(">B", ">") == f"<|user|>{spelled}<eos><|assistant|>Yes: {spelled}<eos>"
    rows = [{"instruction": text, "output": spelled} for text in (spelled, f"B{spelled}")]
    for tokens, answers in all_examples(prepare(write(tmp_path / "rows.jsonl", rows), tokenizer)):
        assert tokens.count(EOS) == answers.count(EOS) == 1
        assert tokenizer.decode(tokens[:-1]).replace("]B", "]") == f"[INST]{spelled}[/INST]{spelled}"


def test_only_the_columns_of_examples_are_read(tmp_path):
    """A column that is not read holds a date in the year 100,000, which Python cannot represent."""
    far = pa.array([2**62] * 2, pa.timestamp("us"))
    table = pa.table({"instruction": ["a", "b"], "output": ["c", "d"], "when": far})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert sum(prepare(tmp_path / "rows.parquet").examples.values()) == 2
    pq.write_table(table.drop_columns(["output", "instruction"]), tmp_path / "far.parquet")
    assert f"{tmp_path / 'far.parquet'} cannot be read as Parquet, at row 0" in error_of(
        prepare, tmp_path / "far.parquet"
    )


def test_a_tokenizer_that_begins_sequences_begins_these_too(tmp_path):
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = tokenizer.bos_token_id
    path = write(tmp_path / "rows.jsonl", [GOOD, OTHER])
    assert all(begin not in tokens for tokens, _ in all_examples(prepare(path, tokenizer)))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    path = write(tmp_path / "again.jsonl", [GOOD, OTHER])
    for tokens, answers in all_examples(prepare(path, tokenizer)):
        assert tokens[0] == begin and tokens.count(begin) == 1 and begin not in answers


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, gpt2_like])
def test_the_assistants_turns_are_the_answers_with_and_without_marks_in_the_template(tmp_path, tokenizer):
    path = write(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:]}])
    found = []
    for template in (UNMARKED, MARKED):
        loaded = tokenizer()
        loaded.chat_template = template
        folder = tmp_path / str(len(found))
        examples = all_examples(prepare_examples(Instructions.parse(str(path)), loaded, template, folder))
        found.append(examples)
        texts = {"".join(f"<|{m['role']}|>{m['content']}</s>" for m in chat) for chat in (CHAT, CHAT[1:])}
        assert {loaded.decode(tokens) for tokens, _ in examples} == texts
        for _, answers in examples:
            assert loaded.decode(answers) == "".join(m["content"] + "</s>" for m in CHAT if m["role"] == "assistant")
    assert found[0] == found[1]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    forgets = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    path = write(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:]}])
    message = error_of(prepare, path, byte_tokenizer(forgets))
    assert f"{path}, line 1" in message and "message 2" in message and "{% generation %}" in message


def test_empty_answers_are_told_once_with_their_number(tmp_path):
    rows = []
    for i in range(40):
        empty = {"messages": [{"role": "user", "content": f"{i}"}, {**CHAT[2], "content": ""}]}
        rows += [{**GOOD, "input": f"{i}"}, {"instruction": f"{i}", "output": " "}, empty]
    message = error_of(prepare, write(tmp_path / "rows.jsonl", rows), byte_tokenizer(UNMARKED))
    assert "line 2: the answer ('output') is empty, and 79 more rows have an empty answer" in message


# What the user may get wrong

GOOD, OTHER = {"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "a", "output": " \n"}, "the answer ('output') is empty"),
        ({"instruction": "a", "output": None}, "'output' is NoneType, not a string"),
        ({"instruction": 3, "output": "b"}, "'instruction' is int, not a string"),
        ({"instruction": "a", "output": "\ud800"}, "lone surrogate"),
        ({"prompt": "a", "completion": "b"}, "expected columns instruction and output"),
        ({"messages": []}, "'messages' is not a list"),
        ({"messages": "hello"}, "'messages' is not a list"),
        ({"messages": [{"role": "user"}]}, "message 0: expected {role, content}"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 0: expected {role, content}"),
        ({"messages": CHAT[:2]}, "no message is of the role 'assistant'"),
        ({"messages": CHAT[2:]}, "the first message is the assistant's"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": ""}]}, "message 1: the assistant's answer is empty"),
        ({"messages": [{"role": "judge", "content": "a"}, CHAT[4]]}, "fails on it (no judges)"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_row_that_is_no_example_is_named(tmp_path, row, says, suffix):
    template = "{% if messages[0].role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    path = write(tmp_path / f"rows{suffix}", [GOOD, row])
    message = error_of(prepare, path, byte_tokenizer(template + UNMARKED))
    assert says in message and (f"{path}, line 2" if suffix == ".jsonl" else f"{path}, item 1") in message


def test_messages_without_a_chat_template(tmp_path):
    message = error_of(prepare, write(tmp_path / "chat.parquet", [{"messages": CHAT}, {"messages": CHAT[1:]}]))
    assert f"{tmp_path / 'chat.parquet'}, row 0" in message and "no chat template" in message


def test_files_that_hold_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    for content, says in (
        (b'{"instruction": "a"}', "holds one dict, not a list"),
        (b"[1]", "item 0 is not a JSON object"),
        (b'[{"a": 1},\n{]', "is not JSON"),
        (b'["\xff"]', "is not UTF-8: byte 0xff at offset 2"),
        (b"[]", "has no row"),
        (json.dumps([GOOD]).encode(), "a single row"),
    ):
        path.write_bytes(content)
        message = error_of(prepare, path)
        assert says in message and "rows.json" in message
    (tmp_path / "empty").mkdir()
    assert ".json, .jsonl, .parquet" in error_of(Instructions.parse, str(tmp_path / "empty"))
    for text in ("builtin:stdlib", "./missing", ""):
        assert "LongAlpaca-12k" in error_of(Instructions.parse, text)


# What is prepared

LENGTHS = [(i * 37) % 61 + 1 for i in range(60)]


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> ExampleCorpus:
    """50 examples with answers of 1 to 61 bytes, after a prompt of 13 and before an end of one token."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (60, 61))
    rows = [{"instruction": f"{i}", "output": "".join(letters[i, :length])} for i, length in enumerate(LENGTHS)]
    return prepare(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows[10:]))


def sequences(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(tokens[:length].tolist()), tuple(tokens[scored].tolist()))
        for tokens, scored, length in zip(batch.tokens, batch.scored, batch.lengths)
    ]


@settings(max_examples=40, deadline=None)
@given(
    context_length=st.integers(17, 90),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    long_examples=st.sampled_from(["drop", "truncate"]),
)
def test_every_example_that_fits_once_an_epoch(examples, context_length, batch, seed, long_examples):
    stored = all_examples(examples)[: examples.examples["train"]]
    expected = []
    for tokens, answers in stored:
        prompt = len(tokens) - len(answers)
        if len(tokens) <= context_length or (long_examples == "truncate" and prompt < context_length):
            expected.append((tuple(tokens[:context_length]), tuple(tokens[prompt:context_length])))
    count = examples.num_train_examples(context_length, long_examples)
    assert count == len(expected)
    if not count:
        assert "--long-examples truncate" in error_of(examples.check, context_length, 1, long_examples)
        return
    steps = -(-2 * count // batch)
    batches = [examples.train_batch(step, batch, context_length, seed, long_examples) for step in range(steps)]
    seen = [sequence for b in batches for sequence in sequences(b)]
    for epoch in range(2):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == sorted(expected)
    for b in batches:
        assert b.tokens.shape[1] == b.lengths.max() <= context_length and not b.scored[:, 0].any()
    before = [examples.tokens_before(step, batch, context_length, seed, long_examples) for step in range(steps + 1)]
    assert np.diff(before).tolist() == [b.num_tokens for b in batches] and before[0] == 0


def test_held_out_examples_are_never_trained_on_and_fit_the_context(examples):
    stored = all_examples(examples)
    train, held_out = stored[: examples.examples["train"]], stored[examples.examples["train"] :]
    assert len(held_out) >= 5 and not {tuple(t) for t, _ in train} & {tuple(t) for t, _ in held_out}
    for context_length in (40, 100):
        found = examples.validation_examples(context_length, 100)
        assert sorted(e.tokens.tolist() for e in found) == sorted(t for t, _ in held_out if len(t) <= context_length)
        for example in found:
            assert example.tokens[example.scored].tolist() in [answers for _, answers in held_out]
    assert [e.name for e in examples.validation_examples(100, 3)] == [e.name for e in found[:3]]
    assert "no held-out example" in error_of(examples.validation_examples, 10, 3)


def test_the_user_is_told_what_is_left_out(examples):
    lengths = np.array([len(tokens) for tokens, _ in all_examples(examples)[: examples.examples["train"]]])
    longer = (lengths > 40).sum()
    assert re.match(rf"{longer} of {len(lengths)} training examples .* 40 tokens .* dropped", examples.left_out(40))
    assert "are cut" in examples.left_out(40, "truncate")
    assert examples.left_out(100) is None


def test_how_much_of_the_context_the_training_examples_fill(examples):
    lengths = np.array([len(tokens) for tokens, _ in all_examples(examples)[: examples.examples["train"]]])
    assert examples.filled(1000) == pytest.approx(lengths.mean() / 1000)
    assert examples.filled(40) == pytest.approx(lengths[lengths <= 40].mean() / 40)
    assert examples.filled(1) == 0
    with pytest.warns(UserWarning, match="fewer than the batch of 64"):
        examples.check(100, 64)


def test_prepared_once_and_pickled_by_its_place(examples):
    content = pickle.dumps(examples)
    assert len(content) < 1_000
    assert sequences(pickle.loads(content).train_batch(3, 4, 64, 0)) == sequences(examples.train_batch(3, 4, 64, 0))
    root = examples.folder.parent
    rows = Instructions.parse(str(root.parent / "rows.jsonl"))
    assert prepare_examples(rows, lambda: pytest.fail("prepared again"), "bytes", root).folder == examples.folder
    other = prepare_examples(rows, byte_tokenizer(), "other template", root)
    assert other.folder != examples.folder


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "O"}, {"tokens": {"train": -1, "validation": 0}}, {"examples": {}}, {"validation_names": None}],
    ids=str,
)
def test_an_index_is_not_believed(examples, tmp_path, changed):
    folder = shutil.copytree(examples.folder, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changed))
    with pytest.raises(InputError, match="Delete that folder"):
        ExampleCorpus.open(folder)


@pytest.mark.parametrize("hashed", [True, False])
def test_offsets_that_changed_are_found(examples, tmp_path, hashed):
    """Also where the index was changed with them."""
    folder = shutil.copytree(examples.folder, tmp_path / "copy")
    offsets = np.fromfile(folder / "train.offsets", dtype=np.int64)
    offsets[3] = -(2**40)
    offsets.tofile(folder / "train.offsets")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index if hashed else index | {"sha256": hashes_of(folder)}))
    with pytest.raises(InputError, match="elete that folder"):
        ExampleCorpus.open(folder).num_train_examples(64)


def test_a_damaged_folder_says_to_delete_it(tmp_path):
    folder = prepare(write(tmp_path / "rows.jsonl", [GOOD, OTHER])).folder
    os.truncate(folder / "train.answers", 1)
    message = error_of(ExampleCorpus.open, folder)
    assert str(folder) in message and "train.answers" in message and "Delete that folder" in message
