"""Asking a model about a long document: its answer, its prompt, and documents that do not fit."""

import io
import sys

import pytest
import torch

from workloads import ask as asking
from workloads.ask import OMISSION, ask, load_model, prompt_tokens
from workloads.errors import InputError

DOCUMENT = "\n".join(f"value_{n} = {n * 37 % 101}" for n in range(20))  # 267 tokens of builtin:tiny, one a byte
QUESTION = "What is value_3?"


@pytest.fixture(scope="module")
def tiny():
    return load_model("builtin:tiny", "cpu")


def tokens_of(tiny, document, **overrides):
    model, tokenizer = tiny
    values = dict(max_new_tokens=20, truncate=False, report=lambda line: None)
    return prompt_tokens(model.config, tokenizer, document, QUESTION, **{**values, **overrides})


class Screen(io.StringIO):
    """A stdout that notes when something is written to it."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def write(self, text):
        self.events += ["written"] if text else []
        return super().write(text)


def test_the_answer_is_the_most_likely_continuation_and_streams(tiny, monkeypatch):
    model, tokenizer = tiny
    events = []
    screen = Screen(events)
    note_call = model.register_forward_hook(lambda *_: events.append("computed"))
    with note_call, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        answer = ask(model, tokenizer, DOCUMENT, QUESTION, max_new_tokens=12)
    tokens = torch.tensor([tokens_of(tiny, DOCUMENT)])
    for _ in range(12):  # the definition: no cache, the whole sequence each time
        with torch.inference_mode():
            tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0, -12:], skip_special_tokens=True)
    assert answer.text == expected and answer.answer_tokens == 12
    assert screen.getvalue() == expected + "\n"
    last = max(place for place, event in enumerate(events) if event == "computed")
    assert events.count("computed") == 12
    assert events[:last].count("written") > 1  # words are shown while later ones are not there yet
    assert answer.prefill_seconds > 0 and answer.answer_seconds > 0


def test_reading_the_document_makes_neither_all_logits_nor_a_mask(tiny):
    model, tokenizer = tiny
    logits, masks = [], []
    handles = [
        model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.shape[1])),
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
        ),
    ]
    try:
        answer = ask(model, tokenizer, DOCUMENT, QUESTION, max_new_tokens=3)
    finally:
        for handle in handles:
            handle.remove()
    assert answer.prompt_tokens > 200
    assert logits == [1, 1, 1]
    assert masks == [None, None, None]


def test_sampling_varies_and_a_seed_repeats_it(tiny):
    model, tokenizer = tiny

    def sampled(seed):
        torch.manual_seed(seed)
        return ask(model, tokenizer, DOCUMENT, QUESTION, max_new_tokens=20, temperature=2.0).text

    assert sampled(0) == sampled(0) != sampled(1)


def test_a_document_beyond_the_reach_is_an_error_that_names_both_lengths(tiny):
    said = []
    with pytest.raises(InputError, match=r"the document has 5,340 tokens.*context is 512.*--truncate"):
        tokens_of(tiny, DOCUMENT * 20, report=said.append)
    assert not said


def test_truncating_keeps_the_beginning_the_end_and_the_question(tiny):
    document, said = "first line\n" + DOCUMENT * 20 + "\nlast line", []
    tokens = tokens_of(tiny, document, truncate=True, report=said.append)
    assert len(tokens) == 512 - 20  # nothing is given away
    prompt = tiny[1].decode(tokens)
    beginning, end = prompt.split(OMISSION)
    assert document.startswith(beginning) and beginning.startswith("first line")
    assert "last line\n\nQuestion: What is value_3?\nAnswer:" in end
    assert "Kept: the first " in said[0] and "5,361 tokens" in said[0] and "512" in said[0]


def test_cutting_through_a_character_still_fits(tiny):
    """A euro sign is three tokens of builtin:tiny, and half of one decodes to another three."""
    assert len(tokens_of(tiny, "€" * 1000, truncate=True)) <= 512 - 20


def test_an_answer_that_leaves_no_room_for_the_document(tiny):
    with pytest.raises(InputError, match=r"no room is left.*--max-new-tokens"):
        tokens_of(tiny, DOCUMENT, truncate=True, max_new_tokens=500)


def test_a_chat_model_gets_its_template_and_its_first_token_once():
    model, tokenizer = load_model("builtin:tiny", "cpu")
    tokenizer.chat_template = (
        "{{ '<|endoftext|>' }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokens = tokens_of((model, tokenizer), DOCUMENT)
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens) == f"<|endoftext|>[user] {DOCUMENT}\n\n{QUESTION}\n[assistant]"


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(DOCUMENT)
    return file


def command(*arguments):
    return asking.main(["--model", "builtin:tiny", *arguments])


def test_the_command_answers_on_stdout_and_counts_on_stderr(tiny, document, capsys):
    expected = ask(*tiny, DOCUMENT, QUESTION, max_new_tokens=5).text
    capsys.readouterr()
    assert command("--document", str(document), "--max-new-tokens", "5", "--device", "cpu", QUESTION) == 0
    told = capsys.readouterr()
    assert told.out == expected + "\n"
    assert "document: 267 tokens; with the question 303 of the model's 512" in told.err
    assert "tokens/s" in told.err


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, (), "cannot be read"),
        (b"", (), "is empty"),
        (b"\xff\xfe\x00", (), "not UTF-8"),
        (b"text", ("--max-new-tokens", "0"), "--max-new-tokens 0"),
        (b"text", ("--temperature", "-1"), "--temperature -1"),
        (b"text", ("--device", "nowhere"), "--device nowhere: there is no such device"),
        (b"text", ("--model", "./nowhere"), "no folder here"),
    ],
)
def test_a_mistake_ends_in_one_line(content, flags, message, tmp_path, capsys):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    assert command("--document", str(file), *flags, QUESTION) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and message in told.err and told.err.count("\n") == 1
    assert not told.out


@pytest.mark.gpu
def test_a_document_is_read_on_the_gpu(document, capsys):
    assert command("--document", str(document), "--max-new-tokens", "5", QUESTION) == 0
    assert "answered with 5 in" in capsys.readouterr().err
