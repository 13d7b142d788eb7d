"""Data sets from the hub, by the real client libraries, against a server that implements what loading needs."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TEXTS = [f"Chapter {i}.\r\n\tÜber die Dörfer, naïve 本 {'word ' * i}\n" for i in range(40)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(texts: list[str], **columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts, **columns}), file)
    return file.getvalue()


# Small copies, in the form of the data sets of the paper and its successors: the same files, columns and scripts.
OF_THE_PAPER = {
    "emozilla/pg19": {
        f"data/{split}-00000-of-00001.parquet": parquet(
            [f"{split} book"] * 3, short_book_title=["t"] * 3, publication_date=[1900] * 3, url=["http://x"] * 3
        )
        for split in ("train", "validation", "test")
    },
    "emozilla/pg19-test": {"data/test-00000-of-00001.parquet": parquet(TEXTS, short_book_title=["t"] * len(TEXTS))},
    "DKYoon/SlimPajama-6B": {
        f"data/{split}-00000-of-00001-0a1b2c.parquet": parquet(
            [f"{split} page"] * 3, meta=[{"redpajama_set_name": "RedPajamaC4"}] * 3, __index_level_0__=[0, 1, 2]
        )
        for split in ("train", "validation", "test")
    },
    "hoskinson-center/proof-pile": {
        "proof-pile.py": b"raise SystemExit",
        "test/proofpile_test.jsonl.gz": gzip.compress(b'{"text": "a proof", "meta": "{}"}\n' * 3),
    },
    "EleutherAI/proof-pile-2": {
        "proof-pile-2.py": b"raise SystemExit",
        "arxiv/train/arXiv_000.jsonl.gz": gzip.compress(b'{"text": "first", "meta": {"id": "x"}}\n' * 2),
        "arxiv/train/arXiv_001.jsonl.gz": gzip.compress(b'{"text": "second", "meta": {"id": "x"}}\n' * 2),
    },
    "Yukang/LongAlpaca-12k": {
        "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
        "LongAlpaca-12k.json": json.dumps(
            [{"output": f"answer {i}", "instruction": f"question {i}", "input": "", "file": "book"} for i in range(30)],
            indent=4,
        ).encode(),
    },
    "deepmind/pg19": {"pg19.py": b"raise SystemExit"},
    "togethercomputer/RedPajama-Data-1T-Sample": {"RedPajama-Data-1T-Sample.py": b"raise SystemExit"},
}

REPOSITORIES = {
    **OF_THE_PAPER,
    "org/books": {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train-00000-of-00001.parquet": parquet([f"train {i}" for i in range(30)]),
        "data/validation-00000-of-00001.parquet": parquet(["held out"]),
        "data/test-00000-of-00001.parquet": parquet(["for the test"]),
    },
    "org/test-only": {"data/test-00000-of-00001.parquet": parquet(TEXTS)},
    "org/configs": {
        "README.md": b"---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n"
        b"  data_files: two.jsonl\n---\n",
        "one.jsonl": b'{"text": "first"}\n' * 3,
        "two.jsonl": b'{"text": "second"}\n' * 3,
    },
    "org/broken": {"rows.jsonl": b'{"text": "a"}\n' * 20 + b'{"text": \n'},
    "org/script": {"script.py": b"raise SystemExit", "data.zip": b""},
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        repo = "/".join(path.removeprefix("/api").split("/")[2:4])
        files = REPOSITORIES.get(repo)
        if files is None:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        rest = [*path.split(repo, 1)[1].strip("/").split("/", 2), "", "", ""]
        if rest[1] not in ("", "main", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "resolve":
            return self.reply_file(files.get(rest[2]))
        if rest[0] == "tree":
            within = [name for name in files if Path(name).parent == Path(rest[2])]
            answer = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in within]
            above = {str(parent) for name in files for parent in Path(name).parents} - {"."}
            folders = [name for name in above if Path(name).parent == Path(rest[2])]
            answer += [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
        else:
            answer = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def reply_file(self, content: bytes | None):
        if content is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.reply(206, content[first : last + 1], headers)
        return self.reply(200, content, headers)

    def reply(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import json, sys
from workloads.data import Corpus
from workloads.errors import InputError
for text in sys.argv[1:]:
    try:
        corpus = Corpus.parse(text)
        documents = [(d.name, d.text, d.split) for d in corpus.documents()]
        assert [d[0] for d in documents if d[2] == "train"] == [d.name for d in corpus.documents("train")]
        answer = [corpus.identity(), documents]
    except InputError as error:
        answer = str(error)
    print("answer", json.dumps(answer))
"""


def ask(endpoint: str, home: Path, *texts: str, script: str = ASK, **environment: str) -> list:
    """Each corpus's [identity, documents] or error, from a process of its own (the endpoint is read at import)."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    process = subprocess.run([sys.executable, "-c", script, *texts], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("answer ")]


def test_data_sets_load_from_the_hub(hub, tmp_path):
    books, pinned, test_only, two, no_config, broken, script, revision, missing = ask(
        hub,
        tmp_path,
        "org/books",
        f"org/books@{COMMIT}",
        "org/test-only@main",
        "org/configs:two",
        "org/configs",
        "org/broken",
        "org/script",
        "org/books@v9",
        "org/missing",
    )
    identity, documents = books
    assert identity == f"hub:org/books@{COMMIT}:default"
    assert documents[0] == ["validation#0", "held out", "validation"]  # its own split, and nothing of its test split
    assert documents[1:] == [[f"train#{i}", f"train {i}", "train"] for i in range(30)]
    assert pinned == books
    identity, documents = test_only  # one split: its rows are held out by hash
    assert [text for _, text, _ in documents] == TEXTS and {split for _, _, split in documents} == {
        "train",
        "validation",
    }
    identity, documents = two
    assert identity == f"hub:org/configs@{COMMIT}:two" and "".join(text for _, text, _ in documents) == "second"
    assert "org/configs" in no_config and "'one', 'two'" in no_config
    assert "data set org/broken cannot be read after train row" in broken
    assert "org/script" in script and "loading script" in script and "emozilla/pg19" in script
    assert "no revision 'v9'" in revision
    assert "org/missing is neither a local path nor on the Hugging Face hub" in missing


ASK_FOR_ROWS = """
from workloads.data import Instructions
instructions = Instructions.parse("Yukang/LongAlpaca-12k")
rows = [[row.name, row.columns, split] for row, split, _ in instructions.rows()]
print("answer", json.dumps([instructions.identity(), rows]))
"""


def test_the_data_sets_of_the_paper_load_or_name_what_to_take_instead(hub, tmp_path):
    books, test_books, pages, proofs, many, *refused, instructions = ask(
        hub,
        tmp_path,
        "emozilla/pg19",
        "emozilla/pg19-test",
        "DKYoon/SlimPajama-6B",
        "hoskinson-center/proof-pile:test/proofpile_test.jsonl.gz",
        f"EleutherAI/proof-pile-2@{COMMIT}:arxiv/train/*.jsonl.gz",
        "hoskinson-center/proof-pile",
        "EleutherAI/proof-pile-2",
        "deepmind/pg19",
        "togethercomputer/RedPajama-Data-1T-Sample",
        "hoskinson-center/proof-pile:train/none.jsonl.gz",
        "hoskinson-center/proof-pile:test/none*.jsonl.gz",
        script=ASK + ASK_FOR_ROWS,
    )
    for (_, documents), text in ((books, "book"), (pages, "page")):
        assert {(split, found) for _, found, split in documents} == {
            ("train", f"train {text}"),
            ("validation", f"validation {text}"),
        }
    assert sorted(text for _, text, _ in test_books[1]) == sorted(TEXTS)
    assert proofs[0] == f"hub:hoskinson-center/proof-pile@{COMMIT}:test/proofpile_test.jsonl.gz"
    assert [text for _, text, _ in proofs[1]] == ["a proo", "f"]  # of one text the end is held out, copies are dropped
    assert [text for _, text, _ in many[1]] == ["first", "first", "second"]  # a text is held out once
    alternatives = ("proof-pile:test/", "proof-pile-2:arxiv/train/", "emozilla/pg19", "DKYoon/SlimPajama-6B")
    for message, alternative in zip(refused, alternatives):
        assert "loading script" in message and alternative in message
    for message in refused[-2:]:
        assert "cannot be loaded" in message and "proof-pile:test/proofpile_test.jsonl.gz" in message
    identity, rows = instructions
    assert identity == f"hub:Yukang/LongAlpaca-12k@{COMMIT}:default"
    assert [(name, row["instruction"], row["output"]) for name, row, _ in rows] == [
        (f"train#{i}", f"question {i}", f"answer {i}") for i in range(30)
    ]
    assert 1 <= sum(split == "validation" for *_, split in rows) < 15


def test_without_the_hub_a_full_commit_comes_from_the_cache_and_no_other(hub, tmp_path):
    ask(hub, tmp_path, script=f"import datasets; datasets.load_dataset('org/books', revision='{COMMIT}')")
    cached, other, branch, uncached = ask(
        "http://127.0.0.1:9",
        tmp_path,
        f"org/books@{COMMIT}",
        f"org/books@{'f' * 40}",
        "org/books",
        f"org/unseen@{COMMIT}",
        HF_HUB_OFFLINE="1",
    )
    identity, documents = cached
    assert identity == f"hub:org/books@{COMMIT}:default" and len(documents) == 31
    assert f"the local cache holds commit {COMMIT}, not {'f' * 40}" in other
    for message in (branch, uncached):
        assert "cannot be reached" in message and "local folder" in message and "emozilla/pg19" in message


def test_a_dead_network_is_an_error_at_once(tmp_path):
    (message,) = ask("http://127.0.0.1:9", tmp_path, "org/books")
    assert "org/books" in message and "hub cannot be reached" in message and "local folder" in message
