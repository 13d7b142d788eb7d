"""Which documents or examples are held out, and that none of them is trained on.

A hash of its text, without white space, decides about a document. So the same texts are held out whatever their files
are called, whether they come as text, JSON Lines or Parquet, and in any order; and a document's split does not change
when others are added. Held out are the hashes in the lowest tenth (``--holdout``) of all possible ones. Where those are
fewer than eight documents, their number would be too random, and it is exact instead: the documents with the lowest
hashes, a tenth of them (at most eight, at least one), and never more than half. Of a single document, the last tenth is
held out.

Data that brings its own split keeps it: ``builtin:stdlib``, and Hugging Face data sets with a validation or test split.
With ``--eval-data`` the held-out documents are others: those of that data (of data with its own split, its held-out
part), and ``--data`` is only trained on (of data with its own split, its training part).

Copies, which are documents with the same hash, are never in both splits: training loses those of held-out documents,
and a document is held out once only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from workloads.data.documents import Split, name_hash, text_hash
from workloads.errors import InputError

Item = TypeVar("Item")

# Items by name, of one split, or of none where they are to be divided.
Part = tuple[Split | None, Iterable[tuple[str, Item]]]

# Whether items of this split are still wanted; this may change from True to False while they are read.
Wanted = Callable[[Split], bool]

HOLDOUT = 0.1
# In the identity of data, before that of the data which is held out.
EVALUATED_ON = ":evaluated on "
ENOUGH_HELD_OUT = 8


@dataclass
class Division:
    """How data was divided, filled while it is read.

    Args:
        rule: what is held out, in words.
        copies_dropped: copies of held-out documents that were left out, of either split.
        near_copies: the share of their shingles that training has too, of held-out documents that share more than half
            (near_copies.py), by name.
        shingle: tokens in a shingle.
    """

    rule: str = ""
    copies_dropped: int = 0
    near_copies: dict[str, float] = field(default_factory=dict)
    shingle: int = 0

    def __post_init__(self) -> None:
        near = self.near_copies.items()
        if not (
            isinstance(self.rule, str)
            and all(type(number) is int and number >= 0 for number in (self.copies_dropped, self.shingle))
            and all(isinstance(name, str) and isinstance(share, float) for name, share in near)
        ):
            raise ValueError(f"its index has {self!r}; expected how the data was divided")


@dataclass(frozen=True, slots=True)
class Divided(Generic[Item]):
    """An item with its split, None if it is the only one, and a 64-bit hash by which held-out items are ordered."""

    name: str
    item: Item
    split: Split | None
    order: int


def check_holdout(share: float | None, eval_data: str | None) -> float | None:
    """The share to hold out, None for the default's.

    Raises:
        InputError: it is out of range, or has no effect because there is ``eval_data``.
    """
    if share is None:
        return None
    if not 0 < share <= 0.5:
        raise InputError(f"--holdout {share:g}: expected a share of the documents above 0 and at most 0.5, such as 0.2")
    if eval_data is not None:
        raise InputError(
            f"--holdout {share:g} has no effect with --eval-data {eval_data}: all of --data is trained on. Leave one "
            "of them out."
        )
    return None if share == HOLDOUT else share


def refuse_same_data(name: str, num_trained: int, division: Division) -> None:
    """Raises InputError if all data to train on is held out as well."""
    if not num_trained and division.copies_dropped:
        raise InputError(
            f"nothing is left of {name} to train on: {division.copies_dropped:,} of its documents are copies of "
            f"held-out ones ({division.rule}). Give other --eval-data."
        )


def divide(
    parts: Iterable[Part[Item]],
    text_of: Callable[[Item], str],
    name: str,
    division: Division,
    wanted: Wanted = lambda split: True,
    share: float | None = None,
    evaluation: tuple[str, Iterable[Part[Item]]] | None = None,
) -> Iterator[Divided[Item]]:
    """Streams items with their splits, without copies of held-out ones.

    Args:
        text_of: an item's text, by which copies are recognised.
        name: of the data.
        division: receives how the data is divided.
        wanted: parts of one split are read while that is wanted.
        share: of the items to hold out.
        evaluation: other data to hold out, with its name.

    Raises:
        InputError: ``share`` has no effect on data with its own split.
    """
    held_out: set[int] = set()
    if evaluation is None:
        assigned = _assigned(parts, text_of, name, division, wanted, share)
    else:
        assigned = _with_evaluation(parts, *evaluation, text_of, division, wanted)
    for found, key in assigned:
        if key in held_out:
            division.copies_dropped += 1
            continue
        if found.split != "train":
            held_out.add(key)
        yield found


def _assigned(
    parts: Iterable[Part[Item]],
    text_of: Callable[[Item], str],
    name: str,
    division: Division,
    wanted: Wanted,
    share: float | None,
) -> Iterator[tuple[Divided[Item], int]]:
    """Each item with its split, and the hash of its text."""
    for split, items in parts:
        if split is None:
            yield from _by_text(items, text_of, share or HOLDOUT, division)
            continue
        if share is not None:
            raise InputError(f"--holdout {share:g} has no effect: {name} has its own held-out part. Leave it out.")
        division.rule = f"the held-out part of {name}, which has its own split"
        yield from _while_wanted(split, items, text_of, wanted, by_name=True)


def _with_evaluation(
    parts: Iterable[Part[Item]],
    eval_name: str,
    eval_parts: Iterable[Part[Item]],
    text_of: Callable[[Item], str],
    division: Division,
    wanted: Wanted,
) -> Iterator[tuple[Divided[Item], int]]:
    for split, items in eval_parts:
        if split != "train":
            division.rule = f"{'all of' if split is None else 'the held-out part of'} {eval_name} (--eval-data)"
            yield from _while_wanted("validation", items, text_of, wanted, by_name=split is not None)
    for split, items in parts:
        if split != "validation":
            yield from _while_wanted("train", items, text_of, wanted, by_name=split is not None)


def _while_wanted(
    split: Split, items: Iterable[tuple[str, Item]], text_of: Callable[[Item], str], wanted: Wanted, by_name: bool
) -> Iterator[tuple[Divided[Item], int]]:
    if not wanted(split):
        return
    for name, item in items:
        key = text_hash(text_of(item))
        # The order of data with its own split outlives small changes of a text, such as a module's in a new Python.
        yield Divided(name, item, split, name_hash(name) if by_name else key), key
        if not wanted(split):
            return


def _by_text(
    items: Iterable[tuple[str, Item]], text_of: Callable[[Item], str], share: float, division: Division
) -> Iterator[tuple[Divided[Item], int]]:
    """Buffers items until enough are held out (usually after about eighty): before that they might be too few."""
    division.rule = f"{100 * share:.3g}%, by a hash of the text"
    highest = share * 2**64
    hashed = ((name, item, text_hash(text_of(item))) for name, item in items)
    first: list[tuple[str, Item, int]] = []
    keys: set[int] = set()
    below: set[int] = set()
    for name, item, key in hashed:
        first.append((name, item, key))
        keys.add(key)
        if key < highest:
            below.add(key)
        if len(below) >= ENOUGH_HELD_OUT and len(below) < len(keys):
            break
    else:
        if not keys:
            return
        if len(keys) == 1:
            division.rule = f"the last {100 * share:.3g}% of the only document"
            yield from ((Divided(name, item, None, key), key) for name, item, key in first)
            return
        count = max(1, len(below), min(ENOUGH_HELD_OUT, round(len(keys) * share)))
        highest = sorted(keys)[min(count, len(keys) // 2)]

    def assigned(name: str, item: Item, key: int) -> tuple[Divided[Item], int]:
        return Divided(name, item, "validation" if key < highest else "train", key), key

    yield from (assigned(*each) for each in first)
    first.clear()
    yield from (assigned(*each) for each in hashed)
