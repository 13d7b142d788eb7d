"""Rows and documents of a Hugging Face data set: streamed, pinned to a commit.

A data set's own validation split is held out, else its test split; a single split is divided (split.py). Rows are
streamed from the hub, which fetches only what is read; if the hub is unreachable, they come from the cache of the
``datasets`` library, if it has this commit.

A data set that needs a loading script is refused, but its files can be read by name, without the script:
``hoskinson-center/proof-pile:test/proofpile_test.jsonl.gz`` (``*`` and ``**`` stand for parts of names).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import ClassVar

from workloads.data.columns import record_texts
from workloads.data.documents import Row, Split
from workloads.data.split import Part
from workloads.errors import HubUnreachable, InputError, first_line, reason

ALTERNATIVES = "Take a local folder (.txt, .md, .tex, .jsonl, .parquet) or a data set such as emozilla/pg19 instead."

# Data sets of the paper and its successors that do not load, and their replacements.
_INSTEAD = {
    "deepmind/pg19": "emozilla/pg19",
    "EleutherAI/proof-pile-2": "EleutherAI/proof-pile-2:arxiv/train/*.jsonl.zst",
    "hoskinson-center/proof-pile": "hoskinson-center/proof-pile:test/proofpile_test.jsonl.gz",
    "togethercomputer/RedPajama-Data-1T": "DKYoon/SlimPajama-6B",
    "togethercomputer/RedPajama-Data-1T-Sample": "DKYoon/SlimPajama-6B",
}

_NEEDS_SCRIPT = "needs a loading script, which the datasets library refuses since version 4"
_FORM = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<config>\S+))?")
_FULL_SHA = re.compile(r"[0-9a-f]{40}")
_FILES = re.compile(r".*\.(?P<format>json|parquet)l?(?P<compression>\.gz|\.zst)?")


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub: repository, revision (branch, tag, commit; default the newest), configuration or files.

    ``columns`` are the columns of text that were read so far.
    """

    repo: str
    revision: str | None = None
    config: str | None = None
    text_column: str | None = None
    columns: set[str] = field(default_factory=set, compare=False)
    has_columns: ClassVar = True

    @classmethod
    def parse(cls, text: str, text_column: str | None = None) -> "HubSource | None":
        """``org/name[@revision][:config or files]``, or None if the text does not have that form."""
        match = _FORM.fullmatch(text)
        return cls(match["repo"], match["revision"], match["config"], text_column) if match else None

    @cached_property
    def identity(self) -> str:
        """``hub:org/name@<commit>:<configuration>``, and a text column of another name than ``text``."""
        column = "" if self.text_column in (None, "text") else f":{self.text_column}"
        return f"hub:{self.repo}@{self.commit}:{self.config or 'default'}{column}"

    @cached_property
    def commit(self) -> str:
        """The revision's full commit SHA, looked up on the hub once (a full one needs no look-up).

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
            message = "is gated: request access on its page, then `hf auth login`"
            raise HubUnreachable(str(self._error(message))) from error
        except RevisionNotFoundError as error:
            raise self._error(f"has no revision {self.revision!r}") from error
        except RepositoryNotFoundError as error:
            raise self._error("is neither a local path nor on the Hugging Face hub (or it is private)") from error
        except Exception as error:  # for a dead network, versions of the hub's client raise different exceptions
            message = (
                f"is not a local path, and the Hugging Face hub cannot be reached ({type(error).__name__}: {error}). "
                "A full commit, org/name@<40 hexadecimal digits>, needs no look-up"
            )
            raise HubUnreachable(str(self._error(message))) from error
        if not self._files and any(file.rfilename == f"{self.repo.split('/')[1]}.py" for file in info.siblings or ()):
            raise self._error(_NEEDS_SCRIPT)
        return str(info.sha)

    def parts(self) -> Iterator[Part[str]]:
        """The texts of each split of the data set that is read, by name; without a split if they are to be divided."""
        for split, name, rows in self._splits():
            yield split, self._texts(name, rows)

    def row_parts(self) -> Iterator[Part[Row]]:
        """The rows of each split of the data set that is read, by name; without a split if they are to be divided."""
        for split, name, rows in self._splits():
            yield split, ((row.name, row) for row in self._rows(name, rows))

    def _splits(self) -> list[tuple[Split | None, str, Iterable[dict]]]:
        """What to read, as (split, its name in the data set, rows); without a split if rows are to be divided."""
        splits = self._load()
        if "train" in splits:
            train = "train"
        elif len(splits) == 1:
            (train,) = splits
        else:
            raise self._error(f"has no split named train, but {', '.join(splits)}")
        held_out = next((name for name in ("validation", "test") if name in splits and name != train), None)
        if held_out is None:
            return [(None, train, splits[train])]
        return [("validation", held_out, splits[held_out]), ("train", train, splits[train])]

    def _load(self) -> Mapping[str, Iterable[dict]]:
        """Split name to its rows."""
        from datasets import load_dataset_builder
        from datasets.packaged_modules.cache.cache import Cache

        commit = self.commit
        try:
            if self._files:
                if self._files["compression"] == ".zst" and not find_spec("zstandard"):
                    raise self._error(f"{self.config} needs zstandard to be read: pip install zstandard")
                # The format's own builder reads files by name; the data set's would look for a script first.
                files = f"hf://datasets/{self.repo}@{commit}/{self.config}"
                builder = load_dataset_builder(self._files["format"], data_files=files)
                if not builder.config.data_files.get("train"):
                    raise FileNotFoundError(f"no file {self.config}")
                return builder.as_streaming_dataset()
            builder = load_dataset_builder(self.repo, self.config, revision=commit)
            # Without the hub, datasets takes the newest commit in its cache, whichever was requested.
            if not isinstance(builder, Cache) or builder.hash == commit:
                return builder.as_streaming_dataset()
        except ConnectionError as error:
            raise self._error(f"is not in the local cache, and the hub cannot be reached ({error})") from error
        except InputError:
            raise
        except Exception as error:  # an unknown configuration; whatever strange files make the library raise
            if isinstance(error, RuntimeError) and "script" in str(error):
                raise self._error(_NEEDS_SCRIPT) from error
            raise self._error(f"cannot be loaded ({reason(error)})") from error
        raise self._error(
            f"cannot be reached on the hub, and the local cache holds commit {builder.hash}, not {commit}"
        )

    @property
    def _files(self) -> re.Match | None:
        """Where the configuration is a name of files: their format and compression."""
        return _FILES.fullmatch(self.config or "")

    def _rows(self, split: str, rows: Iterable[dict]) -> Iterator[Row]:
        number = 0
        try:
            for number, row in enumerate(rows):
                yield Row(f"{split}#{number}", f"data set {self.repo}, {split} row {number}", row)
        except InputError:
            raise
        except Exception as error:  # of any of the libraries that fetch, unpack and read it
            raise self._error(f"cannot be read after {split} row {number} ({first_line(error)})") from error

    def _texts(self, split: str, rows: Iterable[dict]) -> Iterator[tuple[str, str]]:
        records = ((row.where, row.columns) for row in self._rows(split, rows))
        texts = record_texts(records, self.text_column, self.columns)
        return ((f"{split}#{number}", text) for number, text in enumerate(texts))

    def _error(self, what: str) -> InputError:
        instead = _INSTEAD.get(self.repo)
        if instead is None or instead == f"{self.repo}:{self.config}":
            return InputError(f"data set {self.repo} {what}. {ALTERNATIVES}")
        return InputError(f"data set {self.repo} {what}. Take {instead} instead, or a local folder.")
