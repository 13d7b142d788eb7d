"""Passkey, topic and line retrieval: what the prompts hold, when an answer counts, and that answers are greedy."""

import json
import re

import pytest
import torch

from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.evaluation.greedy import run_tests
from workloads.evaluation.retrieval import Prompter
from workloads.evaluation.retrieval_cases import contains
from workloads.evaluation.tasks.passkey import passkey_tests
from workloads.evaluation.tasks.topics import generated_tests, longchat_tests
from workloads.models.source import ModelSource

SOURCE = ModelSource.parse("builtin:tiny")
TOKENIZER = SOURCE.tokenizer()  # of bytes: a place in the text is a place in the tokens
PROMPTER = Prompter(TOKENIZER)


@pytest.mark.parametrize("length", [512, 1000, 3001])
def test_a_passkey_prompt_has_exactly_its_length_and_the_key_stands_where_it_says(length):
    depths = [0.0, 0.3, 0.5, 1.0]
    tests = passkey_tests(PROMPTER, [length], depths, 8, seed=0)
    assert [test.depth for test in tests] == depths * 2
    for test in tests:
        assert len(test.tokens) + test.answer_tokens == test.length == length
        text = TOKENIZER.decode(test.tokens)
        needle = f"\nThe pass key is {test.expected}. Remember it. {test.expected} is the pass key.\n"
        assert text.count(test.expected) == 2 and text.count(needle) == 1
        assert text.endswith("What is the pass key? The pass key is")
        filler = re.search(r"about the important information there\.\n(.*)\nWhat is", text, re.DOTALL)[1]
        before = filler.index(needle)
        assert before == pytest.approx(test.depth * (len(filler) - len(needle)), abs=0.5)
        # Where the needle is taken out, the filler goes on as if nothing had been there.
        rest = filler.replace(needle, "")
        assert rest in "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 40
    assert len({test.expected for test in tests}) == 8


def test_the_same_seed_hides_the_same_keys():
    assert passkey_tests(PROMPTER, [600], [0.5], 3, seed=1) == passkey_tests(PROMPTER, [600], [0.5], 3, seed=1)
    assert passkey_tests(PROMPTER, [600], [0.5], 3, seed=1) != passkey_tests(PROMPTER, [600], [0.5], 3, seed=2)


def test_the_first_topic_is_asked_for_and_no_topic_comes_twice():
    for test in generated_tests(PROMPTER, "topics", [1500, 8000], 3, seed=0):
        text = TOKENIZER.decode(test.tokens)
        assert test.length == len(test.tokens) + test.answer_tokens and test.group == f"{test.length} tokens"
        topics = re.findall(r"USER: I would like to discuss the topic of (the .*)\.\n", text)
        assert topics[0] == test.expected and len(set(topics)) == len(topics) >= (1 if test.length == 1500 else 4)
        assert "What is the first topic we discussed?" in text[-200:]


def test_the_line_that_is_asked_for_is_whole_and_there_once():
    depths = []
    for test in generated_tests(PROMPTER, "lines", [700, 4000], 10, seed=0):
        text = TOKENIZER.decode(test.tokens)
        assert test.length == len(test.tokens) + test.answer_tokens
        name = re.search(r"<REGISTER_CONTENT> in line (.*)\? I need", text)[1]
        assert re.findall(rf"^line {name}: REGISTER_CONTENT is <(\d+)>$", text, re.MULTILINE) == [test.expected]
        names = re.findall(r"^line (.*):", text, re.MULTILINE)
        assert len(set(names)) == len(names)
        depths.append(test.depth)
    assert min(depths) < 0.2 and max(depths) > 0.8


@pytest.mark.parametrize("form", ["topics", "lines"])
def test_a_length_that_no_prompt_fits_says_what_would(form):
    with pytest.raises(InputError, match=r"needs \d+ tokens with this tokenizer, not 300"):
        generated_tests(PROMPTER, form, [300], 1, seed=0)
    with pytest.raises(InputError, match="needs 261 tokens"):
        passkey_tests(PROMPTER, [200], [0.5], 1, seed=0)
    assert passkey_tests(PROMPTER, [261], [0.5], 1, seed=0)[0].length == 261


def test_longchats_files_are_read_by_their_number_of_topics_or_lines(tmp_path):
    topics = {"prompt": "USER: the first? ", "topics": ["The psychology of sleep.", "Art"], "prompt_length": -1}
    one = {**topics, "topics": ["Art"]}
    lines = {"prompt": "line a?", "expected_number": 77, "num_lines": 300, "random_idx": ["a-b", 150]}
    (tmp_path / "2_topics.jsonl").write_text("".join(json.dumps(topics) + "\n" for _ in range(5)))
    (tmp_path / "10_lines.jsonl").write_text(json.dumps(lines))
    (tmp_path / "1_topics.jsonl").write_text(json.dumps(one))
    found = longchat_tests(PROMPTER, tmp_path, tests=3)
    assert [(t.group, t.expected, t.depth) for t in found] == [
        ("1 topics", "Art", 0.0), *[("2 topics", "The psychology of sleep.", 0.0)] * 3, ("300 lines", "77", 0.5),
    ]  # fmt: skip
    assert TOKENIZER.decode(found[0].tokens) == "USER: the first?\n ASSISTANT:"


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" 12345. Remember it.", "12345", True),
        ("is <12345>", "12345", True),
        ("123456", "12345", False),
        ("12,345", "12345", False),
        ("The first topic is: the psychology\nof SLEEP!", "The psychology of sleep.", True),
        ("Psychology of sleep", "The psychology of sleep", True),
        ("The psychology of sleepers", "The psychology of sleep", False),
        ("", "12345", False),
    ],
)
def test_when_an_answer_counts(answer, expected, right):
    assert contains(answer, expected) is right


def test_answers_are_greedy_with_full_attention_and_the_cache_changes_nothing():
    """Against the most likely token of a fresh forward pass over all tokens so far.

    The reference model was never given a pattern; the one under test trains with a sparse one.
    """
    model = SOURCE.load(512, "none", torch.float32)
    plain = SOURCE.load(512, "none", torch.float32)
    use_pattern(model, AttentionPattern(name="s2", group_size=32))
    tests = passkey_tests(PROMPTER, [300, 400], [0.5], 1, seed=0)
    results = run_tests(model, TOKENIZER, tests, Engine(torch.device("cpu"), "float32"))
    for test, result in zip(tests, results):
        tokens = list(test.tokens)
        for _ in range(test.answer_tokens):
            with torch.no_grad():
                tokens.append(plain(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        assert result.answer == TOKENIZER.decode(tokens[len(test.tokens) :])
        assert (result.correct, result.length) == (test.expected in result.answer, test.length)


def test_an_answer_ends_at_a_token_that_the_model_ends_with():
    model = SOURCE.load(512, "none", torch.float32)
    use_pattern(model, AttentionPattern(name="full"))
    tests = passkey_tests(PROMPTER, [300], [0.5], 1, seed=0)
    engine = Engine(torch.device("cpu"), "float32")
    whole = run_tests(model, TOKENIZER, tests, engine)[0].answer
    end = whole[4]
    model.generation_config.eos_token_id = [256, ord(end)]
    assert run_tests(model, TOKENIZER, tests, engine)[0].answer == whole[: whole.index(end)]


CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<a>"


def test_a_chat_template_is_part_of_the_length():
    tokenizer = SOURCE.tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        Prompter(tokenizer, chat=True)
    tokenizer.chat_template = CHAT
    test = passkey_tests(Prompter(tokenizer, chat=True), [600], [0.5], 1, seed=0)[0]
    text = tokenizer.decode(test.tokens)
    assert text.startswith("<s>user: There is an important info")
    assert text.endswith("What is the pass key?</s><a>The pass key is") and test.length == 600


def test_a_prompt_begins_as_the_models_texts_do():
    tokenizer = SOURCE.tokenizer()
    assert passkey_tests(Prompter(tokenizer), [300], [0.5], 1, seed=0)[0].tokens[0] == ord("T")
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    test = passkey_tests(Prompter(tokenizer), [300], [0.5], 1, seed=0)[0]
    assert test.tokens.count(256) == 1 and test.tokens[0] == 256 and test.length == 300
