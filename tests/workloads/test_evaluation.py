"""Perplexity against transformers' own loss, and intervals against what they promise."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from workloads.attention import AttentionPattern, use_pattern
from workloads.data import ValidationDocument
from workloads.engine import Engine
from workloads.evaluation.bootstrap import DocumentScores, gap_interval, perplexity_interval
from workloads.evaluation.perplexity import score_documents
from workloads.models import ModelSource

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


def test_models_scored_on_other_documents_are_not_compared():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="same documents"):
        gap_interval(simulated(generator, 5, 1.0), simulated(generator, 5, 1.0))
