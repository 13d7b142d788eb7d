"""Documents from a Hugging Face data set: one a row, streamed, pinned to a commit.

A data set's own validation split is held out, else its test split; of one with a single split, rows are held out by
hash. Rows are streamed from the hub; where that cannot be reached, they come from the cache of the ``datasets``
library, if it holds this very commit.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from workloads.data.columns import record_text, record_text_column
from workloads.data.documents import Document, Split, hold_out, is_blank
from workloads.errors import InputError

ALTERNATIVES = "Take a local folder (.txt, .md, .tex, .jsonl, .parquet) or a data set such as emozilla/pg19 instead."

_NEEDS_SCRIPT = "needs a loading script, which the datasets library refuses since version 4"
_FORM = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<config>\S+))?")
_FULL_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub: repository, revision (branch, tag or commit; default the newest), configuration."""

    repo: str
    revision: str | None = None
    config: str | None = None
    text_column: str | None = None

    @classmethod
    def parse(cls, text: str, text_column: str | None = None) -> "HubSource | None":
        """``org/name[@revision][:config]``, or None where the text is not of that form."""
        match = _FORM.fullmatch(text)
        return cls(**match.groupdict(), text_column=text_column) if match else None

    @cached_property
    def identity(self) -> str:
        column = "" if self.text_column in (None, "text") else f":{self.text_column}"
        return f"hub:{self.repo}@{self.commit}:{self.config or 'default'}{column}"

    @cached_property
    def commit(self) -> str:
        """The revision's full commit SHA, asked of the hub once (one given in full is taken as it is, offline).

        Raises:
            InputError: the hub cannot be reached, does not have it, or has only a loading script for it.
        """
        if self.revision and _FULL_SHA.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = HfApi().dataset_info(self.repo, revision=self.revision)
        except GatedRepoError as error:
            raise self._error("is gated: ask for access on its page, then `hf auth login`") from error
        except RevisionNotFoundError as error:
            raise self._error(f"has no revision {self.revision!r}") from error
        except RepositoryNotFoundError as error:
            raise self._error("is neither a local path nor on the Hugging Face hub (or it is private)") from error
        except Exception as error:  # the hub's client changes what it raises for a dead network from version to version
            raise self._error(
                f"is no local path, and the Hugging Face hub cannot be reached ({type(error).__name__}: {error}). "
                "A full commit, org/name@<40 hexadecimal digits>, needs no look-up"
            ) from error
        if any(file.rfilename == f"{self.repo.split('/')[1]}.py" for file in info.siblings or ()):
            raise self._error(_NEEDS_SCRIPT)
        return info.sha

    def documents(self, split: Split | None = None) -> Iterator[Document]:
        splits = self._load()
        if "train" in splits:
            train = "train"
        elif len(splits) == 1:
            (train,) = splits
        else:
            raise self._error(f"has no split named train, but {', '.join(splits)}")
        held_out = next((name for name in ("validation", "test") if name in splits and name != train), None)
        if held_out is None:
            yield from hold_out(self._texts(train, splits[train]))
            return
        sides: tuple[tuple[Split, str], ...] = (("validation", held_out), ("train", train))
        for side, name in sides:
            if split in (None, side):
                texts = self._texts(name, splits[name])
                yield from (Document(row, text, side) for row, text in texts if not is_blank(text))

    def _load(self) -> Mapping[str, Iterable[dict]]:
        """Split name to its rows."""
        from datasets import load_dataset_builder
        from datasets.packaged_modules.cache.cache import Cache

        commit = self.commit
        try:
            builder = load_dataset_builder(self.repo, self.config, revision=commit)
            # Without the hub, datasets takes the newest commit in its cache, whichever was asked for.
            if not isinstance(builder, Cache) or builder.hash == commit:
                return builder.as_streaming_dataset()
        except ConnectionError as error:
            raise self._error(f"is not in the local cache, and the hub cannot be reached ({error})") from error
        except RuntimeError as error:
            if "script" in str(error):
                raise self._error(_NEEDS_SCRIPT) from error
            raise
        except (ValueError, FileNotFoundError) as error:  # an unknown configuration; nothing that can be loaded
            raise self._error(f"cannot be loaded ({error})") from error
        raise self._error(
            f"cannot be reached on the hub, and the local cache holds commit {builder.hash}, not {commit}"
        )

    def _texts(self, split: str, rows: Iterable[dict]) -> Iterator[tuple[str, str]]:
        column = None
        for number, row in enumerate(rows):
            where = f"data set {self.repo}, {split} row {number}"
            column = column or record_text_column(row, self.text_column, where)
            yield f"{split}#{number}", record_text(row, column, where)

    def _error(self, what: str) -> InputError:
        return InputError(f"data set {self.repo} {what}. {ALTERNATIVES}")
