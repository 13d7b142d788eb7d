"""Texts to token ids. A special token that a text spells (``<|endoftext|>``) is text: only we and templates add it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text, without any special token."""
    if not getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return iter(encoded["input_ids"])
    # Without transformers' wrapper, which also builds masks and offsets: 1.3 s against 3.2 s for 12 MB of bytes.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    with _special_tokens_as_text(backend):
        return (encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token, whatever its part, with its id."""
    return {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}


@contextmanager
def _special_tokens_as_text(backend: Any) -> Iterator[None]:
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        yield
    finally:
        backend.encode_special_tokens = before


class SpelledTokens:
    """Tells the special tokens that a row's texts spell from those that a chat template writes around them.

    Before a template sees a text, ``hide`` replaces each special token in it by a private-use character, repeated to
    its length: positions stay. In what the template wrote, ``reveal`` undoes that, and ``as_text`` encodes.
    """

    _FIRST = 0x100000  # of the 65,534 characters of the last plane, which no standard gives a meaning
    _HIDDEN = re.compile(f"([{chr(_FIRST)}-{chr(0x10FFFD)}])\\1*")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokens = special_tokens(tokenizer)
        self._ids = set(tokens.values())
        self._spellings = sorted(tokens, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, self._spellings)) or "(?!)")

    def hide(self, text: str) -> str:
        """The text without special tokens, of the same length."""
        return self._spelled.sub(lambda m: chr(self._FIRST + self._spellings.index(m[0])) * len(m[0]), text)

    def reveal(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text as it was, and where hidden tokens are: (begin, end) in characters."""
        places: list[tuple[int, int]] = []

        def spelling(hidden: re.Match) -> str:
            index = ord(hidden[1]) - self._FIRST
            token = self._spellings[index] if index < len(self._spellings) else ""
            times, rest = divmod(len(hidden[0]), len(token) or 1)
            if not token or rest:  # not ours
                return hidden[0]
            places.extend(
                (hidden.start() + i * len(token), hidden.start() + (i + 1) * len(token)) for i in range(times)
            )
            return token * times

        return self._HIDDEN.sub(spelling, text), places

    def as_text(
        self, text: str, places: Sequence[tuple[int, int]], ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their offsets in the text, special tokens at ``places`` replaced by the ids of their text."""
        if not places:
            return ids, offsets
        new_ids: list[int] = []
        new_offsets: list[tuple[int, int]] = []
        for id_, (begin, end) in zip(ids, offsets):
            place = next((p for p in places if id_ in self._ids and begin < p[1] and p[0] < end), None)
            (plain,) = encode_texts(self.tokenizer, [text[slice(*place)]]) if place else ([id_],)
            new_ids += plain
            new_offsets += [place or (begin, end)] * len(plain)
        return new_ids, new_offsets
