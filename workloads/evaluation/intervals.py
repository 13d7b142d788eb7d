"""Confidence intervals of perplexities and of their differences (NumPy, and SciPy for Student's t).

Tokens of one document are not independent, so the documents are the sample. Comparisons are paired: both models are
scored on the same documents, and a document's difficulty cancels out. From 20 documents on the interval over documents
is the bootstrap's percentile interval; with 5 to 19 it is a t-interval, since the bootstrap's is too narrow there; with
fewer there is none.

A setting trained with several seeds adds the variance between them: a t-interval over the seeds' own values. The half
widths of the two add in squares, which covers at least as often as stated (Banerjee, Sankhya 22, 1960). Two settings
with the same seeds are paired by seed, since a seed fixes the order of the data for both. With one seed the interval
covers the choice of documents alone. Measured coverage: docs/comparison.md.
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
# Scored documents from which there is an interval, and from which it is the bootstrap's.
FEWEST_DOCUMENTS = 5
FEWEST_TO_RESAMPLE = 20


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval; both ends are None where too few documents were scored for one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """Of a difference that is established: 1 if the whole interval is above zero, -1 if below, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


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
    def num_documents(self) -> int:
        """The documents of which at least one token was scored."""
        return int(np.count_nonzero(self.tokens))

    @property
    def perplexity(self) -> float:
        """Over all tokens; for several seeds, from the mean of their log-likelihoods."""
        return float(np.exp(np.atleast_2d(self.nll).mean(axis=0).sum() / self.tokens.sum()))


def perplexity_interval(scores: DocumentScores) -> Interval:
    """Perplexity over all tokens, with its interval over documents, and over seeds if there are several."""
    low, high = _limits([np.atleast_2d(scores.nll)], scores.tokens)
    return Interval(scores.perplexity, None if low is None else _exp(low), None if high is None else _exp(high))


def gap_interval(scores: DocumentScores, baseline: DocumentScores) -> Interval:
    """How much higher the perplexity is than the baseline's, as a fraction (0.01: 1%), with its paired interval.

    Documents are paired. Seeds are paired if both have the same ones; otherwise each adds its own variance.

    Raises:
        ValueError: the two did not score the same tokens.
    """
    if not np.array_equal(scores.tokens, baseline.tokens):
        raise ValueError("only models scored on the same documents can be compared pairwise")
    ours, theirs = np.atleast_2d(scores.nll), np.atleast_2d(baseline.nll)
    parts = [ours - theirs] if scores.seeds == baseline.seeds else [ours, -theirs]
    low, high = _limits(parts, scores.tokens)
    value = scores.perplexity / baseline.perplexity - 1
    return Interval(value, None if low is None else _exp(low) - 1, None if high is None else _exp(high) - 1)


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


def _limits(parts: list[np.ndarray], tokens: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The interval of the mean log-likelihood of a token, summed over parts; (None, None) with too few documents.

    Args:
        parts: each of shape (seeds, documents): one, or two whose seeds are independent of each other.
        tokens: of each document.
    """
    scored = tokens > 0
    tokens, parts = tokens[scored], [part[:, scored] for part in parts]
    over_documents = np.sum([part.mean(axis=0) for part in parts], axis=0)
    value = float(over_documents.sum() / tokens.sum()) if len(tokens) else math.nan
    if len(tokens) < FEWEST_DOCUMENTS:
        return None, None
    if not math.isfinite(value):  # a diverged model
        return value, value
    if len(tokens) < FEWEST_TO_RESAMPLE:
        half = _half_width_over_documents(over_documents, tokens)
        low, high = value - half, value + half
    else:
        draws = _draws(len(tokens))
        low, high = np.quantile((draws @ over_documents) / (draws @ tokens), _tails())
    over_seeds = [_half_width(part.sum(axis=1) / tokens.sum()) for part in parts if len(part) > 1]
    return value - math.hypot(value - low, *over_seeds), value + math.hypot(high - value, *over_seeds)


def _half_width(values: np.ndarray) -> float:
    """Half the width of the t-interval of a mean."""
    return _student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def _half_width_over_documents(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Half the width of the t-interval of a mean over tokens, which documents contribute in clusters.

    The variance is that of a ratio estimator (Cochran, Sampling Techniques, section 6.4). Its degrees of freedom count
    documents of unequal length by Kish's effective sample size, the square of the sum of weights over that of squares.
    """
    weights = tokens / tokens.sum()
    deviations = (nll - tokens * nll.sum() / tokens.sum()) / tokens.sum()
    variance = len(tokens) / (len(tokens) - 1) * float(deviations @ deviations)
    return _student(1 / float(weights @ weights) - 1) * math.sqrt(variance)


def _student(degrees_of_freedom: float) -> float:
    """The quantile of Student's t at CONFIDENCE, two-sided."""
    from scipy.special import stdtrit  # loads a fifth of a second

    return float(stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2))


def _exp(value: float) -> float:
    """The exponential; infinite where it exceeds a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


@functools.lru_cache(maxsize=8)
def _draws(count: int) -> np.ndarray:
    """How often each of ``count`` documents is in each resample, shape (RESAMPLES, count); the same in every call."""
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    places = drawn + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(float)


def _tails() -> list[float]:
    return [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
