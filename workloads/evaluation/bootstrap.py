"""Confidence intervals by bootstrap over documents (NumPy only).

Tokens of one document are not independent, so documents are what is drawn again. Comparisons are paired: both models
are scored on the same drawn documents, so that what makes a document hard cancels out. One seed shows nothing of the
variance between training runs; these intervals speak of the choice of documents alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# How workloads.evaluation.perplexity scores.
RULE = (
    "non-overlapping windows of the evaluation length inside documents, every token scored but a window's first, "
    "full attention"
)

# How workloads.evaluation.answers scores.
ANSWERS_RULE = "every token of the answers of held-out examples that fit into the context, full attention"

CONFIDENCE = 0.95
RESAMPLES = 4_000


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DocumentScores:
    """What a model scored on each document: ``nll`` the summed negative log-likelihood (nats), ``tokens`` its tokens.

    Both have the shape (documents,), in the same order of documents for every model that is compared.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, event: dict[str, Any]) -> DocumentScores:
        """From the fields of an ``eval`` event (see ``workloads.training``)."""
        return cls(np.array(event["nll"]), np.array(event["num_tokens"]))

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.sum() / self.tokens.sum()))


def perplexity_interval(scores: DocumentScores) -> Interval:
    """Perplexity over all tokens, with its bootstrap percentile interval over documents."""
    low, high = np.quantile(np.exp(_mean_nll_of_resamples(scores)), _tails())
    return Interval(scores.perplexity, float(low), float(high))


def gap_interval(scores: DocumentScores, baseline: DocumentScores) -> Interval:
    """How much higher the perplexity is than the baseline's, as a fraction (0.01: 1%), by paired bootstrap.

    Raises:
        ValueError: the two did not score the same tokens.
    """
    if not np.array_equal(scores.tokens, baseline.tokens):
        raise ValueError("only models scored on the same documents can be compared pairwise")
    ratios = np.exp(_mean_nll_of_resamples(scores) - _mean_nll_of_resamples(baseline)) - 1
    low, high = np.quantile(ratios, _tails())
    return Interval(scores.perplexity / baseline.perplexity - 1, float(low), float(high))


def subsampling_error(nll: np.ndarray, scored: int, num_windows: int) -> float:
    """By how much a perplexity from a random part of the windows may miss that of all of them, as a fraction.

    Half the width, at CONFIDENCE, of the normal interval for the mean of a simple random sample without replacement
    (Cochran, Sampling Techniques, section 2.5). It speaks of these documents' windows alone and not of the choice of
    documents, which the bootstrap interval covers. Infinite for a single window of several.

    Args:
        nll: summed over each sampled window's scored tokens, shape (sampled windows,).
        scored: tokens scored of each window.
        num_windows: of which the sample was drawn.
    """
    if len(nll) == num_windows:
        return 0.0
    if len(nll) < 2:
        return math.inf
    deviation = (nll / scored).std(ddof=1) * math.sqrt((1 - len(nll) / num_windows) / len(nll))
    return float(math.expm1(NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation))


def accuracy_interval(correct: int, tests: int) -> Interval:
    """A share of tests passed with its Wilson score interval (Wilson, 1927), which holds at 0 and 1 too."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = correct / tests
    centre = (share + z**2 / (2 * tests)) / (1 + z**2 / tests)
    half = z / (1 + z**2 / tests) * math.sqrt(share * (1 - share) / tests + z**2 / (4 * tests**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def _mean_nll_of_resamples(scores: DocumentScores) -> np.ndarray:
    """The mean negative log-likelihood of each resample, shape (RESAMPLES,): the same draws at every call."""
    count = len(scores.tokens)
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    return scores.nll[drawn].sum(axis=1) / scores.tokens[drawn].sum(axis=1)


def _tails() -> list[float]:
    return [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
