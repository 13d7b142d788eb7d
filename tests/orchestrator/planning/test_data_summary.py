"""A plan says what was read as data."""

import json

from orchestrator.planning.data_summary import data_summary
from orchestrator.planning.preparation import Identified, check_sweep, identify, prepare
from orchestrator.run_options import RunOptions
from orchestrator.spec import SweepSpec


def identified(tmp_path, **fields) -> Identified:
    spec = SweepSpec(context_lengths=(1024,), **fields)
    return identify(check_sweep("summary", spec, RunOptions(storage=str(tmp_path / "runs"))))


def test_files_column_sample_and_counts(tmp_path):
    data = tmp_path / "books"
    data.mkdir()
    (data / "a.jsonl").write_text(
        "".join(json.dumps({"n": i, "body": f"\n row\x1b {i}\nmore"}) + "\n" for i in range(9))
    )
    (data / "b.md").write_text("a note")
    (data / "c.pdf").write_text("not read")
    sweep = identified(tmp_path, data=str(data))
    begins = "data: column body, which begins: row\\x1b 0"
    files = "data: 2 files of books read (1 .jsonl, 1 .md); 1 passed over: c.pdf"
    assert list(data_summary(sweep)) == [files, begins]
    for _ in range(2):  # the second time the data is known
        *lines, counts = data_summary(prepare(sweep))
        assert lines == [files, begins]
        assert counts == (
            "data: 9 documents of 119 tokens to train on, 1 of 14 tokens held out: 10%, by a hash of the text"
        )


def test_a_corpus_without_files_has_no_line_of_them(tmp_path):
    assert list(data_summary(identified(tmp_path, data="builtin:stdlib"))) == []


def test_instructions(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Count {i}", "output": "1"}) + "\n" for i in range(20)))
    files, begins, counts = data_summary(prepare(identified(tmp_path, data=str(rows), task="sft")))
    assert files == "data: 1 file of rows.jsonl read (1 .jsonl)"
    assert begins == "data: column instruction and output, which begins: Count 0"
    assert "examples of" in counts and "held out" in counts


def test_held_out_data_copies_and_near_copies_are_printed(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
    texts = ["\n".join(f"value_{number} = {number * step}" for number in range(300)) for step in (3, 7, 11)]
    for number, text in enumerate(texts):
        (tmp_path / "train" / f"{number}.txt").write_text(text)
    (tmp_path / "eval" / "copy.txt").write_text(texts[0] + "\n")
    (tmp_path / "eval" / "near.txt").write_text(texts[1].replace("value_99 ", "other "))
    sweep = identified(tmp_path, data=str(tmp_path / "train"), eval_data=str(tmp_path / "eval"))
    data, held_out, _, counts, copies, near = data_summary(prepare(sweep))
    assert data == "data: 3 files of train read (3 .txt)"
    assert held_out == "held-out data: 2 files of eval read (2 .txt)"
    assert counts.startswith("data: 2 documents of ") and "held out: all of eval (--eval-data)" in counts
    assert copies == "data: 1 copy of held-out documents dropped"
    beginning = (
        "data: 1 held-out document shares over half of its 52-token shingles with training documents: near.txt (9"
    )
    assert near.startswith(beginning)
