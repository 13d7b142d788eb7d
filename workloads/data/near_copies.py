"""Held-out documents that are nearly in the training data: editions of a book, or versions of a file.

A shingle is some tokens in a row: 13, as GPT-3's check of its benchmarks took (Brown et al., 2020, appendix C), or more
where a token is less than four characters. A document is a near-copy if training has more than half of its shingles.
That share is estimated from an eighth of all shingles, the same ones everywhere: those whose hash is in the lowest
eighth (bottom sketches: Broder, On the resemblance and containment of documents, 1997).

The cost is one pass over the training tokens, about 35 ns a token on one core (3.5 s for 100 million), and memory that
does not grow with them. Of held-out documents the first 4 million tokens, in the order of scoring, are compared.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SHINGLE_TOKENS = 13
SHINGLE_CHARACTERS = 52
NEAR = 0.5
MAX_HELD_OUT_TOKENS = 2**22
SAMPLE = 8
# A document with fewer sampled shingles, of about 75 tokens, is too short to be judged.
_MIN_SAMPLED = 8
_TOKENS_AT_ONCE = 2**16
_TABLE_BITS = 24

_BASE = 0x9E3779B97F4A7C15
_MIX = 0xD6E8FEB86659FD93


def shingle_size(characters: int, tokens: int) -> int:
    """Tokens in a shingle, of a text with so many characters and tokens."""
    return max(SHINGLE_TOKENS, round(SHINGLE_CHARACTERS * tokens / max(characters, 1)))


def near_copies(
    train: np.ndarray, held_out: Iterable[tuple[str, np.ndarray]], shingle: int, sample: int = SAMPLE
) -> dict[str, float]:
    """The share of its shingles that training has, of every held-out document that shares more than half; by name.

    Args:
        train: all training tokens; may be a memory map.
        held_out: (name, tokens) of documents in the order of scoring.
        shingle: tokens in a shingle.
        sample: one of so many shingles is compared.
    """
    sketches: dict[str, np.ndarray] = {}
    tokens_taken = 0
    for name, tokens in held_out:
        sketch = np.unique(_sampled(tokens, shingle, sample))
        if len(sketch) >= _MIN_SAMPLED:
            sketches[name] = sketch
        tokens_taken += len(tokens)
        if tokens_taken >= MAX_HELD_OUT_TOKENS:
            break
    if not sketches:
        return {}
    hashes = np.unique(np.concatenate(list(sketches.values())))
    shared = np.zeros(len(hashes), dtype=bool)
    # Most training shingles are in no held-out document; a table by some bits of the hash rules them out quickly.
    table = np.zeros(2**_TABLE_BITS, dtype=bool)
    table[_places(hashes)] = True
    for begin in range(0, len(train), _TOKENS_AT_ONCE):
        found = _sampled(train[begin : begin + _TOKENS_AT_ONCE + shingle - 1], shingle, sample)
        found = found[table[_places(found)]]
        places = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
        shared[places[hashes[places] == found]] = True
    shares = {name: float(shared[np.searchsorted(hashes, sketch)].mean()) for name, sketch in sketches.items()}
    return {name: share for name, share in sorted(shares.items(), key=lambda one: -one[1]) if share > NEAR}


def _sampled(tokens: np.ndarray, shingle: int, sample: int) -> np.ndarray:
    """The hashes of the shingles that are compared, uint64."""
    hashes = _shingle_hashes(tokens, shingle)
    return hashes[hashes <= np.uint64(2**64 // sample - 1)]


def _shingle_hashes(tokens: np.ndarray, shingle: int) -> np.ndarray:
    """A hash of each run of ``shingle`` tokens: a polynomial modulo 2^64, from those of runs of 1, 2, 4 ... tokens."""
    if len(tokens) < shingle:
        return np.zeros(0, dtype=np.uint64)
    runs, length = tokens.astype(np.uint64) + np.uint64(1), 1
    hashes, done = np.zeros(len(tokens) + 1, dtype=np.uint64), 0
    left = shingle
    while left:
        if left & 1:
            count = len(tokens) - done - length + 1
            hashes = hashes[:count] * _power(length) + runs[done : done + count]
            done += length
        left >>= 1
        if left:
            runs = runs[:-length] * _power(length) + runs[length:]
            length *= 2
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(_MIX)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(_MIX)
    return hashes


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 2**64))


def _places(hashes: np.ndarray) -> np.ndarray:
    # The lowest bits of a product are its least mixed, the highest ones chose the sample.
    return (hashes >> np.uint64(32)) & np.uint64(2**_TABLE_BITS - 1)
