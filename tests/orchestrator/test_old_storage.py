"""A storage that an earlier version wrote (commit b1875aa) and a killed process left behind is continued."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import SweepCommand

pytestmark = pytest.mark.ray

INTERRUPTED = Path(__file__).parents[1] / "data" / "b1875aa_interrupted"
# The command that was killed after the checkpoint of step 2.
FLAGS = (
    "--name", "golden", "--context-lengths", "1024", "--methods", "lora", "--lora-rank", "2",
    "--lora-targets", "q_proj", "--steps", "12", "--batch", "2", "--checkpoint-every", "2",
    "--eval-every", "12", "--eval-documents", "4", "--precision", "float32",
)  # fmt: skip
LORA = "095eaad18e88c459"
# What commit b1875aa itself reached without an interruption, at 1,024 tokens after 12 steps.
PERPLEXITY = 3.8338428


def test_an_interrupted_sweep_of_an_earlier_version_is_resumed(tmp_path, text_folder):
    storage = tmp_path / "runs"
    shutil.copytree(INTERRUPTED, storage)
    before = {path.parent.name: path.read_text() for path in storage.glob("trials/*/journal.jsonl")}

    status, output = SweepCommand(storage, "convergence", "--data", str(text_folder), *FLAGS).run()

    assert status == 0, output
    assert set(before) == {path.name for path in (storage / "trials").iterdir()}  # the same fingerprints
    for name, text in before.items():
        assert (storage / "trials" / name / "journal.jsonl").read_text().startswith(text)
    lines = (storage / "trials" / LORA / "journal.jsonl").read_text()[len(before[LORA]) :].splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(3, 13))
    final = next(e for e in events if e["event"] == "eval" and (e["step"], e["context_length"]) == (12, 1024))
    assert final["perplexity"] == pytest.approx(PERPLEXITY, rel=1e-4)
