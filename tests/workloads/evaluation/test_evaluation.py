"""Perplexity against transformers' own loss and against a loop over tokens."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.models import small_llama
from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.data import Corpus, ValidationDocument, prepare
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.evaluation.documents import documents_to_score
from workloads.evaluation.intervals import DocumentScores
from workloads.evaluation.time_estimate import forward_cost
from workloads.evaluation.windows import cut_windows, score_documents, score_windows
from workloads.models.source import ModelSource

SOURCE = ModelSource.parse("builtin:tiny")


def random_documents(window):
    generator = np.random.default_rng(0)
    sizes = (3, 1, 2)
    return [ValidationDocument(f"{i}", generator.integers(97, 122, (n, window))) for i, n in enumerate(sizes)]


def test_perplexity_is_transformers_loss_over_all_windows_with_full_attention():
    """The model trains with a sparse pattern here; it must be scored with full attention all the same."""
    documents = random_documents(128)
    model = SOURCE.load(128, "none", torch.float32)
    use_pattern(model, AttentionPattern(name="s2", group_size=32))
    scores = score_documents(model, documents, Engine(torch.device("cpu"), "float32"), batch_tokens=300)

    stock = AutoModelForCausalLM.from_pretrained(SOURCE.location, dtype=torch.float32)
    expected = []
    with torch.no_grad():
        for document in documents:
            tokens = torch.from_numpy(document.tokens)
            expected.append(sum(stock(t[None], labels=t[None]).loss.item() * 127 for t in tokens))
    assert scores.nll == pytest.approx(expected, rel=1e-5)
    assert scores.tokens.tolist() == [127 * 3, 127, 127 * 2]
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / (127 * 6)), rel=1e-5)


@pytest.fixture(scope="module")
def random_model():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = small_llama(vocab_size=50, initializer_range=0.5, **shape).eval()
    use_pattern(model, AttentionPattern(name="full"))
    return model


def scored_one_by_one(model, document, length, stride, rule_scores):
    """(nll, tokens) of a document: every scored token of every window from a forward of its own."""
    nll, count = 0.0, 0
    start = 0
    while start + length <= len(document):
        window = document[start : start + length]
        for position in range(1, length):
            if rule_scores(position):
                with torch.no_grad():
                    logits = model(input_ids=torch.from_numpy(window[None, :position])).logits[0, -1]
                nll -= logits.log_softmax(dim=-1)[window[position]].item()
                count += 1
        start += stride
    return nll, count


@pytest.mark.parametrize("stride", [24, 8, 10])
def test_both_rules_are_what_a_loop_over_single_tokens_gives(random_model, stride):
    """Windows of 24 that do not overlap, that slide by what `last` scores, and that slide by something else."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(50, size=size) for size in (61, 24, 50)]
    windows, owner = cut_windows(documents, 24, stride)
    engine = Engine(torch.device("cpu"), "float32")
    nll = score_windows(random_model, windows, [23, 8], engine, batch_tokens=60)
    rules = {"all": (23, lambda position: True), "last": (8, lambda position: position >= 16)}
    for column, (scored, rule_scores) in enumerate(rules.values()):
        scores = DocumentScores.of_windows(owner, nll[:, column], scored, len(documents))
        expected = [scored_one_by_one(random_model, d, 24, stride, rule_scores) for d in documents]
        assert scores.nll == pytest.approx([nll for nll, _ in expected], rel=1e-5)
        assert scores.tokens.tolist() == [count for _, count in expected]


def test_sliding_by_what_is_scored_scores_each_token_once(random_model):
    """In a document of distinct tokens, the scored ones show where windows end."""
    windows, _ = cut_windows([np.arange(50)], 20, 5)
    assert np.concatenate([window[-5:] for window in windows]).tolist() == list(range(15, 50))


def test_documents_are_those_that_a_sweep_scores(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("".join(map(chr, generator.integers(97, 122, 200 + 10 * number))))
    corpus = Corpus.parse(str(tmp_path))
    packed = prepare(corpus, SOURCE.tokenizer, SOURCE.tokenizer_identity, tmp_path / ".data")
    expected = packed.validation_windows(256, 256, 3)
    found = documents_to_score(corpus, SOURCE.tokenizer(), 256, 3)
    assert [document.name for document in found] == [document.name for document in expected]
    assert all(np.array_equal(one.tokens, other.tokens[0]) for one, other in zip(found, expected))
    assert len(documents_to_score(corpus, SOURCE.tokenizer(), 200, 99, held_out_only=False)) == 40
    with pytest.raises(InputError, match=r"longest of .* held-out .* Long enough are .* at 256"):
        documents_to_score(corpus, SOURCE.tokenizer(), 1000, 3)


def test_the_cost_is_the_papers():
    """Table 11, Llama2 7B at 8,192 tokens: attention 35.2, projections 35.2, FFN 70.9 TFLOP; and lm_head 2.15."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cost = forward_cost(model, {8192: 2})
    assert (cost.forwards, cost.tokens) == (2, 16384)
    assert cost.attention_flops / 2e12 == pytest.approx(35.2, abs=0.05)
    assert (cost.flops - cost.attention_flops) / 2e12 == pytest.approx(35.2 + 70.9 + 2.15, abs=0.1)
