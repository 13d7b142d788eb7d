"""Perplexity against transformers' own loss and against a loop over tokens; intervals against what they promise."""

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
from workloads.evaluation.bootstrap import (
    DocumentScores,
    accuracy_interval,
    gap_interval,
    perplexity_interval,
    subsampling_error,
)
from workloads.evaluation.documents import documents_to_score
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
    """A document whose tokens are all different tells which of them the windows end with."""
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


def simulated(generator, documents, mean, spread=0.2):
    tokens = generator.integers(500, 1500, documents)
    return DocumentScores(tokens * generator.normal(mean, spread, documents), tokens)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        interval = perplexity_interval(simulated(generator, 30, mean=1.0))
        covered += interval.low <= math.exp(1.0) <= interval.high
    assert 0.87 <= covered / 200 <= 0.99


def test_pairing_sees_a_small_difference_that_lies_in_every_document():
    """Documents differ by 20%, the models by 1%: the gap is certain though each perplexity is not."""
    baseline = simulated(np.random.default_rng(0), 20, mean=1.0)
    worse = DocumentScores(baseline.nll + 0.01 * baseline.tokens, baseline.tokens)
    own, gap = perplexity_interval(worse), gap_interval(worse, baseline)
    assert own.low < baseline.perplexity < own.high
    assert gap.low == pytest.approx(gap.high) == pytest.approx(math.exp(0.01) - 1)
    assert gap.value == pytest.approx(worse.perplexity / baseline.perplexity - 1)


def several_seeds(generator, seeds, documents, spread):
    """Scores of one setting: documents of different hardness, and seeds that differ by ``spread``."""
    tokens = generator.integers(500, 1500, documents)
    nll = tokens * (1.0 + 0.2 * generator.standard_normal(documents))
    return tokens, {seed: nll + tokens * spread * generator.standard_normal() for seed in seeds}


def test_several_seeds_are_drawn_again_as_documents_are():
    """Against the bootstrap written out, one resample at a time, with draws of its own."""
    generator = np.random.default_rng(3)
    tokens, nll = several_seeds(generator, (0, 1, 2, 3), 30, spread=0.05)
    other = {seed: values - tokens * (0.02 + 0.01 * seed) for seed, values in nll.items()}
    high, low = (
        DocumentScores.over_seeds({seed: DocumentScores(values, tokens) for seed, values in each.items()})
        for each in (nll, other)
    )
    assert high.perplexity == pytest.approx(np.exp(sum(v.sum() for v in nll.values()) / (4 * tokens.sum())))
    ratios = []
    for _ in range(20_000):
        documents, seeds = generator.integers(30, size=30), generator.integers(4, size=4)
        ours, theirs = (
            sum(values[int(seed)][documents].sum() for seed in seeds) / (4 * tokens[documents].sum())
            for values in (nll, other)
        )
        ratios.append(np.exp(ours - theirs) - 1)
    expected = np.quantile(ratios, [0.025, 0.975])
    gap = gap_interval(high, low)
    assert (gap.low, gap.high) == pytest.approx(expected, abs=1.5e-3)
    assert gap.high - gap.low > 0.01  # though the documents alone say the same of every seed's gap
    # The same seeds are drawn for both: what makes a seed good cancels out, as what makes a document easy does.
    apart = gap_interval(high, DocumentScores(low.nll, tokens, (4, 5, 6, 7)))
    assert apart.high - apart.low > 2 * (gap.high - gap.low)


def test_one_seed_is_the_bootstrap_over_documents_alone():
    tokens, nll = several_seeds(np.random.default_rng(5), (7,), 12, spread=0.1)
    alone = DocumentScores(nll[7], tokens)
    drawn = np.random.default_rng(0).integers(12, size=(4000, 12))
    resampled = np.exp(nll[7][drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    for scores in (alone, DocumentScores.over_seeds({7: alone})):
        interval = perplexity_interval(scores)
        assert [interval.low, interval.high] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), rel=1e-12)
        assert interval.value == pytest.approx(alone.perplexity)


def test_models_scored_on_other_documents_are_not_compared():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="same documents"):
        gap_interval(simulated(generator, 5, 1.0), simulated(generator, 5, 1.0))


def test_the_error_of_a_subsample_is_about_what_it_says():
    """Of many subsamples, about 95% lie within the error that each states."""
    generator = np.random.default_rng(0)
    nll = generator.gamma(4.0, 0.5, 200) * 100
    truth = math.exp(nll.sum() / (200 * 100))
    within = 0
    for _ in range(400):
        sample = generator.choice(nll, 50, replace=False)
        within += abs(math.exp(sample.mean() / 100) / truth - 1) <= subsampling_error(sample, 100, 200)
    assert 0.92 <= within / 400 <= 0.98
    assert subsampling_error(nll, 100, 200) == 0


def test_wilson_intervals():
    """Brown, Cai and DasGupta (2001) give the formula; the values are those of statsmodels' proportion_confint."""
    assert (accuracy_interval(10, 10).low, accuracy_interval(10, 10).high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert (accuracy_interval(3, 10).low, accuracy_interval(3, 10).high) == pytest.approx((0.1078, 0.6032), abs=1e-4)
    assert accuracy_interval(0, 10).low == pytest.approx(0, abs=1e-12)
