"""What is detected of a corpus is right, printed or refused: columns, kinds of files, encodings, spelled-out tokens."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.tokenizers import EOS, byte_tokenizer, error_of
from workloads.data import Corpus, Instructions, prepare
from workloads.data.encoding import encode_texts
from workloads.evaluation.documents import documents_to_score

TEXTS = [f"chapter {i}: {'word ' * i}" for i in range(40)]
URLS = [f"http://a.example/{i}" for i in range(40)]


def texts_of(path: Path, **options) -> list[str]:
    return [document.text for document in Corpus.parse(str(path), **options).documents()]


# Columns


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_column_is_text(tmp_path, kind):
    table = pa.table({"url": URLS, "text": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert texts_of(tmp_path / "rows.parquet") == TEXTS


@pytest.mark.parametrize(
    "columns",
    [
        {"url": "u", "text": ["a", "b"]},
        {"url": "u", "text": {"body": "a"}},
        {"url": "u", "document": {"body": "a"}},
        {"id": "0", "conversations": [{"from": "human", "value": "a"}]},
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_text_of_another_type_does_not_make_urls_the_text(tmp_path, columns, suffix):
    path, (other, nested) = tmp_path / f"rows.{suffix}", columns
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([columns] * 3), path)
    else:
        path.write_text(json.dumps(columns) + "\n")
    message = error_of(texts_of, path)
    assert str(path) in message and nested in message and "--text-column" in message
    assert texts_of(path, text_column=other)[0].startswith(columns[other])


def test_a_text_that_only_later_rows_have_is_not_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"url": "a"}\n{"url": "b", "text": "c"}\n')
    message = error_of(texts_of, path)
    assert f"{path}, line 2 has a column 'text'" in message and "'url'" in message


# Files


def test_compressed_files_are_read_like_others(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "first"}) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "second"}) + "\n")
    # Two members, as of a file that was appended to.
    (tmp_path / "c.txt.GZ").write_bytes(gzip.compress(b"thi") + gzip.compress(b"rd"))
    with pa.CompressedOutputStream(str(tmp_path / "d.jsonl.zst"), "zstd") as stream:
        stream.write(b'{"text": "fourth"}\n{"text": "fifth"}\n')
    corpus = Corpus.parse(str(tmp_path))
    found = [(document.name, document.text) for document in corpus.documents()]
    assert found == [
        ("a.jsonl#0", "first"),
        ("b.jsonl.gz#0", "second"),
        ("c.txt.GZ", "third"),
        ("d.jsonl.zst#0", "fourth"),
        ("d.jsonl.zst#1", "fifth"),
    ]


def test_files_that_are_not_read_are_known_by_name(tmp_path):
    for name in ("a.txt", "b.pdf", "c.json", "d.csv.gz", "e.parquet.gz", ".hidden"):
        (tmp_path / name).write_text("x")
    assert Corpus.parse(str(tmp_path)).source.files.passed_over == ["b.pdf", "c.json", "d.csv.gz", "e.parquet.gz"]
    assert Instructions.parse(str(tmp_path / "c.json")).source.files.passed_over == []


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "a"}', mtime=0)[:-9], b"not gzip"], ids=["cut", "other"])
def test_a_damaged_compressed_file_is_named(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert str(tmp_path / "a.jsonl.gz") in error_of(texts_of, tmp_path)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    message = error_of(Corpus.parse, str(tmp_path))
    assert f"{tmp_path}/b.txt" in message and "gone.txt" in message
    assert "link to gone.txt" in error_of(Corpus.parse, str(tmp_path / "b.txt"))
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "c.txt")
    assert f"{tmp_path}/c.txt is no regular file" in error_of(Corpus.parse, str(tmp_path))
    for parse in (Corpus.parse, Instructions.parse):  # no name of a file
        for text in ("x" * 300, "a\0b", "~nobody-of-this-name/x"):
            assert "expected" in (message := error_of(parse, text)) or "no local path" in message


# Encodings


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "first"}\r\n{"text": "\\ufeffsecond"}\r\n')
    (tmp_path / "b.txt").write_bytes(mark + b"third\r\n")
    assert texts_of(tmp_path) == ["first", "\ufeffsecond", "third\r\n"]
    rows = tmp_path / "rows.json"
    rows.write_bytes(mark + b'[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]')
    assert len(list(Instructions.parse(str(rows)).rows())) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf_16_is_refused_by_its_name(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"text": "first"}\n'.encode(encoding))
    message = error_of(texts_of, tmp_path)
    assert str(tmp_path / name) in message and "iconv -f UTF-16" in message


def test_a_nul_byte_is_named_with_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\nand \0 more")
    assert "NUL byte at offset 9" in error_of(texts_of, tmp_path)


# Tokens


def test_an_end_of_sequence_that_a_text_spells_is_text(tmp_path):
    tokenizer = byte_tokenizer()
    text = "before <eos> and after"
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(text + chr(ord("A") + i))
    packed = prepare(Corpus.parse(str(tmp_path)), tokenizer, "bytes", tmp_path / ".data")
    (ids,) = encode_texts(tokenizer, [text])
    assert len(ids) == len(text) and EOS not in ids
    (first,) = packed.train_batch(0, 1, len(text) + 2, seed=0).tolist()
    assert first[:-2] == ids and first[-2] != EOS and first[-1] == EOS
    (scored, *_) = documents_to_score(Corpus.parse(str(tmp_path)), tokenizer, len(text), 2)
    assert scored.tokens.tolist() == ids
    assert tokenizer("<eos>")["input_ids"] == [EOS]  # the tokenizer is as it was
