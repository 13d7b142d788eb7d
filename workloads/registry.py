"""Records that users choose by name: attention patterns, model families, positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from workloads.errors import InputError

Record = TypeVar("Record")


class Registry(Mapping[str, Record]):
    """Records by name, in the order given. A name that is not among them is an error, never None.

    Args:
        kind: what the records are, for error messages, such as "attention pattern".
        records: each with its name in the attribute ``key``.

    Raises:
        ValueError: two records have the same name.
    """

    def __init__(self, kind: str, records: Iterable[Record], *, key: str = "name") -> None:
        self.kind = kind
        self._records: dict[str, Record] = {}
        for record in records:
            name = getattr(record, key)
            if name in self._records:
                raise ValueError(f"{kind} {name!r} is registered twice")
            self._records[name] = record

    def __getitem__(self, name: str) -> Record:
        """Returns the record of this name.

        Raises:
            InputError: there is none; the message lists the known names.
        """
        if name not in self._records:
            raise InputError(f"{self.kind} {name!r} is unknown; expected one of {', '.join(self)}")
        return self._records[name]

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
