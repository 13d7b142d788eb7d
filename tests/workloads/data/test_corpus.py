"""Documents of local corpora: which there are, which are held out, their identity, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.tokenizers import error_of
from workloads.data import Corpus
from workloads.data.hub import HubSource
from workloads.data.stdlib import stdlib_documents

TEXTS = [f"Chapter {i}.\r\n\tÜber die Dörfer, naïve 本 {'word ' * i}\n" for i in range(40)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def reading_error(path: Path, **kwargs) -> str:
    return error_of(lambda: list(Corpus.parse(str(path), **kwargs).documents()))


# Which documents there are


def test_the_same_documents_from_every_kind_of_file(tmp_path):
    for suffix in ("txt", "md", "tex"):
        folder = tmp_path / suffix
        (folder / "part").mkdir(parents=True)
        for i, text in enumerate(TEXTS):
            (folder / "part" / f"{i:03}.{suffix}").write_bytes(text.encode())
    write_jsonl(tmp_path / "rows.jsonl", [{"n": i, "text": text} for i, text in enumerate(TEXTS)])
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), tmp_path / "rows.parquet", row_group_size=7)
    for source in ("txt", "md", "tex", "rows.jsonl", "rows.parquet"):
        texts = [document.text for document in Corpus.parse(str(tmp_path / source)).documents()]
        assert texts == TEXTS, source


def test_names_are_relative_and_rows_are_numbered(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("one")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "notes.pdf").write_text("not read")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "  "}, {"text": None}, {"text": "y"}])
    names = [document.name for document in Corpus.parse(str(tmp_path)).documents()]
    assert names == ["a.jsonl#0", "a.jsonl#3", "b/one.txt"]  # blank texts are no documents, and keep their number
    assert [document.name for document in Corpus.parse(str(tmp_path / "a.jsonl")).documents()] == names[:2]


def test_links_are_followed_and_do_not_lead_in_circles(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one.txt").write_text("one")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus")
    corpus = Corpus.parse(str(tmp_path / "corpus"))
    assert {document.name for document in corpus.documents()} == {"link/one.txt"}


def test_the_text_column_is_the_only_one_of_strings_or_the_one_named(tmp_path):
    rows = [{"id": 1, "body": "b", "title": "t"}]
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": 1, "body": "b"}])
    two = write_jsonl(tmp_path / "two.jsonl", rows)
    table = tmp_path / "two.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    assert next(Corpus.parse(str(one)).documents("validation")).text == "b"
    for path in (two, table):
        message = reading_error(path)
        assert str(path) in message and "id, body, title" in message and "--text-column" in message
        assert next(Corpus.parse(str(path), text_column="title").documents("validation")).text == "t"
        message = reading_error(path, text_column="id")
        assert "'id'" in message and "body, title" in message


def test_stdlib_is_the_library_with_its_own_split():
    corpus = Corpus.parse("builtin:stdlib")
    found = [(document.name, document.text) for document in corpus.documents("validation")]
    assert found == list(stdlib_documents("validation"))
    assert next(corpus.documents("train")).split == "train"
    assert re.fullmatch("stdlib:[0-9a-f]{64}", corpus.identity())


# Identity


def test_identity_follows_content_and_names_not_the_place(tmp_path):
    def corpus(folder: str, files: dict[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        return Corpus.parse(str(tmp_path / folder)).identity()

    first = corpus("here", {"a.txt": "one", "b/c.md": "two"})
    assert corpus("there/deeper", {"b/c.md": "two", "a.txt": "one"}) == first
    assert corpus("with-pdf", {"b/c.md": "two", "a.txt": "one", "d.pdf": "not read"}) == first
    others = {
        corpus("content", {"a.txt": "one", "b/c.md": "twO"}),
        corpus("name", {"a.txt": "one", "b/d.md": "two"}),
        corpus("moved", {"a.txt": "onetwo", "b/c.md": ""}),
        corpus("more", {"a.txt": "one", "b/c.md": "two", "d.txt": ""}),
    }
    assert len(others) == 4 and first not in others


def test_identity_of_a_table_knows_its_text_column(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "title": "b"}]))
    identity = Corpus.parse(path).identity()
    assert Corpus.parse(path, text_column="text").identity() == identity
    assert Corpus.parse(path, text_column="title").identity() != identity


# What the user may get wrong


def test_a_text_that_is_no_corpus_says_what_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(Corpus.parse, "builtin:stdlb")
    assert "builtin:stdlb" in message and "did you mean builtin:stdlib" in message
    for text in ("./missing", "missing", "a/b/c", "books/missing.txt", "", "org/name@"):
        message = error_of(Corpus.parse, text)
        assert repr(text) in message and "org/name[@revision][:config]" in message and str(tmp_path) in message


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(Corpus.parse("org/name").source, HubSource)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "a.txt").write_text("local")
    assert next(Corpus.parse("org/name").documents("validation")).name == "a.txt"


def test_a_folder_without_readable_files_lists_what_is_read(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    for path in (tmp_path, tmp_path / "a.pdf"):
        message = error_of(Corpus.parse, str(path))
        assert str(path) in message and ".txt, .md, .tex, .jsonl, .parquet" in message


def test_a_text_column_without_a_table_has_no_effect_and_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for text in ("builtin:stdlib", str(tmp_path)):
        message = error_of(Corpus.parse, text, text_column="body")
        assert "--text-column body has no effect" in message and text in message


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(" \n")
    assert "corpus books is empty" in reading_error(tmp_path / "books")


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    message = reading_error(tmp_path)
    assert str(tmp_path / "a.txt") in message and "0xe9 at offset 3" in message and "iconv" in message
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    assert "0xe9 at offset 27" in reading_error(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "b"', "not JSON"),
        ('["b"]', "not a JSON object"),
        ('{"title": "b"}', "column 'text' is missing"),
        ('{"text": 3}', "of type int"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        (f'{{"text": "x", "n": {"9" * 5_000}}}', "Exceeds the limit"),
        (f'{{"text": "x", "n": {"[" * 200_000}', "nested too deeply"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    message = reading_error(path)
    assert f"{path}, line 3" in message and says in message


def test_what_other_columns_hold_is_no_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"body": "a", "deep": {"[" * 400}{"]" * 400}, "n": {"9" * 4_000}}}\n')
    assert Corpus.parse(str(path)).source.first_text() == "a"


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet at all")
    assert str(path) in reading_error(path)
    pq.write_table(pa.table({"text": TEXTS * 100}), path, row_group_size=1_000, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)
    message = reading_error(path)
    assert re.search(r"at row \d{4} or after", message) and str(path) in message


def test_importing_is_cheap():
    heavy = "('torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub', 'filelock')"
    script = f"import sys, workloads.data; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
