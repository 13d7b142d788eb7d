"""The sequences of one optimiser step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Sequences, padded on the right to the longest of them.

    Args:
        tokens: (sequences, N), int64; arbitrary beyond a sequence's length.
        scored: (sequences, N), bool: the tokens that the loss is the mean of; never a sequence's first, which has no
            context, and never padding.
        lengths: (sequences,), int64: the tokens of each sequence, without padding.
    """

    tokens: np.ndarray
    scored: np.ndarray
    lengths: np.ndarray

    @classmethod
    def whole(cls, tokens: np.ndarray) -> Batch:
        """Sequences without padding, of which every token but the first is scored."""
        scored = np.ones(tokens.shape, dtype=bool)
        scored[:, 0] = False
        return cls(tokens, scored, np.full(len(tokens), tokens.shape[1]))

    @classmethod
    def padded(cls, tokens: list[np.ndarray], scored: list[np.ndarray]) -> Batch:
        """Sequences of any lengths, each with which of its tokens are scored."""
        lengths = np.array([len(sequence) for sequence in tokens], dtype=np.int64)
        batch = cls(
            np.zeros((len(tokens), lengths.max()), dtype=np.int64),
            np.zeros((len(tokens), lengths.max()), dtype=bool),
            lengths,
        )
        for row, (sequence, counts) in enumerate(zip(tokens, scored)):
            batch.tokens[row, : len(sequence)] = sequence
            batch.scored[row, 1 : len(sequence)] = counts[1:]
        return batch

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, rows: slice) -> Batch:
        """Some of the sequences, without padding beyond the longest of them."""
        longest = self.lengths[rows].max(initial=0)
        return Batch(self.tokens[rows, :longest], self.scored[rows, :longest], self.lengths[rows])

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of up to ``size`` sequences."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    @property
    def attention_mask(self) -> np.ndarray | None:
        """(sequences, N), bool: True except for padding; None without padding."""
        width = self.tokens.shape[1]
        return None if (self.lengths == width).all() else np.arange(width) < self.lengths[:, None]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    @property
    def num_scored(self) -> int:
        """Tokens that the loss is the mean of."""
        return int(self.scored.sum())
