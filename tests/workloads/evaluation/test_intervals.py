"""Intervals against what they promise: simulated coverage, and the same arithmetic written out."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.interval_coverage import coverage
from workloads.evaluation.intervals import (
    DocumentScores,
    accuracy_interval,
    gap_interval,
    perplexity_interval,
    subsampling_error,
)


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


def over_seeds(nll, tokens):
    return DocumentScores.over_seeds({seed: DocumentScores(values, tokens) for seed, values in nll.items()})


@pytest.mark.parametrize("documents", [5, 6, 12, 19])
def test_few_documents_of_one_length_have_the_textbooks_t_interval(documents):
    generator = np.random.default_rng(documents)
    ours, theirs = generator.normal(2.0, 0.1, documents), generator.normal(1.9, 0.1, documents)
    tokens = np.full(documents, 700)
    gap = gap_interval(DocumentScores(700 * ours, tokens), DocumentScores(700 * theirs, tokens))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx(tuple(np.expm1(expected)))
    assert gap.value == pytest.approx(math.expm1(ours.mean() - theirs.mean()))


def test_a_long_document_counts_as_the_many_tokens_and_the_few_documents_that_it_is():
    """Two documents that hold nearly all tokens are hardly more than two documents."""
    tokens = np.array([50_000, 50_000, 100, 100, 100, 100])
    each = np.array([1.9, 2.1, 2.0, 2.0, 2.0, 2.0])
    interval = perplexity_interval(DocumentScores(each * tokens, tokens))
    assert interval.value == pytest.approx(math.exp(2.0))
    half = stats.t.ppf(0.975, 1.01) * 0.1 / math.sqrt(2)
    assert math.log(interval.high / interval.value) == pytest.approx(half, rel=0.15)


@pytest.mark.parametrize("documents", [1, 4])
def test_fewer_than_five_documents_have_no_interval(documents):
    generator = np.random.default_rng(0)
    scores = simulated(generator, documents, 1.0)
    unscored = DocumentScores(np.append(scores.nll, np.zeros(9)), np.append(scores.tokens, np.zeros(9, int)))
    for each in (scores, unscored):
        for interval in (perplexity_interval(each), gap_interval(each, each)):
            assert (interval.low, interval.high, interval.sign) == (None, None, 0)
    assert perplexity_interval(unscored).value == pytest.approx(scores.perplexity)


def test_a_difference_between_seeds_is_as_certain_as_the_seeds_are_many():
    """Documents that all say the same leave the textbook's t-interval over the seeds."""
    generator, tokens = np.random.default_rng(2), np.full(30, 500)
    for seeds in (2, 3, 5):
        each = generator.normal(0.02, 0.01, seeds)
        ours = over_seeds({seed: 500 * (2.0 + each[seed]) * np.ones(30) for seed in range(seeds)}, tokens)
        theirs = over_seeds({seed: 500 * 2.0 * np.ones(30) for seed in range(seeds)}, tokens)
        gap = gap_interval(ours, theirs)
        expected = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert (gap.low, gap.high) == pytest.approx(tuple(np.expm1(expected)))


def test_the_half_widths_over_documents_and_over_seeds_add_in_squares():
    """Against the bootstrap over documents written out, and SciPy's interval over the seeds."""
    generator = np.random.default_rng(3)
    tokens, nll = several_seeds(generator, (0, 1, 2, 3), 30, spread=0.05)
    other = {seed: values - tokens * (0.02 + 0.01 * seed) for seed, values in nll.items()}
    high, low = over_seeds(nll, tokens), over_seeds(other, tokens)
    assert high.perplexity == pytest.approx(np.exp(sum(v.sum() for v in nll.values()) / (4 * tokens.sum())))
    gap = gap_interval(high, low)
    of_seeds = stats.ttest_1samp([0.02 + 0.01 * seed for seed in range(4)], 0).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx(tuple(np.expm1(of_seeds)))  # the documents agree on each seed's gap
    # Without common seeds each side's own variance counts, and pairing documents still helps.
    apart = gap_interval(high, DocumentScores(low.nll, tokens, (4, 5, 6, 7)))
    assert apart.high - apart.low > 2 * (gap.high - gap.low)
    resampled = []
    difference = np.mean(high.nll, axis=0) - np.mean(low.nll, axis=0) + tokens * 0.05 * generator.standard_normal(30)
    for _ in range(20_000):
        documents = generator.integers(30, size=30)
        resampled.append(difference[documents].sum() / tokens[documents].sum())
    both = gap_interval(
        DocumentScores(low.nll + difference, tokens, low.seeds), DocumentScores(low.nll, tokens, low.seeds)
    )
    assert (both.low, both.high) == pytest.approx(tuple(np.expm1(np.quantile(resampled, [0.025, 0.975]))), abs=1.5e-3)


def test_one_seed_is_the_bootstrap_over_documents_alone():
    tokens, nll = several_seeds(np.random.default_rng(5), (7,), 24, spread=0.1)
    alone = DocumentScores(nll[7], tokens)
    drawn = np.random.default_rng(0).integers(24, size=(4000, 24))
    resampled = np.exp(nll[7][drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    for scores in (alone, DocumentScores.over_seeds({7: alone})):
        interval = perplexity_interval(scores)
        assert [interval.low, interval.high] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), rel=1e-6)
        assert interval.value == pytest.approx(alone.perplexity)


@pytest.mark.parametrize(
    ("least", "case"),
    [
        (0.93, {"documents": 5}),
        (0.93, {"documents": 8}),
        (0.91, {"documents": 5, "unequal": True}),
        (0.91, {"documents": 12, "shape": "skewed"}),
        (0.94, {"documents": 8, "seeds": 2, "seed_to_documents": 3.0}),
        (0.94, {"documents": 20, "seeds": 2, "seed_to_documents": 1.0}),
        (0.94, {"documents": 20, "seeds": 3, "seed_to_documents": 3.0}),
    ],
)
def test_small_samples_cover_the_truth_as_documented(least, case):
    assert coverage(simulations=1000, **case) >= least


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
