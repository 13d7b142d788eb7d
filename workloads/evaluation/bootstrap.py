"""Confidence intervals by bootstrap over documents, and over seeds where there are several (NumPy only).

Tokens of one document are not independent, so documents are resampled. Comparisons are paired: both models are scored
on the same drawn documents, and a document's difficulty cancels out. If a setting was trained with several seeds, each
resample draws seeds with replacement too, independently of the documents (both factors of a crossed design; Owen, The
pigeonhole bootstrap, 2007), and takes the mean log-likelihood over them; two settings with the same seeds draw the same
ones, since a seed fixes the order of the data for both. With two or three seeds such an interval is still too narrow:
they show little of the variance between training runs. With one seed it shows none, and the interval covers the choice
of documents alone.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# The rule of workloads.evaluation.windows.
RULE = (
    "non-overlapping windows of the evaluation length inside documents, every token scored but a window's first, "
    "full attention"
)

# The rule of workloads.evaluation.answers.
ANSWERS_RULE = "every token of the answers of held-out examples that fit into the context, full attention"

CONFIDENCE = 0.95
RESAMPLES = 4_000


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DocumentScores:
    """A model's scores of each document: ``nll`` the summed negative log-likelihood (nats), ``tokens`` its tokens.

    Both have the shape (documents,), in the same order of documents for all compared models. For a setting trained with
    several seeds (:meth:`over_seeds`), ``nll`` has the shape (seeds, documents).
    """

    nll: np.ndarray
    tokens: np.ndarray
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, event: dict[str, Any]) -> DocumentScores:
        """From the fields of an ``eval`` event (see ``workloads.training.loop``)."""
        return cls(np.array(event["nll"]), np.array(event["num_tokens"]))

    @classmethod
    def of_windows(cls, owner: np.ndarray, nll: np.ndarray, scored: int, num_documents: int) -> DocumentScores:
        """Sums the scores of windows by document.

        Args:
            owner: the index of each window's document, shape (windows,).
            nll: of each window, shape (windows,).
            scored: tokens scored of each window.
            num_documents: some may have no window.
        """
        nll_by_document = np.bincount(owner, weights=nll, minlength=num_documents)
        return cls(nll_by_document, np.bincount(owner, minlength=num_documents) * scored)

    @classmethod
    def over_seeds(cls, by_seed: dict[int, DocumentScores]) -> DocumentScores:
        """The scores of one setting trained with several seeds.

        Raises:
            ValueError: the seeds did not score the same tokens.
        """
        tokens = next(iter(by_seed.values())).tokens
        if not all(np.array_equal(scores.tokens, tokens) for scores in by_seed.values()):
            raise ValueError("only models scored on the same documents can be averaged")
        seeds = tuple(sorted(by_seed))
        return cls(np.stack([by_seed[seed].nll for seed in seeds]), tokens, seeds)

    @property
    def perplexity(self) -> float:
        """Over all tokens; for several seeds, from the mean of their log-likelihoods."""
        return float(np.exp(np.atleast_2d(self.nll).mean(axis=0).sum() / self.tokens.sum()))


def perplexity_interval(scores: DocumentScores) -> Interval:
    """Perplexity over all tokens, with its bootstrap percentile interval over documents, and over several seeds."""
    low, high = np.quantile(np.exp(_mean_nll_of_resamples(scores)), _tails())
    return Interval(scores.perplexity, float(low), float(high))


def gap_interval(scores: DocumentScores, baseline: DocumentScores) -> Interval:
    """How much higher the perplexity is than the baseline's, as a fraction (0.01: 1%), by paired bootstrap.

    A resample has the same documents for both, and the same seeds if both have the same ones; otherwise each draws from
    its own.

    Raises:
        ValueError: the two did not score the same tokens.
    """
    if not np.array_equal(scores.tokens, baseline.tokens):
        raise ValueError("only models scored on the same documents can be compared pairwise")
    apart = scores.seeds != baseline.seeds
    ratios = np.exp(_mean_nll_of_resamples(scores) - _mean_nll_of_resamples(baseline, stream=2 if apart else 1)) - 1
    low, high = np.quantile(ratios, _tails())
    return Interval(scores.perplexity / baseline.perplexity - 1, float(low), float(high))


def subsampling_error(nll: np.ndarray, scored: int, num_windows: int) -> float:
    """The error of a perplexity from a random part of the windows against that of all of them, as a fraction.

    Half the width, at CONFIDENCE, of the normal interval for the mean of a simple random sample without replacement
    (Cochran, Sampling Techniques, section 2.5). It covers the choice of these documents' windows; the bootstrap
    interval covers that of documents. Infinite for a single window of several.

    Args:
        nll: summed over each sampled window's scored tokens, shape (sampled windows,).
        scored: tokens scored of each window.
        num_windows: from which the sample was drawn.
    """
    if len(nll) == num_windows:
        return 0.0
    if len(nll) < 2:
        return math.inf
    deviation = (nll / scored).std(ddof=1) * math.sqrt((1 - len(nll) / num_windows) / len(nll))
    return float(math.expm1(NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation))


def accuracy_interval(correct: int, tests: int) -> Interval:
    """A share of passed tests with its Wilson score interval (Wilson, 1927), which is valid at 0 and 1 too."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = correct / tests
    centre = (share + z**2 / (2 * tests)) / (1 + z**2 / tests)
    half = z / (1 + z**2 / tests) * math.sqrt(share * (1 - share) / tests + z**2 / (4 * tests**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def _mean_nll_of_resamples(scores: DocumentScores, stream: int = 1) -> np.ndarray:
    """The mean negative log-likelihood of each resample, shape (RESAMPLES,).

    Every call draws the same documents, and for the same ``stream`` the same seeds.
    """
    nll = np.atleast_2d(scores.nll)
    if not np.isfinite(nll).all():  # a diverged model: not even a document's weight of 0 makes it finite
        return np.full(RESAMPLES, nll.sum())
    documents = _draws(len(scores.tokens), 0)
    totals = documents @ nll.T  # (resamples, seeds)
    seeds = _draws(len(nll), stream) / len(nll)
    return (totals * seeds).sum(axis=1) / (documents @ scores.tokens)


@functools.lru_cache(maxsize=8)
def _draws(count: int, stream: int) -> np.ndarray:
    """How often each of ``count`` items is in each resample, shape (RESAMPLES, count)."""
    drawn = np.random.default_rng(stream).integers(count, size=(RESAMPLES, count))
    places = drawn + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(float)


def _tails() -> list[float]:
    return [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
